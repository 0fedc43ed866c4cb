//! The hidden activations of an FFN, some tokens at a time.

use rayon::prelude::*;

use crate::cpu::{activate, linear};
use crate::ffn::DenseFfn;

/// Tokens whose hidden activations are in memory at once.
const CHUNK_TOKENS: usize = 512;

/// Calls `visit` with h \[n, d_ff\] of consecutive chunks of `inputs` \[T, d_model\], in order.
pub(super) fn for_each_hidden(ffn: &DenseFfn, inputs: &[f32], mut visit: impl FnMut(&[f32])) {
    let (d_model, d_ff) = (ffn.d_model(), ffn.d_ff());
    let w_in = ffn.w_in().to_f32();
    let b_in = ffn.b_in().map(|b| b.to_f32());
    let num_rows = w_in.len() / d_model;
    let mut pre = vec![0.0; CHUNK_TOKENS * num_rows];
    let mut product = vec![0.0; if ffn.is_glu() { CHUNK_TOKENS * d_ff } else { 0 }];
    for x in inputs.chunks(CHUNK_TOKENS * d_model) {
        let num_tokens = x.len() / d_model;
        let pre = &mut pre[..num_tokens * num_rows];
        linear(pre, x, &w_in, b_in.as_deref(), d_model, num_rows);
        pre.par_chunks_exact_mut(num_rows).for_each(|z| activate(ffn.activation(), &mut z[..d_ff]));
        if !ffn.is_glu() {
            visit(pre);
            continue;
        }
        let product = &mut product[..num_tokens * d_ff];
        product.par_chunks_exact_mut(d_ff).zip(pre.par_chunks_exact(num_rows)).for_each(
            |(h, z)| {
                let (gate, up) = z.split_at(d_ff);
                h.iter_mut().zip(gate.iter().zip(up)).for_each(|(h, (gate, up))| *h = gate * up);
            },
        );
        visit(product);
    }
}

/// The mean of every neuron's h over the inputs, \[d_ff\].
pub(super) fn mean_hidden(ffn: &DenseFfn, inputs: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0f64; ffn.d_ff()];
    for_each_hidden(ffn, inputs, |hidden| {
        for h in hidden.chunks_exact(sums.len()) {
            sums.iter_mut().zip(h).for_each(|(sum, h)| *sum += f64::from(*h));
        }
    });
    let num_tokens = inputs.len() / ffn.d_model();
    sums.into_iter().map(|sum| (sum / num_tokens.max(1) as f64) as f32).collect()
}
