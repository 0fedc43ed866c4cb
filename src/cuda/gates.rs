//! Gates from scores.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::select::check_num_experts;
use super::view::{Arguments, Format, View};
use crate::abi::moefy_gates_params;
use crate::error::Result;

pub(super) struct Kernels {
    gates: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self { gates: modules.function("gates", "moefy_gates", 0)? })
    }
}

/// g f32 \[num_tokens, E\] = softmax of the scores over all experts, or where `renormalise` over the
/// selected ones alone: [`Gate::Softmax`](crate::ffn::Gate::Softmax) and
/// [`Gate::Renormalised`](crate::ffn::Gate::Renormalised). Gates of experts that are not selected mean
/// nothing. `gates` may be `scores`.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](super::select).
pub unsafe fn gates(
    device: &Device,
    stream: RawStream,
    gates: View,
    scores: View,
    mask: View,
    renormalise: bool,
) -> Result<()> {
    let check = Arguments { device, op: "gates" };
    let [num_tokens, num_experts] = scores.shape;
    let row_words = check_num_experts(&check, num_experts)?;
    let params = moefy_gates_params {
        scores: check.dense("scores", scores, Format::F32, scores.shape)?,
        mask: check.dense("mask", mask, Format::Word, [num_tokens, row_words])?,
        gates: check.dense("gates", gates, Format::F32, scores.shape)?,
        num_tokens: check.size("num_tokens", num_tokens)?,
        num_experts: num_experts as u32,
        renormalise: renormalise.into(),
        reserved: 0,
    };
    if num_tokens == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let grid = [params.num_tokens.div_ceil(8), 1, 1];
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { device.gates.gates.launch(stream, grid, 256, 0, &params) }
}
