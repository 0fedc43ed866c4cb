//! Selection: scores to bits.

use crate::ffn::{ExpertMask, Selection, SelectionRule};

/// scores \[T, E\] → S(t), into `mask`, whose old bits are dropped. The bits are those of
/// [`reference::select`](crate::reference::select). Returns the number of rows without a finite
/// score; they select nothing.
///
/// # Panics
/// When `scores` does not hold one score per token and expert of `mask`.
pub fn select(selection: &Selection, scores: &[f32], mask: &mut ExpertMask) -> usize {
    select_with(selection, scores, mask, &mut Vec::new())
}

/// [`select`] with room for the order of one row, which [`SelectionRule::CumulativeShare`] needs.
pub(super) fn select_with(
    selection: &Selection,
    scores: &[f32],
    mask: &mut ExpertMask,
    order: &mut Vec<u32>,
) -> usize {
    let (num_tokens, num_experts) = (mask.num_tokens(), mask.num_experts());
    assert_eq!(scores.len(), num_tokens * num_experts, "scores are not [T, E]");
    let cap = selection.max_experts.unwrap_or(usize::MAX);
    let mut rows_without_score = 0;
    for (token, row) in scores.chunks_exact(num_experts).enumerate() {
        let words = mask.row_mut(token);
        if !row.iter().any(|r| r.is_finite()) {
            words.fill(0);
            rows_without_score += 1;
            continue;
        }
        match selection.rule {
            SelectionRule::TopK { k } => insert_best(row, k.min(cap), words),
            SelectionRule::DynamicK { rel_threshold: 0.0 } => {
                insert_best(row, num_experts.min(cap), words);
            }
            SelectionRule::DynamicK { rel_threshold } => {
                let max =
                    row.iter().fold(f32::NEG_INFINITY, |max, &r| if r > max { r } else { max });
                let threshold = rel_threshold * max;
                let count = insert_where(row, words, |r| r >= threshold);
                let wanted = if max == 0.0 { 1 } else { count.max(1) }.min(cap);
                if wanted != count {
                    insert_best(row, wanted, words);
                }
            }
            SelectionRule::CumulativeShare { share } => {
                insert_best(row, prefix_with_share(row, share, order).min(cap), words);
            }
        }
    }
    rows_without_score
}

/// Sets exactly the bits of the scores that pass; returns how many.
fn insert_where(row: &[f32], words: &mut [u32], pass: impl Fn(f32) -> bool) -> usize {
    let mut count = 0;
    for (row, word) in row.chunks(32).zip(words) {
        *word = row.iter().enumerate().fold(0, |word, (bit, &r)| word | u32::from(pass(r)) << bit);
        count += word.count_ones() as usize;
    }
    count
}

/// Sets exactly the bits of the `k` best scores above −∞; of equal ones the lower expert id first.
fn insert_best(row: &[f32], k: usize, words: &mut [u32]) {
    // The k-th largest key, bit by bit from the top.
    let mut kth = 0u32;
    for bit in (0..32).rev() {
        let candidate = kth | 1 << bit;
        if row.iter().filter(|&&r| key(r) >= candidate).count() >= k {
            kth = candidate;
        }
    }
    let kth = kth.max(1);
    let above = insert_where(row, words, |r| key(r) > kth);
    let ties = row.iter().enumerate().filter(|&(_, &r)| key(r) == kth);
    for (expert, _) in ties.take(k - above) {
        words[expert / 32] |= 1 << (expert % 32);
    }
}

/// Integers in the order of the scores: 0 for NaN and −∞, and −0 equals 0.
fn key(r: f32) -> u32 {
    let bits = (r + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    if r > f32::NEG_INFINITY { ordered } else { 0 }
}

/// Length of the smallest prefix, in descending order, whose share of the sum reaches `share`.
fn prefix_with_share(row: &[f32], share: f32, order: &mut Vec<u32>) -> usize {
    order.clear();
    order.extend(row.iter().map(|&r| key(r)).filter(|&key| key > 0));
    order.sort_unstable_by(|a, b| b.cmp(a));
    let total = order.iter().fold(0.0f32, |sum, &key| sum + score(key));
    // Not 0 times infinity.
    let target = if share > 0.0 { share * total } else { 0.0 };
    let mut sum = 0.0f32;
    let reached = order.iter().position(|&key| {
        sum += score(key);
        sum >= target
    });
    reached.map_or(order.len(), |last| last + 1)
}

/// The score that has this key.
fn score(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}
