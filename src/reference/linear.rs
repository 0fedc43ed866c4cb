//! `y = W x + b`, W \[d_out, d_in\].

use super::dot;

/// x \[T, d_in\] → y \[T, d_out\].
pub fn linear(weight: &[f64], bias: &[f64], x: &[f64], d_in: usize) -> Vec<f64> {
    x.chunks_exact(d_in)
        .flat_map(|x| weight.chunks_exact(d_in).zip(bias).map(move |(row, b)| dot(row, x) + b))
        .collect()
}
