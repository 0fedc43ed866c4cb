//! The set S(t) of selected experts from f32 scores. Selection is exact: every path must give these
//! very bits.

use crate::ffn::{ExpertMask, Selection, SelectionRule};

/// What [`select`] found in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// S(t).
    pub mask: ExpertMask,
    /// Number of rows without a finite score; they select nothing.
    pub rows_without_score: usize,
}

/// scores \[T, E\] → S(t). NaN counts as −∞, and −∞ is never selected; a row without a finite score
/// selects nothing.
pub fn select(selection: &Selection, scores: &[f32], num_experts: usize) -> Selected {
    let num_tokens = scores.len() / num_experts;
    let mut mask = ExpertMask::none(num_tokens, num_experts);
    let mut rows_without_score = 0;
    for (token, row) in scores.chunks_exact(num_experts).enumerate() {
        if !row.iter().any(|r| r.is_finite()) {
            rows_without_score += 1;
            continue;
        }
        for expert in select_row(selection, row) {
            mask.insert(token, expert);
        }
    }
    Selected { mask, rows_without_score }
}

fn select_row(selection: &Selection, row: &[f32]) -> Vec<usize> {
    let mut descending: Vec<usize> =
        (0..row.len()).filter(|&e| row[e] > f32::NEG_INFINITY).collect();
    // Stable, so that of equal scores the lower expert id comes first.
    descending.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).expect("no NaN is left"));

    let count = match selection.rule {
        SelectionRule::TopK { k } => k,
        SelectionRule::DynamicK { rel_threshold } => {
            let max = row[descending[0]];
            let threshold = rel_threshold * max;
            if rel_threshold == 0.0 {
                descending.len()
            } else if max == 0.0 {
                1
            } else {
                // The arg-max is in even where τ·max exceeds max, as for a negative max.
                descending.iter().take_while(|&&e| row[e] >= threshold).count().max(1)
            }
        }
        SelectionRule::CumulativeShare { share } => {
            let total = descending.iter().fold(0.0f32, |sum, &e| sum + row[e]);
            // Not 0 times infinity.
            let target = if share > 0.0 { share * total } else { 0.0 };
            let mut sum = 0.0f32;
            let reached = descending.iter().position(|&e| {
                sum += row[e];
                sum >= target
            });
            reached.map_or(descending.len(), |last| last + 1)
        }
    };
    descending.truncate(count.min(selection.max_experts.unwrap_or(usize::MAX)));
    descending
}
