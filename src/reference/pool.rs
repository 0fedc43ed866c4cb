//! Sentence embeddings: the mean over a sequence's tokens, scaled to unit length.

use super::dot;

/// x \[T, d_model\] and the first token of every sequence, and T → \[num_sequences, d_model\]. A
/// mean shorter than 1e-12 is divided by 1e-12.
pub fn pool(x: &[f64], sequence_offsets: &[u32], d_model: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for sequence in sequence_offsets.windows(2) {
        let tokens = &x[sequence[0] as usize * d_model..sequence[1] as usize * d_model];
        let count = (sequence[1] - sequence[0]) as f64;
        let mean: Vec<f64> = (0..d_model)
            .map(|i| tokens.chunks_exact(d_model).map(|token| token[i]).sum::<f64>() / count)
            .collect();
        let norm = dot(&mean, &mean).sqrt().max(1e-12);
        y.extend(mean.iter().map(|m| m / norm));
    }
    y
}
