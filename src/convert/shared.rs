//! Which neurons every token runs.

use super::hidden::for_each_hidden;
use crate::ffn::DenseFfn;

/// Tokens that are looked at.
const SAMPLE_TOKENS: usize = 4096;

/// The `count` neurons n with the largest mean of |h_n| · ‖row n of W2ᵀ‖, the length of what a
/// neuron adds to the output; of equal ones those with the lower index.
pub(super) fn strongest(ffn: &DenseFfn, inputs: &[f32], count: usize) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let (d_model, d_ff) = (ffn.d_model(), ffn.d_ff());
    let sample = &inputs[..inputs.len().min(SAMPLE_TOKENS * d_model)];
    let mut strength = vec![0.0f64; d_ff];
    for_each_hidden(ffn, sample, |hidden| {
        for h in hidden.chunks_exact(d_ff) {
            strength.iter_mut().zip(h).for_each(|(sum, h)| *sum += f64::from(h.abs()));
        }
    });
    for (strength, row) in strength.iter_mut().zip(ffn.w_out().to_f32().chunks_exact(d_model)) {
        *strength *= row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
    }
    let mut neurons: Vec<u32> = (0..d_ff as u32).collect();
    neurons.sort_by(|&a, &b| strength[b as usize].total_cmp(&strength[a as usize]));
    neurons.truncate(count);
    neurons
}
