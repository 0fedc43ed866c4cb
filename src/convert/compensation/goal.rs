//! What a layer of a converted model should come to, and what errors cost there.

use crate::cpu::{self, Matrix, MatrixMut, Workspace, gemm};
use crate::error::Result;
use crate::ffn::DenseFfn;

/// Tokens that the mean metric is taken over.
const METRIC_TOKENS: usize = 8192;

/// The residual sums of the dense model, with the norm behind them in mind.
pub(in crate::convert) struct Goal {
    /// z₀ = x₀ + FFN(x₀) \[T, d_model\], with x₀ the inputs in the dense model.
    sums: Vec<f32>,
    /// 1/(σ ‖h₀‖)² \[T\], with σ the standard deviation of z₀ and h₀ the layer's output: the square of
    /// what the norm makes of an error's size, in units of the output.
    pub(in crate::convert) weights: Vec<f32>,
    /// The weighted mean over tokens of Gᵀ G, where G = diag(γ) (P − u uᵀ) is σ times the derivative of
    /// the norm: P = 1 − 1 1ᵀ/d removes the mean, u is the direction of P z₀, γ the norm's weight.
    pub(in crate::convert) metric: Vec<f64>,
}

impl Goal {
    /// `outputs` h₀ \[T, d_model\] are the dense model's behind the norm, whose weight is γ \[d_model\].
    pub(in crate::convert) fn new(
        ffn: &DenseFfn,
        dense_inputs: &[f32],
        outputs: &[f32],
        norm_weight: &[f32],
    ) -> Result<Self> {
        let d = ffn.d_model();
        let mut sums = vec![0.0; dense_inputs.len()];
        cpu::DenseFfn::new(ffn).run(dense_inputs, &mut sums, &mut Workspace::default())?;
        sums.iter_mut().zip(dense_inputs).for_each(|(y, x)| *y += x);

        let square = |values: &[f32]| values.iter().map(|v| v * v).sum::<f32>();
        let weight = |(sum, output): (&[f32], &[f32])| {
            let mean = sum.iter().sum::<f32>() / d as f32;
            let variance = sum.iter().map(|z| (z - mean).powi(2)).sum::<f32>() / d as f32;
            1.0 / (variance * square(output)).max(f32::MIN_POSITIVE.sqrt())
        };
        let weights: Vec<f32> =
            sums.chunks_exact(d).zip(outputs.chunks_exact(d)).map(weight).collect();
        let metric = mean_metric(&sums, &weights, norm_weight);
        Ok(Self { sums, weights, metric })
    }

    /// What the FFN should add to inputs x \[T, d_model\] of the same tokens.
    pub(in crate::convert) fn targets(&self, inputs: &[f32]) -> Vec<f32> {
        self.sums.iter().zip(inputs).map(|(sum, x)| sum - x).collect()
    }
}

/// Σ w Gᵀ G / Σ w over tokens all over the sample. With g² = diag(γ²), Gᵀ G =
/// P g² P − q uᵀ − u qᵀ + (uᵀ g² u) u uᵀ, q = P g² u.
fn mean_metric(sums: &[f32], weights: &[f32], norm_weight: &[f32]) -> Vec<f64> {
    let d = norm_weight.len();
    let squares: Vec<f32> = norm_weight.iter().map(|g| g * g).collect();
    let (mut u, mut weighted) = (Vec::new(), Vec::new());
    let mut total = 0.0f64;
    let stride = weights.len().div_ceil(METRIC_TOKENS).max(1);
    for (sum, &weight) in sums.chunks_exact(d).zip(weights).step_by(stride) {
        let mean = sum.iter().sum::<f32>() / d as f32;
        let length = sum.iter().map(|z| (z - mean).powi(2)).sum::<f32>().sqrt();
        let start = u.len();
        u.extend(sum.iter().map(|z| (z - mean) / length.max(f32::MIN_POSITIVE)));
        let unit = &u[start..];
        let mut q: Vec<f32> = unit.iter().zip(&squares).map(|(u, g)| g * u).collect();
        let mean = q.iter().sum::<f32>() / d as f32;
        q.iter_mut().for_each(|q| *q -= mean);
        let along: f32 = q.iter().zip(unit).map(|(q, u)| q * u).sum();
        // q uᵀ + u qᵀ − (uᵀ g² u) u uᵀ = r uᵀ + u rᵀ, r = q − (uᵀ g² u)/2 · u.
        weighted.extend(q.iter().zip(unit).map(|(q, u)| weight * (q - 0.5 * along * u)));
        total += f64::from(weight);
    }
    let tokens = u.len() / d;
    let mut crossed = vec![0.0f32; d * d];
    let r = Matrix::new(&weighted, [tokens, d]).transposed();
    gemm(1.0, r, Matrix::new(&u, [tokens, d]), 0.0, MatrixMut::new(&mut crossed, [d, d]));

    // P g² P = g² − (g² 1 1ᵀ + 1 1ᵀ g²)/d + (Σ g²) 1 1ᵀ/d².
    let mean_square = squares.iter().map(|&g| f64::from(g)).sum::<f64>() / d as f64;
    let mut metric = vec![0.0; d * d];
    for i in 0..d {
        for j in 0..d {
            let (g_i, g_j) = (f64::from(squares[i]), f64::from(squares[j]));
            let diagonal = if i == j { g_i } else { 0.0 };
            let centred = diagonal - (g_i + g_j - mean_square) / d as f64;
            let crossed = f64::from(crossed[i * d + j]) + f64::from(crossed[j * d + i]);
            metric[i * d + j] = centred - crossed / total.max(f64::MIN_POSITIVE);
        }
    }
    metric
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn metric_is_what_a_norm_makes_of_small_errors() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let d = 6;
        let mut random =
            |n: usize| -> Vec<f64> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
        let (z, gamma, error) = (random(d), random(d), random(d));
        let norm = |z: &[f64]| -> (Vec<f64>, f64) {
            let mean = z.iter().sum::<f64>() / d as f64;
            let sigma = (z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / d as f64).sqrt();
            (z.iter().zip(&gamma).map(|(z, g)| g * (z - mean) / sigma).collect(), sigma)
        };
        let step = 1e-5;
        let moved: Vec<f64> = z.iter().zip(&error).map(|(z, e)| z + step * e).collect();
        let ((y, sigma), (y_moved, _)) = (norm(&z), norm(&moved));
        let expected: f64 =
            y.iter().zip(&y_moved).map(|(a, b)| ((b - a) / step * sigma).powi(2)).sum();

        let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        let metric = mean_metric(&narrow(&z), &[3.0], &narrow(&gamma));
        let got: f64 = (0..d * d).map(|i| error[i / d] * metric[i] * error[i % d]).sum();
        assert!((got - expected).abs() < 1e-3 * expected, "{got} is not {expected}");
    }
}
