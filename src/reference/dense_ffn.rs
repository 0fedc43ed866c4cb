//! `y = W2 h + b2` with `h = φ(W1 x + b1)`, or for a GLU `h = φ(Wg x + bg) ⊙ (W1 x + b1)`.

use super::{dot, optional};
use crate::ffn::DenseFfn;

/// x \[T, d_model\] → y \[T, d_model\].
pub fn dense_ffn(ffn: &DenseFfn, x: &[f64]) -> Vec<f64> {
    let d_model = ffn.d_model();
    let h = hidden(ffn, x);
    let w_out = ffn.w_out().to_f64();
    let b_out = optional(ffn.b_out(), d_model);
    let mut y = Vec::with_capacity(x.len());
    for h in h.chunks_exact(ffn.d_ff()) {
        for i in 0..d_model {
            let sum: f64 = h.iter().enumerate().map(|(n, h)| h * w_out[n * d_model + i]).sum();
            y.push(b_out[i] + sum);
        }
    }
    y
}

/// x \[T, d_model\] → h \[T, d_ff\].
pub fn hidden(ffn: &DenseFfn, x: &[f64]) -> Vec<f64> {
    let (d_model, d_ff, phi) = (ffn.d_model(), ffn.d_ff(), ffn.activation());
    let w_in = ffn.w_in().to_f64();
    let b_in = optional(ffn.b_in(), w_in.len() / d_model);
    let mut h = Vec::with_capacity(x.len() / d_model * d_ff);
    for x in x.chunks_exact(d_model) {
        let pre = |row: usize| dot(&w_in[row * d_model..(row + 1) * d_model], x) + b_in[row];
        for n in 0..d_ff {
            h.push(if ffn.is_glu() {
                phi.apply(pre(n)) * pre(d_ff + n)
            } else {
                phi.apply(pre(n))
            });
        }
    }
    h
}
