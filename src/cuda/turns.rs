//! The fastest of several launches, found by turns.
//!
//! Under the power cap the clock of an H100 goes up and down by a tenth within tens of milliseconds: what runs for itself, however
//! long, is timed at a clock of its own. Neighbours share one, so that a launch counts by its share of a round of all.

use crate::error::Result;

/// Rounds of all; then of the fastest.
const ROUNDS: usize = 3;
const FINALISTS: usize = 6;
const FINAL_ROUNDS: usize = 12;

/// Launches of so many that are compared.
pub(super) fn launches(count: usize) -> usize {
    count * ROUNDS + FINALISTS.min(count) * FINAL_ROUNDS
}

/// Which of so many launches takes least time, if there are any. `time_round` times those it is told, without a pause between
/// them, in that order and in any unit; `None` ends it early, with what is known by then.
///
/// # Errors
/// Those of `time_round`.
pub(super) fn fastest_by_turns(
    count: usize,
    mut time_round: impl FnMut(&[usize]) -> Result<Option<Vec<f64>>>,
) -> Result<Option<usize>> {
    let mut left: Vec<usize> = (0..count).collect();
    for (rounds, keep) in [(ROUNDS, FINALISTS), (FINAL_ROUNDS, 1)] {
        let mut shares = vec![Vec::new(); count];
        // Every other round goes backwards: a clock that falls all the time favours nobody.
        let mut order = left.clone();
        for _ in 0..rounds {
            let Some(times) = time_round(&order)? else { break };
            let all: f64 = times.iter().sum();
            order.iter().zip(times).for_each(|(&index, time)| shares[index].push(time / all));
            order.reverse();
        }
        // Those without a time stay in order.
        let medians: Vec<f64> = shares.iter().map(|shares| median(shares)).collect();
        left.sort_by(|&a, &b| medians[a].total_cmp(&medians[b]));
        left.truncate(keep);
    }
    Ok(left.first().copied())
}

/// NaN of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times of launches at a clock that falls by a third while they are compared, and swings by a tenth.
    fn at_a_falling_clock(of_launch: &[f64]) -> impl FnMut(&[usize]) -> Result<Option<Vec<f64>>> {
        let mut now = 0.0;
        move |order| {
            let times = order.iter().map(|&index| {
                let clock = 1.0 - f64::min(now / 300.0, 1.0) / 3.0 + 0.05 * f64::sin(now / 20.0);
                let time = of_launch[index] / clock;
                now += time;
                time
            });
            Ok(Some(times.collect()))
        }
    }

    #[test]
    fn the_fastest_is_found_though_the_clock_falls() {
        for best in 0..8 {
            let mut of_launch = [1.05, 1.02, 1.04, 1.03, 1.02, 1.2, 1.08, 1.1];
            of_launch[best] = 1.0;
            let found = fastest_by_turns(8, at_a_falling_clock(&of_launch));
            assert_eq!(found.unwrap(), Some(best));
        }
        assert_eq!(fastest_by_turns(0, |_| Ok(Some(Vec::new()))).unwrap(), None);
    }

    #[test]
    fn what_is_known_when_it_ends_early_decides() {
        let after = |rounds: usize| {
            let mut times = at_a_falling_clock(&[1.2, 1.0, 1.1]);
            let mut left = rounds;
            let found = fastest_by_turns(3, move |order| {
                let is_time = left > 0;
                left = left.saturating_sub(1);
                if is_time { times(order) } else { Ok(None) }
            });
            found.unwrap()
        };
        assert_eq!([0, 1, ROUNDS, ROUNDS + 1, 99].map(after).map(Option::unwrap), [0, 1, 1, 1, 1]);
    }
}
