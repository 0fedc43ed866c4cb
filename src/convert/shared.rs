//! Which neurons every token runs.

use super::SharedBy;
use super::hidden::for_each_hidden;
use crate::ffn::DenseFfn;

/// Tokens that are looked at.
const SAMPLE_TOKENS: usize = 4096;

/// The `count` neurons that contribute most by `by`; of equal ones those with the lower index.
pub(super) fn neurons(ffn: &DenseFfn, inputs: &[f32], count: usize, by: SharedBy) -> Vec<u32> {
    if count == 0 {
        return Vec::new();
    }
    let (d_model, d_ff) = (ffn.d_model(), ffn.d_ff());
    let sample = &inputs[..inputs.len().min(SAMPLE_TOKENS * d_model)];
    let of_value = |h: f32| match by {
        SharedBy::Strength => f64::from(h.abs()),
        SharedBy::Frequency => f64::from(u8::from(h > 0.0)),
    };
    let mut sums = vec![0.0f64; d_ff];
    for_each_hidden(ffn, sample, |hidden| {
        for h in hidden.chunks_exact(d_ff) {
            sums.iter_mut().zip(h).for_each(|(sum, &h)| *sum += of_value(h));
        }
    });
    if by == SharedBy::Strength {
        for (sum, row) in sums.iter_mut().zip(ffn.w_out().to_f32().chunks_exact(d_model)) {
            *sum *= row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>().sqrt();
        }
    }
    let mut neurons: Vec<u32> = (0..d_ff as u32).collect();
    neurons.sort_by(|&a, &b| sums[b as usize].total_cmp(&sums[a as usize]));
    neurons.truncate(count);
    neurons
}
