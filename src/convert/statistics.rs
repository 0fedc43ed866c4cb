//! What routing did, counted.

use crate::ffn::{ExpertMask, Partition, RoutingStatistics, UnionShares};

/// Counts what `mask` selects of the experts of `partition`; the tokens are in the order of the text.
pub fn routing_statistics(partition: &Partition, mask: &ExpertMask) -> RoutingStatistics {
    let num_tokens = mask.num_tokens();
    let per_token = |count: usize| count as f64 / num_tokens.max(1) as f64;
    let mut counts = vec![0usize; mask.num_experts()];
    for token in 0..num_tokens {
        mask.experts(token).for_each(|expert| counts[expert] += 1);
    }
    let mean_k = per_token(mask.num_pairs());
    let hotness: Vec<f64> = counts.into_iter().map(per_token).collect();
    let text_order: Vec<u32> = (0..num_tokens as u32).collect();
    RoutingStatistics {
        num_tokens,
        density: partition.density(mean_k),
        mean_k,
        max_k: (0..num_tokens).map(|token| mask.count(token)).max().unwrap_or(0),
        union_text_order: union_shares(mask, &text_order),
        union_rarest_first: union_shares(mask, &rarest_first(mask, &hotness)),
        hotness,
    }
}

/// The tokens ordered by their rarest expert, the rarest of all experts first; ties by their second
/// rarest, then as they were. `hotness` says how often each expert is selected; of two that are
/// equally rare the lower id counts as the rarer. Tokens without experts come last.
///
/// Tokens that share an expert which few others need become neighbours, and a block of neighbours
/// needs few experts.
pub fn rarest_first(mask: &ExpertMask, hotness: &[f64]) -> Vec<u32> {
    let mut by_rarity: Vec<usize> = (0..hotness.len()).collect();
    by_rarity.sort_by(|&a, &b| hotness[a].total_cmp(&hotness[b]));
    let mut rank = vec![0; hotness.len()];
    by_rarity.iter().enumerate().for_each(|(position, &expert)| rank[expert] = position);

    let two_rarest = |token: u32| {
        let (mut rarest, mut second) = (usize::MAX, usize::MAX);
        for expert in mask.experts(token as usize) {
            let rank = rank[expert];
            (rarest, second) = (rarest.min(rank), second.min(rank.max(rarest)));
        }
        (rarest, second)
    };
    let mut order: Vec<u32> = (0..mask.num_tokens() as u32).collect();
    order.sort_by_cached_key(|&token| two_rarest(token));
    order
}

fn union_shares(mask: &ExpertMask, order: &[u32]) -> UnionShares {
    let share = |block_tokens: usize| {
        // A sample shorter than a block is a block of its own.
        let block_tokens = block_tokens.min(order.len()).max(1);
        let blocks = order.chunks_exact(block_tokens);
        let num_blocks = blocks.len();
        let total: usize = blocks.map(|block| union_size(mask, block)).sum();
        total as f64 / (num_blocks.max(1) * mask.num_experts()) as f64
    };
    UnionShares { u8: share(8), u16: share(16), u64: share(64), u128: share(128) }
}

fn union_size(mask: &ExpertMask, tokens: &[u32]) -> usize {
    let mut union = vec![0; mask.num_experts().div_ceil(32)];
    for &token in tokens {
        union.iter_mut().zip(mask.row(token as usize)).for_each(|(union, word)| *union |= word);
    }
    union.iter().map(|word| word.count_ones() as usize).sum()
}
