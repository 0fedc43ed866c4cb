//! Scores and selection of a router in one launch of one cluster, for few tokens on Hopper.

use super::Device;
use super::driver::{Function, RawStream};
use super::ffn_few::in_row_stride;
use super::kernels::Modules;
use super::router_select::MAX_FEW_EXPERTS;
use super::select::selection_words;
use super::view::View;
use crate::abi::{
    MOEFY_FFN_FEW_THREADS, MOEFY_FFN_FEW_TILE, MOEFY_ROUTER_SELECT_BLOCKS,
    moefy_router_select_params,
};
use crate::dtype::DType;
use crate::error::Result;

/// Most tokens (with more, two launches are faster); of the variants, steps of 32 columns of d_model that a warp can
/// own; rows of the first layer that a block can have, and most shared memory.
const CLUSTER_TOKENS: usize = MOEFY_FFN_FEW_TILE as usize;
const CLUSTER_STEPS: [usize; 2] = [4, 16];
const MAX_CLUSTER_ROWS: usize = 16;
const MAX_CLUSTER_SHARED_BYTES: usize = 208 << 10;

/// Of f16, then of bf16: by the steps, for one token and for several.
pub(super) struct Kernels([[[Function; 2]; 2]; 2]);

impl Kernels {
    /// `None` where the device is no Hopper, or has no room for a cluster.
    pub(super) fn load(modules: &Modules) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_router_select") else { return Ok(None) };
        let mut kernels = Vec::with_capacity(8);
        for name in [
            "moefy_router_select_f16_4_1",
            "moefy_router_select_f16_4_8",
            "moefy_router_select_f16_16_1",
            "moefy_router_select_f16_16_8",
            "moefy_router_select_bf16_4_1",
            "moefy_router_select_bf16_4_8",
            "moefy_router_select_bf16_16_1",
            "moefy_router_select_bf16_16_8",
        ] {
            let (shared, blocks) = (MAX_CLUSTER_SHARED_BYTES, MOEFY_ROUTER_SELECT_BLOCKS);
            let kernel =
                module.function_of_large_clusters(name, shared, blocks, MOEFY_FFN_FEW_THREADS)?;
            let Some(kernel) = kernel else { return Ok(None) };
            kernels.push(kernel);
        }
        Ok(Some(Self(std::array::from_fn(|dtype| {
            std::array::from_fn(|steps| {
                std::array::from_fn(|tokens| kernels[4 * dtype + 2 * steps + tokens])
            })
        }))))
    }
}

/// A kernel with its sizes.
#[derive(Clone, Copy)]
pub(super) struct Launch {
    kernel: Function,
    shared_bytes: usize,
}

impl Launch {
    /// # Safety
    /// The addresses must lead to what the parameters say, of at least one token, and the context must be
    /// bound.
    pub(super) unsafe fn run(
        &self,
        stream: RawStream,
        params: &moefy_router_select_params,
    ) -> Result<()> {
        let (grid, threads) = ([MOEFY_ROUTER_SELECT_BLOCKS, 1, 1], MOEFY_FFN_FEW_THREADS);
        // SAFETY: the caller's promise.
        unsafe { self.kernel.launch(stream, grid, threads, self.shared_bytes, params) }
    }
}

/// Hopper's kernel, where the device has it and it does these sizes.
pub(super) fn launch_of(
    device: &Device,
    x: View,
    params: &moefy_router_select_params,
    dtype: DType,
) -> Option<Launch> {
    let Kernels([f16, bf16]) = device.router_few.as_ref()?;
    let kernels = match dtype {
        DType::F32 => return None,
        DType::F16 => f16,
        DType::BF16 => bf16,
    };
    let [num_tokens, d_model] = x.shape;
    let [hidden, num_experts] = [params.hidden, params.num_experts].map(|n| n as usize);
    let steps = d_model.div_ceil(32).div_ceil(MOEFY_FFN_FEW_THREADS as usize / 32);
    let which = CLUSTER_STEPS.iter().position(|&most| steps <= most)?;
    let fits = params.w2 != 0 && x.row_stride == d_model && num_experts <= MAX_FEW_EXPERTS;
    let words = num_experts.next_multiple_of(32) + selection_words(&params.selection, num_experts);
    let shared_bytes =
        cluster_router_bytes(d_model, hidden, num_experts, num_tokens, dtype)? + 4 * words;
    (fits && shared_bytes <= MAX_CLUSTER_SHARED_BYTES)
        .then_some(Launch { kernel: kernels[which][usize::from(num_tokens > 1)], shared_bytes })
}

/// Shared memory of a router in a block of a cluster, `None` where it is not for one. `hidden` is 0 for one layer.
pub(super) fn cluster_router_bytes(
    d_model: usize,
    hidden: usize,
    num_experts: usize,
    num_tokens: usize,
    dtype: DType,
) -> Option<usize> {
    // As in the kernels: blocks own rows and experts by fours.
    let of_block = |all: usize| all.div_ceil(4 * MOEFY_ROUTER_SELECT_BLOCKS as usize) * 4;
    let width = if hidden == 0 { num_experts } else { hidden };
    let fits = d_model.is_multiple_of(8)
        && hidden.is_multiple_of(8)
        && of_block(width) <= MAX_CLUSTER_ROWS
        && num_tokens <= CLUSTER_TOKENS;
    fits.then_some(
        of_block(width).next_multiple_of(8) * in_row_stride(d_model * dtype.bytes())
            + of_block(num_experts) * hidden * dtype.bytes()
            + 4 * num_tokens * (width.next_multiple_of(4) + 4),
    )
}
