//! Rotary positions.

use super::{Arguments, PerDType, View};
use crate::abi::moefy_rotary_params;
use crate::cuda::driver::RawStream;
use crate::cuda::kernels::Modules;
use crate::cuda::{Device, Format};
use crate::error::Result;

const THREADS: u64 = 256;

pub(super) fn load(modules: &Modules) -> Result<PerDType> {
    modules.per_dtype("rotary", ["moefy_rotary_f32", "moefy_rotary_f16", "moefy_rotary_bf16"], 0)
}

/// Turns elements i and i + d_head/2 of every head of x \[num_tokens, num_heads · d_head\] by the angle
/// `position · base^(−2i/d_head)` (RoFormer, arXiv 2104.09864 §3.2.2, with the halves of a head paired as Llama
/// does), in place. `position_ids` is u32 \[1, num_tokens\].
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](crate::cuda::select).
pub unsafe fn rotary(
    device: &Device,
    stream: RawStream,
    x: View,
    position_ids: View,
    num_heads: usize,
    base: f32,
) -> Result<()> {
    let check = Arguments { device, op: "rotary" };
    let dtype = check.float("x", x)?;
    let [num_tokens, width] = x.shape;
    if num_heads == 0 || !width.is_multiple_of(2 * num_heads) {
        let expected = format!("such that each has an even share of the width, {width}");
        return Err(check.error("num_heads", expected, num_heads));
    }
    if base.is_nan() || base <= 1.0 || base.is_infinite() {
        return Err(check.error("base", "above 1", base));
    }
    let float = Format::Float(dtype);
    let params = moefy_rotary_params {
        x: check.strided("x", x, float, x.shape, float.bytes())?,
        position_ids: check.dense("position_ids", position_ids, Format::Word, [1, num_tokens])?,
        stride: x.row_stride as u64,
        num_tokens: check.size("num_tokens", num_tokens)?,
        num_heads: check.size("num_heads", num_heads)?,
        d_head: check.size("d_head", width / num_heads)?,
        log2_base: f64::from(base).log2(),
        reserved: 0,
    };
    if num_tokens == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let blocks = (num_tokens as u64 * width as u64 / 2).div_ceil(THREADS);
    let grid = [check.size("num_tokens", blocks as usize)?, 1, 1];
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { device.body.rotary.get(dtype).launch(stream, grid, THREADS as u32, 0, &params) }
}
