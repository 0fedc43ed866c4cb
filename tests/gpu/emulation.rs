//! A layer as anybody would first write it in the precision of its tensors: sums in f32 from left to
//! right, h and y rounded to the element type. A kernel may be off by no more than twice as much.

use moefy::ffn::{self, Compensation, ExpertMask, Gate};
use moefy::{DType, Tensor};
use rayon::prelude::*;

/// What f32 cannot tell apart anyway, in relative size.
const LEAST: f64 = 2e-7;

/// The most that a kernel's error may be where the emulation's is this.
pub fn bar(error_of_emulation: f64) -> f64 {
    2.0 * error_of_emulation.max(LEAST)
}

/// y of tokens x \[T, d_model\]; `gates` g \[T, E\] where they are not 1.
pub fn emulate(
    layer: &ffn::MoeFfn,
    x: &Tensor,
    mask: &ExpertMask,
    gates: Option<&[f32]>,
) -> Vec<f32> {
    let (d_model, num_experts, dtype) = (layer.d_model(), layer.num_experts(), x.dtype());
    let parts = Parts::new(layer, dtype);
    let x = x.to_f32();
    let rows = x.par_chunks_exact(d_model).enumerate();
    let of_token = |(token, x): (usize, &[f32])| {
        let gates = gates.map(|gates| &gates[token * num_experts..(token + 1) * num_experts]);
        parts.token(layer, x, mask.experts(token), gates)
    };
    let y: Vec<f32> = rows.flat_map_iter(of_token).collect();
    round(&y, dtype)
}

/// g of scores, in f32.
pub fn gates(gate: Gate, scores: &[f32], mask: &ExpertMask) -> Option<Vec<f32>> {
    let num_experts = mask.num_experts();
    let softmax = |(token, scores): (usize, &[f32])| {
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f32 = match gate {
            Gate::Softmax => weights.iter().sum(),
            _ => mask.experts(token).map(|expert| weights[expert]).sum(),
        };
        weights.into_iter().map(move |weight| weight / sum).collect::<Vec<_>>()
    };
    match gate {
        Gate::One => None,
        Gate::Score => Some(scores.to_vec()),
        _ => Some(scores.chunks_exact(num_experts).enumerate().flat_map(softmax).collect()),
    }
}

/// The tensors, widened.
struct Parts {
    dtype: DType,
    w_in: Vec<f32>,
    b_in: Option<Vec<f32>>,
    w_out: Vec<f32>,
    /// With the constants of a compensation.
    b_out: Vec<f32>,
    mean: Option<Vec<f32>>,
    /// V and Uᵀ.
    linear: Option<[Vec<f32>; 2]>,
}

impl Parts {
    fn new(layer: &ffn::MoeFfn, dtype: DType) -> Self {
        let neurons = layer.neurons();
        let (d_model, w_out) = (layer.d_model(), neurons.w_out().to_f32().into_owned());
        let mut b_out = neurons.b_out().map_or(vec![0.0; d_model], |b| b.to_f32().into_owned());
        let (mut mean, mut linear) = (None, None);
        match layer.compensation() {
            Some(Compensation::Mean { mean: of_layer }) => {
                let of_layer = of_layer.to_f32().into_owned();
                for (mean, row) in of_layer.iter().zip(w_out.chunks_exact(d_model)) {
                    b_out.iter_mut().zip(row).for_each(|(b, w)| *b += mean * w);
                }
                mean = Some(of_layer);
            }
            Some(Compensation::Linear { u, v, c }) => {
                b_out.iter_mut().zip(c.to_f32().iter()).for_each(|(b, c)| *b += c);
                // Of the weights' type, as on the device.
                linear = Some([v, u].map(|m| m.to_dtype(dtype).to_f32().into_owned()));
            }
            None => {}
        }
        Self {
            dtype,
            w_in: neurons.w_in().to_f32().into_owned(),
            b_in: neurons.b_in().map(|b| b.to_f32().into_owned()),
            w_out,
            b_out,
            mean,
            linear,
        }
    }

    fn token(
        &self,
        layer: &ffn::MoeFfn,
        x: &[f32],
        experts: impl Iterator<Item = usize>,
        gates: Option<&[f32]>,
    ) -> Vec<f32> {
        let (width, d_model) = (layer.expert_width(), x.len());
        let mut y = vec![0.0f32; d_model];
        let mut add = |h: f32, row: &[f32]| {
            let h = round(&[h], self.dtype)[0];
            y.iter_mut().zip(row).for_each(|(y, w)| *y += h * w);
        };
        for expert in experts {
            let gate = gates.map_or(1.0, |gates| gates[expert]);
            for n in expert * width..(expert + 1) * width {
                add(gate * self.neuron(layer, n, x), row(&self.w_out, n, d_model));
            }
        }
        for n in layer.num_experts() * width..layer.d_ff() {
            add(self.neuron(layer, n, x), row(&self.w_out, n, d_model));
        }
        if let Some([v, u]) = &self.linear {
            for (v, u) in v.chunks_exact(d_model).zip(u.chunks_exact(d_model)) {
                add(dot(v, x), u);
            }
        }
        y.iter_mut().zip(&self.b_out).for_each(|(y, b)| *y += b);
        y
    }

    /// φ above the mean.
    fn neuron(&self, layer: &ffn::MoeFfn, n: usize, x: &[f32]) -> f32 {
        let pre = |r: usize| {
            dot(row(&self.w_in, r, x.len()), x) + self.b_in.as_ref().map_or(0.0, |b| b[r])
        };
        let neurons = layer.neurons();
        let mut h = neurons.activation().apply(f64::from(pre(n))) as f32;
        if neurons.is_glu() {
            h *= pre(layer.d_ff() + n);
        }
        h - self.mean.as_ref().map_or(0.0, |mean| mean[n])
    }
}

fn row(matrix: &[f32], index: usize, width: usize) -> &[f32] {
    &matrix[index * width..(index + 1) * width]
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn round(values: &[f32], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::F32 => values.to_vec(),
        DType::F16 => values.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect(),
        DType::BF16 => values.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect(),
    }
}
