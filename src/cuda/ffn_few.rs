//! A whole layer for few tokens in three launches, on Hopper: the first layer of the router, then a kernel
//! that finishes the routing and streams the rows of the executed neurons, then the sum of its shares.

use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::router_select::{first_row_words, launch_first};
use super::workspace::Layout;
use super::{Device, Neurons, RouterView};
use crate::abi::{
    MOEFY_FFN_FEW_COLUMNS, MOEFY_FFN_FEW_EXPERTS, MOEFY_FFN_FEW_STAGES, MOEFY_FFN_FEW_THREADS,
    MOEFY_FFN_FEW_TILE, moefy_ffn_few_params,
};
use crate::dtype::DType;
use crate::error::Result;

/// Tiles of tokens and steps of 32 columns that a warp can own, of the variants, the better first.
const VARIANTS: [(usize, usize); 4] = [(1, 4), (1, 16), (2, 8), (4, 4)];
/// Neurons of a stage of each.
const NEURONS: [usize; 2] = [8, 16];
/// The most tokens.
pub(super) const MAX_TOKENS: usize = 4 * MOEFY_FFN_FEW_TILE as usize;
const WARPS: usize = MOEFY_FFN_FEW_THREADS as usize / 32;
/// What sorting the scores of a selection takes of the ring, while it is empty.
const SCRATCH_BYTES: usize = WARPS * MOEFY_FFN_FEW_EXPERTS as usize * 4;
/// How far the last step may read beyond the last row.
const SLACK_BYTES: usize = 64;

/// A kernel, and how much dynamic shared memory it can have.
type Variant = (Function, usize);

struct OfDType {
    stream: [[Variant; 2]; 4],
    combine: Function,
}

pub(super) struct Kernels {
    f16: OfDType,
    bf16: OfDType,
}

/// Names of entry points.
macro_rules! names {
    ($dtype:literal) => {
        [
            names!(@ $dtype, "_1_4"),
            names!(@ $dtype, "_1_16"),
            names!(@ $dtype, "_2_8"),
            names!(@ $dtype, "_4_4"),
        ]
    };
    (@ $dtype:literal, $sizes:literal) => {
        [
            concat!("moefy_ffn_few_", $dtype, $sizes, "_8"),
            concat!("moefy_ffn_few_", $dtype, $sizes, "_16"),
        ]
    };
}

impl Kernels {
    /// `None` where the device is no Hopper.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few") else { return Ok(None) };
        let load = |names: [[&'static str; 2]; 4], combine| {
            let mut variants = Vec::with_capacity(8);
            for name in names.into_iter().flatten() {
                variants.push(module.function_with_all_shared(name, max_shared_bytes)?);
            }
            let stream = std::array::from_fn(|i| std::array::from_fn(|j| variants[i * 2 + j]));
            Ok(OfDType { stream, combine: module.function(combine, 0)? })
        };
        Ok(Some(Self {
            f16: load(names!("f16"), "moefy_ffn_few_combine_f16")?,
            bf16: load(names!("bf16"), "moefy_ffn_few_combine_bf16")?,
        }))
    }

