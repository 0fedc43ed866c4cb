//! The factors g of the selected experts.

use super::index::TokenIndex;
use crate::ffn::Gate;

/// g\[t, e\] of every (token, expert) pair of the index, in its order; `norms` is scratch.
pub fn of_pairs(
    gate: Gate,
    scores: &[f32],
    num_experts: usize,
    index: &TokenIndex,
    norms: &mut Vec<(f32, f32)>,
    gates: &mut Vec<f32>,
) {
    let row = |token: u32| &scores[token as usize * num_experts..][..num_experts];
    // The largest score of every token, and the sum by which its exponentials are divided.
    norms.clear();
    norms.extend(index.ids()[index.all()].iter().map(|&token| {
        let max = row(token).iter().fold(f32::NEG_INFINITY, |max, &r| max.max(r));
        let of_all = || row(token).iter().map(|&r| exp(r, max)).sum();
        (max, if gate == Gate::Softmax { of_all() } else { 0.0 })
    }));
    if gate == Gate::Renormalised {
        for expert in 0..num_experts {
            for &token in &index.ids()[index.expert(expert)] {
                let (max, sum) = &mut norms[token as usize];
                *sum += exp(row(token)[expert], *max);
            }
        }
    }
    gates.clear();
    for expert in 0..num_experts {
        gates.extend(index.ids()[index.expert(expert)].iter().map(|&token| {
            let (score, (max, sum)) = (row(token)[expert], norms[token as usize]);
            match gate {
                Gate::One => 1.0,
                Gate::Score => score,
                Gate::Softmax | Gate::Renormalised => exp(score, max) / sum,
            }
        }));
    }
}

/// e^(r − max); NaN counts as −∞.
fn exp(r: f32, max: f32) -> f32 {
    if r.is_nan() { 0.0 } else { (r - max).exp() }
}
