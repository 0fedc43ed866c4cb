//! A layer's neurons on a device.

use super::view::{Arguments, Format, View};
use crate::abi::{moefy_activation, moefy_neurons};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::Activation;

/// The neurons of a layer in expert order: the routed ones, `num_experts` times `expert_width`, then
/// `shared` ones that every token runs, d_ff in all. After them may come `rank` linear neurons, whose
/// activation is the plain product: they stand for a compensation U (V x).
#[derive(Clone, Copy, Debug)]
pub struct Neurons {
    /// \[G · d_ff + rank, d_model\], G = 2 for a GLU: gate rows, then up rows, then V.
    pub w_in: View,
    /// \[d_ff + rank, d_model\]: W2ᵀ, then Uᵀ.
    pub w_out: View,
    /// f32 \[1, G · d_ff\].
    pub b_in: Option<View>,
    /// f32 \[1, d_model\]: b2, with whatever constant a compensation adds.
    pub b_out: Option<View>,
    /// f32 \[1, d_ff\]: subtracted from every activation.
    pub mean: Option<View>,
    /// E.
    pub num_experts: usize,
    /// s.
    pub expert_width: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Linear neurons.
    pub rank: usize,
    /// Whether this is a gated FFN.
    pub glu: bool,
    /// φ.
    pub activation: Activation,
}

impl Neurons {
    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.w_in.shape[1]
    }

    /// Neurons that have an activation.
    pub fn d_ff(&self) -> usize {
        self.num_experts.saturating_mul(self.expert_width).saturating_add(self.shared)
    }

    /// Rows of `w_in` per neuron: 2 for a GLU.
    pub(super) fn halves(&self) -> usize {
        if self.glu { 2 } else { 1 }
    }

    /// Checks everything and gives what the kernels take, and the element type.
    pub(super) fn check(&self, check: &Arguments<'_>) -> Result<(moefy_neurons, DType)> {
        let Format::Float(dtype) = self.w_in.format else {
            return Err(check.error("w_in", "floating point", self.w_in.format));
        };
        let (d_model, d_ff) = (self.d_model(), self.d_ff());
        if d_model == 0 || !d_model.is_multiple_of(8) {
            return Err(check.error("d_model", "a positive multiple of 8", d_model));
        }
        if self.expert_width == 0 {
            return Err(check.error("expert_width", "at least 1", 0));
        }
        let inputs = d_ff.saturating_mul(self.halves()).saturating_add(self.rank);
        check.size("rows of w_in", inputs)?;
        let matrix = |name, view: View, rows| {
            check.dense(name, view, self.w_in.format, [rows, d_model])?;
            check.address(name, view.address, 16)
        };
        let vector = |name, view: Option<View>, len| {
            view.map_or(Ok(0), |view| check.dense(name, view, Format::F32, [1, len]))
        };
        let params = moefy_neurons {
            w_in: matrix("w_in", self.w_in, inputs)?,
            w_out: matrix("w_out", self.w_out, d_ff + self.rank)?,
            b_in: vector("b_in", self.b_in, d_ff * self.halves())?,
            b_out: vector("b_out", self.b_out, d_model)?,
            mean: vector("mean", self.mean, d_ff)?,
            d_model: d_model as u64,
            d_ff: d_ff as u32,
            num_experts: self.num_experts as u32,
            expert_width: self.expert_width as u32,
            shared: self.shared as u32,
            rank: self.rank as u32,
            glu: self.glu.into(),
            activation: match self.activation {
                Activation::Relu => moefy_activation::MOEFY_RELU,
                Activation::Gelu => moefy_activation::MOEFY_GELU,
                Activation::GeluTanh => moefy_activation::MOEFY_GELU_TANH,
                Activation::Silu => moefy_activation::MOEFY_SILU,
                Activation::Identity => moefy_activation::MOEFY_IDENTITY,
            },
            reserved: 0,
        };
        Ok((params, dtype))
    }
}