    fn of(&self, dtype: DType) -> Option<&OfDType> {
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(&self.f16),
            DType::BF16 => Some(&self.bf16),
        }
    }
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    dtype: DType,
    stream_kernel: Function,
    combine: Function,
    shared_bytes: usize,
    ring_bytes: usize,
    num_stages: usize,
    num_blocks: usize,
    combine_blocks: [usize; 2],
    first: u64,
    partials: u64,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where these sizes are not for this path, or the device is not.
    pub(super) fn new(
        device: &Device,
        neurons: &Neurons,
        router: &RouterView,
        dtype: DType,
        num_tokens: usize,
    ) -> Option<Self> {
        let kernels = device.ffn_few.as_ref()?.of(dtype)?;
        let (d_model, num_experts, hidden) =
            (neurons.d_model(), neurons.num_experts, router.hidden());
        let tiles = num_tokens.div_ceil(MOEFY_FFN_FEW_TILE as usize).max(1);
        let steps = d_model.div_ceil(32).div_ceil(WARPS);
        let size = VARIANTS.iter().position(|&(t, s)| tiles <= t && steps <= s)?;
        if num_experts > MOEFY_FFN_FEW_EXPERTS as usize || !hidden.is_multiple_of(8) {
            return None;
        }
        let width = if hidden == 0 { num_experts } else { hidden };
        let round_up = |bytes: usize| bytes.next_multiple_of(128);
        let fixed = round_up(4 * num_tokens * num_experts.next_multiple_of(32))
            + round_up(4 * num_tokens.checked_mul(first_row_words(router)?)?);
        let num_blocks = device.properties().multiprocessors;
        let row_bytes = d_model * dtype.bytes();
        // As in the kernel.
        let in_stride = (row_bytes + 63) / 128 * 128 + 64;
        let out_stride = (row_bytes + 111) / 128 * 128 + 16;
        let of_router = num_experts.checked_mul(hidden)?.checked_mul(dtype.bytes())?;
        // As many neurons a stage as fit; a GLU's take two rows of a fragment each.
        let sizes = if neurons.glu { 0..1 } else { 0..2 };
        let ring = |which: usize| {
            let (function, available) = kernels.stream[size][which];
            let stage_neurons = NEURONS[which];
            let stage_bytes = stage_neurons * (neurons.halves() * in_stride + out_stride);
            let left = available.checked_sub(fixed)?.checked_sub(SLACK_BYTES)?;
            // No more than a block has neurons for.
            let useful = (neurons.d_ff() + neurons.rank).div_ceil(num_blocks * stage_neurons);
            let most = useful.clamp(1, MOEFY_FFN_FEW_STAGES as usize);
            let num_stages = (left / stage_bytes).min(most);
            let ring_bytes = (num_stages * stage_bytes).max(SCRATCH_BYTES).max(of_router);
            let bytes = ring_bytes + SLACK_BYTES;
            (num_stages > 0 && ring_bytes <= left).then_some((function, num_stages, bytes))
        };
        let (stream_kernel, num_stages, ring_bytes) = sizes.rev().find_map(ring)?;

        let mut layout = Layout::default();
        let first = layout.place(num_tokens.checked_mul(width)?, 4)?;
        let rows = num_blocks.checked_mul(num_tokens)?;
        let partials = layout.place(rows.checked_mul(d_model)?, 4)?;
        Some(Self {
            dtype,
            stream_kernel,
            combine: kernels.combine,
            shared_bytes: fixed + ring_bytes,
            ring_bytes,
            num_stages,
            num_blocks,
            combine_blocks: [d_model.div_ceil(MOEFY_FFN_FEW_COLUMNS as usize), num_tokens],
            first,
            partials,
            bytes: layout.bytes(),
        })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, of at least one token, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        stream: RawStream,
        params: &moefy_ffn_few_params,
        workspace: u64,
    ) -> Result<()> {
        let mut params = *params;
        params.router.first = workspace + self.first;
        params.partials = workspace + self.partials;
        params.num_blocks = self.num_blocks as u32;
        params.num_stages = self.num_stages as u32;
        params.ring_bytes = self.ring_bytes as u32;
        let [across, tokens] = self.combine_blocks.map(|blocks| blocks as u32);
        // SAFETY: the caller's promise.
        unsafe {
            launch_first(device, stream, &params.router, self.dtype)?;
            let (grid, threads) = ([params.num_blocks, 1, 1], MOEFY_FFN_FEW_THREADS);
            self.stream_kernel.launch_early(stream, grid, threads, self.shared_bytes, &params)?;
            self.combine.launch_early(stream, [across, tokens, 1], 256, 0, &params)
        }
    }
}
