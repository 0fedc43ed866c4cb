//! The parameter of a selection rule that reaches a density.

use crate::ffn::Selection;

/// The τ of [`SelectionRule::DynamicK`](crate::ffn::SelectionRule::DynamicK) with which the tokens
/// of `scores` \[T, E\] run `mean_k` experts on average, as nearly as any τ can.
///
/// Exact, without a grid: every entry (t, e) has a largest τ that still selects it, and the answer
/// is the one that as many entries reach as there should be. Of equal entries either all or none
/// are selected, whichever comes closer; the arg-max of a token always is.
///
/// # Panics
/// When `num_experts` is 0.
pub fn rel_threshold(scores: &[f32], num_experts: usize, mean_k: f64) -> f32 {
    let mut largest: Vec<f32> =
        scores.chunks_exact(num_experts).flat_map(largest_thresholds).collect();
    let num_tokens = scores.len() / num_experts;
    let wanted = (mean_k * num_tokens as f64).round() as usize;
    if largest.is_empty() || wanted >= largest.len() {
        return 0.0;
    }
    // In descending order; entry `wanted` is the first that should be left out.
    largest.sort_unstable_by(|a, b| b.total_cmp(a));
    let first_out = largest[wanted];
    let selected_below = largest.partition_point(|&t| t > first_out);
    let selected_with = largest.partition_point(|&t| t >= first_out);
    if selected_with - wanted < wanted - selected_below || selected_below == 0 {
        first_out
    } else {
        largest[selected_below - 1]
    }
}

/// For every entry of a row that a τ in \[0, 1\] selects, the largest such τ.
fn largest_thresholds(row: &[f32]) -> impl Iterator<Item = f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let argmax = row.iter().position(|&r| r == max);
    let has_score = row.iter().any(|r| r.is_finite());
    let selectable = move |r: f32| has_score && r > f32::NEG_INFINITY;
    row.iter().enumerate().filter(move |(_, r)| selectable(**r)).map(move |(expert, &r)| {
        if Some(expert) == argmax {
            1.0
        } else if max > 0.0 {
            largest_threshold(r, max)
        } else {
            0.0
        }
    })
}

/// The largest τ in \[0, 1\] with r ≥ fl32(τ · max): r / max, but for rounding.
fn largest_threshold(r: f32, max: f32) -> f32 {
    // The bits of floats that are not negative order as the floats do.
    let (mut selects, mut too_large) = (0, 1f32.to_bits() + 1);
    while too_large - selects > 1 {
        let middle = selects.midpoint(too_large);
        if r >= f32::from_bits(middle) * max {
            selects = middle;
        } else {
            too_large = middle;
        }
    }
    f32::from_bits(selects)
}

/// The p of [`SelectionRule::CumulativeShare`](crate::ffn::SelectionRule::CumulativeShare) with which
/// the tokens of `scores` \[T, E\] run `mean_k` experts on average.
///
/// An expert is selected when the share of those before it, in descending order, is below p: p is the
/// share that as many entries are below as there should be.
///
/// # Panics
/// When `num_experts` is 0.
pub fn share(scores: &[f32], num_experts: usize, mean_k: f64) -> f32 {
    let mut before = Vec::with_capacity(scores.len());
    for row in scores.chunks_exact(num_experts) {
        let mut row: Vec<f32> = row.iter().copied().filter(|r| r.is_finite()).collect();
        row.sort_unstable_by(|a, b| b.total_cmp(a));
        let total: f32 = row.iter().sum();
        let mut sum = 0.0;
        for r in row {
            before.push(if total > 0.0 { sum / total } else { 0.0 });
            sum += r;
        }
    }
    let wanted = (mean_k * (scores.len() / num_experts) as f64).round() as usize;
    if wanted >= before.len() {
        return 1.0;
    }
    before.sort_unstable_by(f32::total_cmp);
    before[wanted].clamp(0.0, 1.0)
}

/// The top-k rule whose tokens run about `mean_k` experts.
///
/// # Panics
/// When `num_experts` is 0.
pub fn top_k(num_experts: usize, mean_k: f64) -> Selection {
    Selection::top_k((mean_k.round() as usize).clamp(1, num_experts))
}
