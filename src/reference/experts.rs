//! `y[t] = b2 + shared(x[t]) + Σ_{e ∈ S(t)} g[t,e] · expert_e(x[t])`, plus the compensation.

use super::{dense_ffn::hidden, dot, optional};
use crate::ffn::{Compensation, ExpertMask, Gate, MoeFfn};

/// x \[T, d_model\], S(t) and, for gates other than [`Gate::One`], r \[T, E\] → y \[T, d_model\].
///
/// # Panics
/// When the gate needs scores and there are none.
pub fn experts(ffn: &MoeFfn, x: &[f64], mask: &ExpertMask, scores: Option<&[f64]>) -> Vec<f64> {
    let (d_model, d_ff) = (ffn.d_model(), ffn.d_ff());
    let (width, num_experts) = (ffn.expert_width(), ffn.num_experts());
    let routed = num_experts * width;
    let w_out = ffn.neurons().w_out().to_f64();
    let b_out = optional(ffn.neurons().b_out(), d_model);
    let mean = match ffn.compensation() {
        Some(Compensation::Mean { mean }) => mean.to_f64(),
        _ => vec![0.0; d_ff],
    };
    let h = hidden(ffn.neurons(), x);

    let mut y = Vec::with_capacity(x.len());
    for (token, h) in h.chunks_exact(d_ff).enumerate() {
        let gates = scores.map(|r| &r[token * num_experts..(token + 1) * num_experts]);
        let gates = gates_of_token(ffn.gate(), gates, mask, token);
        let mut out = b_out.clone();
        let mut add = |neuron: usize, factor: f64| {
            for (i, out) in out.iter_mut().enumerate() {
                *out += factor * w_out[neuron * d_model + i];
            }
        };
        // A skipped neuron contributes its mean, a selected one what it is above that mean.
        (0..d_ff).for_each(|n| add(n, mean[n]));
        (routed..d_ff).for_each(|n| add(n, h[n] - mean[n]));
        for expert in mask.experts(token) {
            for n in expert * width..(expert + 1) * width {
                add(n, gates[expert] * (h[n] - mean[n]));
            }
        }
        if let Some(Compensation::Linear { u, v, c }) = ffn.compensation() {
            let (u, v, c) = (u.to_f64(), v.to_f64(), c.to_f64());
            let x = &x[token * d_model..(token + 1) * d_model];
            for (u, v) in u.chunks_exact(d_model).zip(v.chunks_exact(d_model)) {
                let inner = dot(v, x);
                out.iter_mut().zip(u).for_each(|(out, u)| *out += inner * u);
            }
            out.iter_mut().zip(&c).for_each(|(out, c)| *out += c);
        }
        y.extend(out);
    }
    y
}

/// g\[t, ·\]; only the entries of selected experts mean anything.
fn gates_of_token(gate: Gate, scores: Option<&[f64]>, mask: &ExpertMask, token: usize) -> Vec<f64> {
    if gate == Gate::One {
        return vec![1.0; mask.num_experts()];
    }
    let scores = scores.expect("this gate needs scores");
    if gate == Gate::Score {
        return scores.to_vec();
    }
    // NaN counts as −∞.
    let max = scores.iter().fold(f64::NEG_INFINITY, |max, &r| max.max(r));
    let exp = |r: f64| if r.is_nan() { 0.0 } else { (r - max).exp() };
    let weights: Vec<f64> = scores.iter().map(|&r| exp(r)).collect();
    let sum: f64 = match gate {
        Gate::Softmax => weights.iter().sum(),
        _ => mask.experts(token).map(|e| weights[e]).sum(),
    };
    weights.into_iter().map(|w| w / sum).collect()
}
