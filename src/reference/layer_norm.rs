//! `y = (x − mean) / √(variance + ε) ⊙ weight + bias` over each token's elements; the variance is
//! that of the population.

/// x \[T, d_model\] → y \[T, d_model\].
pub fn layer_norm(weight: &[f64], bias: &[f64], epsilon: f64, x: &[f64]) -> Vec<f64> {
    let d_model = weight.len();
    let mut y = Vec::with_capacity(x.len());
    for x in x.chunks_exact(d_model) {
        let mean = x.iter().sum::<f64>() / d_model as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / d_model as f64;
        let scale = 1.0 / (variance + epsilon).sqrt();
        y.extend(x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * scale * w + b));
    }
    y
}
