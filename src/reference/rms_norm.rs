//! `y = x / √(mean(x²) + ε) ⊙ weight` over each token's elements (arXiv 1910.07467, §4).

/// x \[T, d_model\] → y \[T, d_model\].
pub fn rms_norm(weight: &[f64], epsilon: f64, x: &[f64]) -> Vec<f64> {
    let mut y = Vec::with_capacity(x.len());
    for x in x.chunks_exact(weight.len()) {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / weight.len() as f64;
        let scale = 1.0 / (mean_square + epsilon).sqrt();
        y.extend(x.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    y
}
