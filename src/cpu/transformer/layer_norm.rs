//! Layer norm, with the residual added on the way.

use pulp::Arch;
use rayon::prelude::*;

use super::lanes::sum;
use crate::model::LayerNorm;

/// x \[T, d_model\] = layer norm of x + branch, in place.
pub(super) fn layer_norm(x: &mut [f32], branch: Option<&[f32]>, norm: &LayerNorm<Vec<f32>>) {
    let (arch, d_model) = (Arch::new(), norm.d_model);
    x.par_chunks_exact_mut(d_model).enumerate().with_min_len(16).for_each(|(token, x)| {
        let branch = branch.map(|branch| &branch[token * d_model..(token + 1) * d_model]);
        arch.dispatch(|| layer_norm_row(x, branch, norm));
    });
}

#[inline(always)]
fn layer_norm_row(x: &mut [f32], branch: Option<&[f32]>, norm: &LayerNorm<Vec<f32>>) {
    if let Some(branch) = branch {
        x.iter_mut().zip(branch).for_each(|(x, b)| *x += b);
    }
    let count = x.len() as f32;
    let mean = sum(x, |x| x) / count;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / count;
    let scale = 1.0 / (variance + norm.epsilon as f32).sqrt();
    for ((x, w), b) in x.iter_mut().zip(&norm.weight).zip(&norm.bias) {
        *x = (*x - mean) * scale * w + b;
    }
}
