//! Normalisation of every token, with what is added before.

use super::{Arguments, PerDType, View};
use crate::abi::moefy_norm_params;
use crate::cuda::Device;
use crate::cuda::driver::RawStream;
use crate::cuda::kernels::Modules;
use crate::error::Result;

const THREADS: u32 = 256;
/// Elements that a warp, and a block, keep in registers.
const WIDTHS: [usize; 2] = [1024, 8192];

pub(super) struct Kernels {
    /// A warp a token, and a block.
    norm: [PerDType; 2],
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let warp = ["moefy_norm_f32_1", "moefy_norm_f16_1", "moefy_norm_bf16_1"];
        let block = ["moefy_norm_f32_8", "moefy_norm_f16_8", "moefy_norm_bf16_8"];
        let load = |names| modules.per_dtype("norm", names, 0);
        Ok(Self { norm: [load(warp)?, load(block)?] })
    }
}

/// What [`norm`] reads.
#[derive(Clone, Copy, Debug)]
pub struct NormInputs {
    /// Is added first, \[num_tokens, d_model\].
    pub branch: Option<View>,
    /// \[1, d_model\].
    pub weight: View,
    /// \[1, d_model\].
    pub bias: Option<View>,
    /// Added to the variance.
    pub epsilon: f32,
    /// RMS norm: without a mean.
    pub is_rms: bool,
}

/// `r = x + branch; x = (r − mean r) / √(var r + ε) ⊙ weight + bias` of every token, x \[num_tokens,
/// d_model\], d_model a multiple of 8 up to 8192; an RMS norm has no mean. `residual`, where it is asked for,
/// becomes r. Arithmetic is f32: what [`reference::layer_norm`](crate::reference::layer_norm) gives.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](crate::cuda::select).
pub unsafe fn norm(
    device: &Device,
    stream: RawStream,
    x: View,
    residual: Option<View>,
    inputs: &NormInputs,
) -> Result<()> {
    let check = Arguments { device, op: "norm" };
    let dtype = check.float("x", x)?;
    let [num_tokens, d_model] = x.shape;
    let optional = |name, view: Option<View>, shape| {
        view.map_or(Ok(0), |view| check.rows(name, view, dtype, shape))
    };
    let params = moefy_norm_params {
        x: check.rows("x", x, dtype, x.shape)?,
        branch: optional("branch", inputs.branch, x.shape)?,
        residual: optional("residual", residual, x.shape)?,
        weight: check.rows("weight", inputs.weight, dtype, [1, d_model])?,
        bias: optional("bias", inputs.bias, [1, d_model])?,
        num_tokens: check.size("num_tokens", num_tokens)?,
        d_model: check.width("d_model", d_model, WIDTHS[1])?,
        epsilon: inputs.epsilon,
        is_rms: inputs.is_rms.into(),
    };
    if num_tokens == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let by_block = usize::from(d_model > WIDTHS[0]);
    let tokens = if by_block == 1 { 1 } else { THREADS / 32 };
    let grid = [params.num_tokens.div_ceil(tokens), 1, 1];
    let kernel = device.body.norm.norm[by_block].get(dtype);
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { kernel.launch(stream, grid, THREADS, 0, &params) }
}
