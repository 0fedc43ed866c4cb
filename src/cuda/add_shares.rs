//! The last launch of a layer for few tokens: the sum of partial outputs.

use super::driver::RawStream;
use super::kernels::{Modules, PerDType};
use crate::abi::{moefy_add_shares_params, moefy_experts_params};
use crate::dtype::DType;
use crate::error::Result;

const THREADS: u32 = 256;
/// Columns of y of a block: narrow, and wide where there would be too many blocks.
const COLUMNS: [u64; 2] = [32, 64];
/// Of narrow blocks: on an H100 192 were faster than half as many wide ones, 256 and more slower (kernels/NOTES.md).
const MOST_BLOCKS: u64 = 198;

pub(super) struct Kernels {
    of_columns: [PerDType; 2],
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let load = |names| modules.per_dtype("add_shares", names, 0);
        Ok(Self {
            of_columns: [
                load([
                    "moefy_add_shares_f32_32",
                    "moefy_add_shares_f16_32",
                    "moefy_add_shares_bf16_32",
                ])?,
                load([
                    "moefy_add_shares_f32_64",
                    "moefy_add_shares_f16_64",
                    "moefy_add_shares_bf16_64",
                ])?,
            ],
        })
    }

    /// y = b_out + Σ shares, in a fixed order.
    ///
    /// # Safety
    /// The addresses must be what the kernel expects, for at least one token, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        stream: RawStream,
        dtype: DType,
        params: &moefy_add_shares_params,
    ) -> Result<()> {
        let across = COLUMNS.map(|columns| params.d_model.div_ceil(columns));
        let which = usize::from(across[0] * u64::from(params.num_tokens) > MOST_BLOCKS);
        let grid = [across[which] as u32, params.num_tokens, 1];
        // SAFETY: the caller's promise.
        unsafe { self.of_columns[which].get(dtype).launch(stream, grid, THREADS, 0, params) }
    }
}

/// The sum that follows kernels of [`experts`](super::experts) which left so many partial outputs of every token.
pub(super) fn of_experts(
    params: &moefy_experts_params,
    num_shares: usize,
) -> moefy_add_shares_params {
    moefy_add_shares_params {
        shares: params.partials,
        b_out: params.neurons.b_out,
        num_valid_tokens: params.num_valid_tokens,
        y: params.y,
        num_shares: num_shares as u32,
        num_tokens: params.num_tokens,
        d_model: params.neurons.d_model,
    }
}
