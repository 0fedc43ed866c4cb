//! The last launch of a layer for few tokens: the sum of partial outputs.

use super::driver::RawStream;
use super::kernels::{Modules, PerDType};
use crate::abi::{MOEFY_ADD_SHARES_COLUMNS, moefy_add_shares_params};
use crate::dtype::DType;
use crate::error::Result;

const THREADS: u32 = 256;

pub(super) struct Kernels {
    add_shares: PerDType,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let names = ["moefy_add_shares_f32", "moefy_add_shares_f16", "moefy_add_shares_bf16"];
        Ok(Self { add_shares: modules.per_dtype("add_shares", names, 0)? })
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
        let across = params.d_model.div_ceil(u64::from(MOEFY_ADD_SHARES_COLUMNS)) as u32;
        let grid = [across, params.num_tokens, 1];
        // SAFETY: the caller's promise.
        unsafe { self.add_shares.get(dtype).launch(stream, grid, THREADS, 0, params) }
    }
}
