//! Balanced assignment: every row gets one column and every column gets equally many rows, so that
//! the total score is as large as possible.
//!
//! This is the transportation problem; memory is the score matrix and one entry per row. The method
//! is the auction of Bertsekas and Castañon, "The auction algorithm for the transportation problem"
//! (Annals of Operations Research 20, 1989), with ε-scaling: rows bid for a place in a column, the
//! cheapest occupant of a full column has to leave, and a column's price is that of its cheapest
//! place.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A bid that raises a price by less could be lost in rounding, and an auction without an end.
const LEAST_STEP: f64 = 1e-12;

/// Finds labels \[R\] for finite `scores` \[R, C\], C = `prices.len()` a divisor of R, such that the
/// total score is at least the best possible one minus R · ε (up to rounding in f64): ε is `epsilon`,
/// or [`LEAST_STEP`] of the range of scores and prices where that is more.
///
/// `prices` ≥ 0 are those of an earlier, similar problem, or zeros, and are left as this problem's:
/// good ones save time and never cost quality.
pub(super) fn assign(scores: &[f32], prices: &mut [f64], epsilon: f64) -> Vec<u32> {
    let num_columns = prices.len();
    let num_rows = scores.len() / num_columns;
    if num_columns == 1 {
        return vec![0; num_rows];
    }
    // Coarse rounds bring the prices close, so that fine rounds need few bids.
    let scores_range = range(scores.iter().map(|&score| f64::from(score)));
    let all = scores_range + range(prices.iter().copied());
    let epsilon = epsilon.max(all * LEAST_STEP);
    let mut step = all / 8.0;
    while step > epsilon {
        auction(scores, prices, step);
        step /= 5.0;
    }
    auction(scores, prices, epsilon)
}

fn range(values: impl Iterator<Item = f64> + Clone) -> f64 {
    values.clone().fold(f64::NEG_INFINITY, f64::max) - values.fold(f64::INFINITY, f64::min)
}

/// One auction in which every bid raises a price by at least `epsilon` > 0. It ends because a column
/// that anybody left is full for good, and all others get dearer until the free places win.
fn auction(scores: &[f32], prices: &mut [f64], epsilon: f64) -> Vec<u32> {
    let num_columns = prices.len();
    let num_rows = scores.len() / num_columns;
    let capacity = num_rows / num_columns;
    // Only differences of prices matter.
    let lowest = prices.iter().copied().fold(f64::INFINITY, f64::min);
    prices.iter_mut().for_each(|price| *price -= lowest);

    // Occupants of a column as (what they paid, row), cheapest on top. The bits of floats that are
    // not negative order as the floats do.
    let mut places = vec![BinaryHeap::with_capacity(capacity + 1); num_columns];
    let mut waiting: Vec<u32> = (0..num_rows as u32).rev().collect();
    while let Some(row) = waiting.pop() {
        let row_scores = &scores[row as usize * num_columns..][..num_columns];
        let (mut column, mut best, mut second) = (0, f64::NEG_INFINITY, f64::NEG_INFINITY);
        for (c, (&score, &price)) in row_scores.iter().zip(&*prices).enumerate() {
            let value = f64::from(score) - price;
            if value > best {
                (column, best, second) = (c, value, best);
            } else if value > second {
                second = value;
            }
        }
        let bid = prices[column] + (best - second) + epsilon;
        let occupants = &mut places[column];
        occupants.push(Reverse((bid.to_bits(), row)));
        if occupants.len() > capacity {
            let Reverse((_, displaced)) = occupants.pop().expect("it was just filled");
            waiting.push(displaced);
        }
        if occupants.len() == capacity {
            let Reverse((cheapest, _)) = occupants.peek().expect("capacity is at least 1");
            prices[column] = f64::from_bits(*cheapest);
        }
    }

    let mut labels = vec![0; num_rows];
    for (column, occupants) in places.iter().enumerate() {
        for Reverse((_, row)) in occupants {
            labels[*row as usize] = column as u32;
        }
    }
    labels
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn total(scores: &[f32], num_columns: usize, labels: &[u32]) -> f64 {
        let rows = scores.chunks_exact(num_columns).zip(labels);
        rows.map(|(row, &label)| f64::from(row[label as usize])).sum()
    }

    /// The best total, row by row: for every way to have filled the columns so far, the best one.
    fn optimum(scores: &[f32], num_columns: usize) -> f64 {
        let capacity = scores.len() / num_columns / num_columns;
        let mut best_so_far = HashMap::from([(vec![0; num_columns], 0.0f64)]);
        for row in scores.chunks_exact(num_columns) {
            let mut next: HashMap<Vec<usize>, f64> = HashMap::new();
            for (filled, total) in best_so_far {
                for (column, &score) in row.iter().enumerate() {
                    if filled[column] < capacity {
                        let mut filled = filled.clone();
                        filled[column] += 1;
                        let best = next.entry(filled).or_insert(f64::NEG_INFINITY);
                        *best = best.max(total + f64::from(score));
                    }
                }
            }
            best_so_far = next;
        }
        best_so_far[&vec![capacity; num_columns]]
    }

    fn check(scores: &[f32], prices: &mut [f64], epsilon: f64) {
        let num_columns = prices.len();
        let num_rows = scores.len() / num_columns;
        let labels = assign(scores, prices, epsilon);
        for column in 0..num_columns as u32 {
            let size = labels.iter().filter(|&&label| label == column).count();
            assert_eq!(size, num_rows / num_columns);
        }
        let (got, best) = (total(scores, num_columns, &labels), optimum(scores, num_columns));
        assert!(got >= best - num_rows as f64 * epsilon - 1e-9, "{got} is far below {best}");
        assert!(got <= best + 1e-9);
    }

    #[test]
    fn total_is_within_rows_times_epsilon_of_the_best() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for (num_columns, capacity) in [(1, 5), (2, 1), (2, 7), (3, 4), (4, 5), (5, 2), (6, 1)] {
            // Prices of one problem serve the next, as in k-means.
            let mut prices = vec![0.0; num_columns];
            for epsilon in [1e-1, 1e-3, 1e-9] {
                for levels in [1.0, 2.0, 3.0, 1e6] {
                    let scores: Vec<f32> = (0..num_columns * num_columns * capacity)
                        .map(|_| (rng.random::<f32>() * levels).floor() / levels - 0.5)
                        .collect();
                    check(&scores, &mut prices, epsilon);
                }
            }
        }
    }

    /// Prices are so high there that a bid of `epsilon` would not raise them.
    #[test]
    fn scores_of_any_size() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for size in [1e-30, 1e7, 1e20, 1e38] {
            let scores: Vec<f32> = (0..36).map(|_| rng.random_range(-size..size)).collect();
            let labels = assign(&scores, &mut [0.0; 3], 1e-5);
            let (got, best) = (total(&scores, 3, &labels), optimum(&scores, 3));
            let allowed = 12.0 * f64::max(1e-5, 1e-11 * f64::from(size));
            assert!(got >= best - allowed, "{size:e}: {got} is far below {best}");
        }
    }

    #[test]
    fn everybody_wants_the_same_column() {
        let scores: Vec<f32> = (0..24).flat_map(|row| [row as f32, 0.0, -1e3, 0.0]).collect();
        check(&scores, &mut [0.0; 4], 1e-4);
    }
}
