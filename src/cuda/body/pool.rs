//! Sentence embeddings from hidden states.

use super::{Arguments, PerDType, View};
use crate::abi::moefy_pool_params;
use crate::cuda::driver::RawStream;
use crate::cuda::kernels::Modules;
use crate::cuda::{Device, Format};
use crate::error::Result;

const THREADS: u32 = 256;
/// A mean lies in shared memory.
const MAX_WIDTH: usize = 8192;

pub(super) fn load(modules: &Modules) -> Result<PerDType> {
    modules.per_dtype(
        "pool",
        ["moefy_pool_f32", "moefy_pool_f16", "moefy_pool_bf16"],
        4 * MAX_WIDTH,
    )
}

/// `y[s]` = the mean of the rows of x \[num_tokens, d_model\] from `sequence_offsets[s]` to
/// `sequence_offsets[s + 1]`, scaled to unit length, y \[num_sequences, d_model\]; zeros for an empty
/// sequence. What [`reference::pool`](crate::reference::pool) gives, in f32.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](crate::cuda::select); the offsets must not decrease, nor end beyond the tokens.
pub unsafe fn pool(
    device: &Device,
    stream: RawStream,
    y: View,
    x: View,
    sequence_offsets: View,
) -> Result<()> {
    let check = Arguments { device, op: "pool" };
    let dtype = check.float("x", x)?;
    let [num_sequences, d_model] = y.shape;
    let offsets = [1, num_sequences + 1];
    let params = moefy_pool_params {
        x: check.rows("x", x, dtype, [x.shape[0], d_model])?,
        sequence_offsets: check.dense(
            "sequence_offsets",
            sequence_offsets,
            Format::Word,
            offsets,
        )?,
        y: check.rows("y", y, dtype, y.shape)?,
        num_sequences: check.size("num_sequences", num_sequences)?,
        d_model: check.width("d_model", d_model, MAX_WIDTH)?,
    };
    if num_sequences == 0 {
        return Ok(());
    }
    device.context.bind()?;
    let (grid, shared_bytes) = ([params.num_sequences, 1, 1], 4 * d_model);
    let kernel = device.body.pool.get(dtype);
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe { kernel.launch(stream, grid, THREADS, shared_bytes, &params) }
}
