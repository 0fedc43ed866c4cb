//! Softmax attention: every token of a sequence sees all of its sequence, or only itself and those before it.

use super::dot;

/// Heads of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Of the queries.
    pub num_heads: usize,
    /// Of keys and values, each for `num_heads / num_kv_heads` heads of the queries.
    pub num_kv_heads: usize,
    /// Elements of each.
    pub d_head: usize,
    /// Whether later tokens stay unseen.
    pub is_causal: bool,
}

/// For each head, `softmax(Q Kᵀ / √d_head) V` with d_head = d_model / num_heads.
///
/// `qkv` \[T, 3·d_model\] holds each token's query, key and value, one after another, and
/// `sequence_offsets` the first token of every sequence, and T → \[T, d_model\].
pub fn attention(
    qkv: &[f64],
    sequence_offsets: &[u32],
    d_model: usize,
    num_heads: usize,
) -> Vec<f64> {
    let d_head = d_model / num_heads;
    let heads = Heads { num_heads, num_kv_heads: num_heads, d_head, is_causal: false };
    let part = |part: usize| -> Vec<f64> {
        qkv.chunks_exact(3 * d_model)
            .flat_map(|token| &token[part * d_model..][..d_model])
            .copied()
            .collect()
    };
    grouped_attention(&part(0), &part(1), &part(2), sequence_offsets, heads)
}

/// The same of q \[T, num_heads · d_head\] and k, v \[T, num_kv_heads · d_head\].
pub fn grouped_attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    sequence_offsets: &[u32],
    heads: Heads,
) -> Vec<f64> {
    let Heads { num_heads, num_kv_heads, d_head, is_causal } = heads;
    let mut y = vec![0.0; q.len()];
    for sequence in sequence_offsets.windows(2) {
        let (begin, end) = (sequence[0] as usize, sequence[1] as usize);
        for token in begin..end {
            let seen = begin..if is_causal { token + 1 } else { end };
            for head in 0..num_heads {
                let at = (token * num_heads + head) * d_head;
                let query = &q[at..at + d_head];
                let kv_head = head / (num_heads / num_kv_heads);
                let of = |matrix: &'_ [f64], other: usize| {
                    matrix[(other * num_kv_heads + kv_head) * d_head..][..d_head].to_vec()
                };
                let scores = seen.clone().map(|other| dot(query, &of(k, other)));
                let weights = softmax(scores.map(|s| s / (d_head as f64).sqrt()).collect());
                for (other, weight) in seen.clone().zip(weights) {
                    let value = of(v, other);
                    y[at..at + d_head].iter_mut().zip(value).for_each(|(y, v)| *y += weight * v);
                }
            }
        }
    }
    y
}

fn softmax(scores: Vec<f64>) -> Vec<f64> {
    let max = scores.iter().fold(f64::NEG_INFINITY, |max, &s| max.max(s));
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}
