//! Multi-head self-attention without a mask: every token of a sequence sees all of its sequence.

use super::dot;

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
    let part = |token: usize, part: usize, head: usize| {
        let at = (token * 3 + part) * d_model + head * d_head;
        &qkv[at..at + d_head]
    };
    let mut y = vec![0.0; qkv.len() / 3];
    for sequence in sequence_offsets.windows(2) {
        let tokens = sequence[0] as usize..sequence[1] as usize;
        for token in tokens.clone() {
            for head in 0..num_heads {
                let query = part(token, 0, head);
                let scores = tokens.clone().map(|other| dot(query, part(other, 1, head)));
                let weights = softmax(scores.map(|s| s / (d_head as f64).sqrt()).collect());
                let at = token * d_model + head * d_head;
                for (other, weight) in tokens.clone().zip(weights) {
                    let value = part(other, 2, head);
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
