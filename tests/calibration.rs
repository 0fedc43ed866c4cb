//! Calibration of thresholds, and counting what routing does.

mod support;

use moefy::convert::{calibrate, rarest_first, routing_statistics};
use moefy::ffn::{ExpertMask, Partition, Selection, SelectionRule};
use moefy::reference;
use support::Random;

fn pairs(scores: &[f32], num_experts: usize, rel_threshold: f32) -> usize {
    let selection = Selection::dynamic_k(rel_threshold);
    reference::select(&selection, scores, num_experts).mask.num_pairs()
}

/// Scores with ties, zeros, whole rows of zeros and tiny values.
fn scores(random: &mut Random, num_tokens: usize, num_experts: usize) -> Vec<f32> {
    let mut scores = random.values(num_tokens * num_experts);
    for (token, row) in scores.chunks_exact_mut(num_experts).enumerate() {
        let scale = [1.0, 1e-30, 4e-45, 0.0, 1e30][token % 5];
        let levels = random.pick(&[3.0, 1e6]);
        row.iter_mut().for_each(|r| *r = (r.abs() * levels).floor() / levels * scale);
    }
    scores
}

#[test]
fn no_threshold_comes_closer_than_the_calibrated_one() {
    let mut random = Random::new(0);
    for (num_tokens, num_experts) in [(0, 3), (1, 1), (1, 7), (19, 5), (40, 13)] {
        let scores = scores(&mut random, num_tokens, num_experts);
        // Every τ at which something changes, and its neighbours.
        let mut thresholds = vec![0.0, 1.0];
        for row in scores.chunks_exact(num_experts) {
            let max = row.iter().fold(0.0f32, |max, &r| max.max(r));
            let ratios = row.iter().map(|r| r / max).filter(|ratio| ratio.is_finite());
            thresholds.extend(ratios.flat_map(|t| [t.next_down(), t, t.next_up()]));
        }
        thresholds.retain(|t| (0.0..=1.0).contains(t));
        for mean_k in [0.0, 1.0, 1.37, 2.0, 3.3, num_experts as f64] {
            let wanted = (mean_k * num_tokens as f64).round() as isize;
            let miss = |t| (pairs(&scores, num_experts, t) as isize - wanted).abs();
            let threshold = calibrate::rel_threshold(&scores, num_experts, mean_k);
            let best = thresholds.iter().map(|&t| miss(t)).min().unwrap();
            assert!(miss(threshold) <= best, "{num_tokens} {num_experts} {mean_k} {threshold}");
        }
    }
}

#[test]
fn distinct_scores_meet_the_mean_exactly() {
    let (num_tokens, num_experts) = (989, 31);
    let scores: Vec<f32> =
        Random::new(1).values(num_tokens * num_experts).iter().map(|r| r.abs()).collect();
    for mean_k in [1.1, 4.0, 8.37, 30.9] {
        let threshold = calibrate::rel_threshold(&scores, num_experts, mean_k);
        let wanted = (mean_k * num_tokens as f64).round() as usize;
        assert_eq!(pairs(&scores, num_experts, threshold), wanted);
        let share = Selection::cumulative_share(calibrate::share(&scores, num_experts, mean_k));
        let pairs = reference::select(&share, &scores, num_experts).mask.num_pairs();
        // Shares are sums, and those of one token may round to those of another.
        assert!(pairs.abs_diff(wanted) <= 1, "{pairs} pairs for {wanted}");
    }
}

#[test]
fn scores_that_are_not_finite_are_left_out() {
    let scores = [f32::NAN, 4.0, 2.0, f32::NEG_INFINITY, f32::NAN, f32::NAN];
    let threshold = calibrate::rel_threshold(&scores, 3, 1.0);
    assert_eq!(pairs(&scores, 3, threshold), 2);
    let infinite = [f32::INFINITY, 4.0, 2.0, 1.0, 2.0, 4.0];
    let threshold = calibrate::rel_threshold(&infinite, 3, 1.0);
    assert_eq!(pairs(&infinite, 3, threshold), 2);
}

#[test]
fn top_k_is_rounded_and_bounded() {
    let k = |mean_k| calibrate::top_k(6, mean_k).rule;
    assert_eq!(k(0.2), SelectionRule::TopK { k: 1 });
    assert_eq!(k(2.6), SelectionRule::TopK { k: 3 });
    assert_eq!(k(7.0), SelectionRule::TopK { k: 6 });
}

/// Experts of two neurons.
fn partition(num_experts: usize, shared: usize) -> Partition {
    let experts = (0..2 * num_experts).map(|neuron| (neuron / 2) as u32);
    let labels = experts.chain(std::iter::repeat_n(num_experts as u32, shared)).collect();
    Partition::new(num_experts, labels).unwrap()
}

fn mask(num_experts: usize, tokens: &[&[usize]]) -> ExpertMask {
    let mut mask = ExpertMask::none(tokens.len(), num_experts);
    for (token, experts) in tokens.iter().enumerate() {
        experts.iter().for_each(|&expert| mask.insert(token, expert));
    }
    mask
}

#[test]
fn statistics_of_a_case_by_hand() {
    // Two kinds of token take turns; 17 tokens are two blocks of 8 and one more.
    let tokens: Vec<&[usize]> =
        (0..17).map(|t| if t % 2 == 0 { &[0, 1][..] } else { &[2][..] }).collect();
    let statistics = routing_statistics(&partition(5, 3), &mask(5, &tokens));
    assert_eq!((statistics.num_tokens, statistics.max_k), (17, 2));
    assert_eq!(statistics.mean_k, 26.0 / 17.0);
    assert_eq!(statistics.density, (3.0 + 2.0 * 26.0 / 17.0) / 13.0);
    assert_eq!(statistics.hotness, [9.0, 9.0, 8.0, 0.0, 0.0].map(|count| count / 17.0));
    assert_eq!(statistics.union_text_order.u8, 3.0 / 5.0);
    // Expert 2 is the rarest: its 8 tokens fill a block, and 8 of the others the next.
    assert_eq!(statistics.union_rarest_first.u8, 1.5 / 5.0);
    assert_eq!(statistics.union_rarest_first.u128, 3.0 / 5.0);
}

#[test]
fn tokens_follow_their_rarest_expert_then_the_second_and_stay_in_order() {
    let hotness = [0.9, 0.1, 0.1, 0.5];
    let tokens: [&[usize]; 8] = [&[0], &[], &[0, 2], &[2, 3], &[1, 0], &[3], &[0, 2], &[1, 2]];
    // By rarity the experts are 1, 2, 3, 0.
    assert_eq!(rarest_first(&mask(4, &tokens), &hotness), [7, 4, 3, 2, 6, 5, 0, 1]);
}

#[test]
fn statistics_of_nothing_are_zero() {
    let statistics = routing_statistics(&partition(5, 0), &ExpertMask::none(0, 5));
    assert_eq!((statistics.density, statistics.mean_k, statistics.max_k), (0.0, 0.0, 0));
    assert_eq!(statistics.union_text_order.u8, 0.0);
    assert_eq!(statistics.hotness, [0.0; 5]);
}
