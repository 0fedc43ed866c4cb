//! A whole layer for few tokens in three launches, on Hopper: the first layer of the router, then a kernel
//! that finishes the routing and streams the rows of the executed neurons, then the sum of its shares.

use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::router_select::launch_first;
use super::workspace::Layout;
use super::{Device, Neurons, RouterView};
use crate::abi::{
    MOEFY_FFN_FEW_COLUMNS, MOEFY_FFN_FEW_EXPERTS, MOEFY_FFN_FEW_STAGES, MOEFY_FFN_FEW_THREADS,
    MOEFY_FFN_FEW_TILE, moefy_ffn_few_params,
};
use crate::dtype::DType;
use crate::error::Result;

/// Tiles of tokens of the variants small to large.
const TILES: [usize; 3] = [1, 2, 4];
/// Neurons of a stage of the variants.
const NEURONS: [usize; 2] = [8, 16];
/// The most tokens.
pub(super) const MAX_TOKENS: usize = TILES[2] * MOEFY_FFN_FEW_TILE as usize;
/// Groups of 16 columns that a warp can own, times tiles.
const MAX_COLUMNS: usize = 32;
const WARPS: usize = MOEFY_FFN_FEW_THREADS as usize / 32;
/// Bytes between rows in shared memory.
const ROW_PAD: usize = 16;
/// What sorting the scores of a selection takes of the ring, while it is empty.
const SCRATCH_BYTES: usize = WARPS * MOEFY_FFN_FEW_EXPERTS as usize * 4;

/// A kernel, and how much dynamic shared memory it can have.
type Variant = (Function, usize);

pub(super) struct Kernels {
    f16: ([[Variant; 2]; 3], Function),
    bf16: ([[Variant; 2]; 3], Function),
}

/// Names of entry points by tiles and neurons.
macro_rules! names {
    ($dtype:literal) => {
        [
            names!(@ $dtype, "_1"),
            names!(@ $dtype, "_2"),
            names!(@ $dtype, "_4"),
        ]
    };
    (@ $dtype:literal, $tiles:literal) => {
        [
            concat!("moefy_ffn_few_", $dtype, $tiles, "_8"),
            concat!("moefy_ffn_few_", $dtype, $tiles, "_16"),
        ]
    };
}

impl Kernels {
    /// `None` where the device is no Hopper.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few") else { return Ok(None) };
        let load = |names: [[&'static str; 2]; 3], combine| {
            let mut variants = Vec::with_capacity(6);
            for name in names.into_iter().flatten() {
                variants.push(module.function_with_all_shared(name, max_shared_bytes)?);
            }
            let variants = std::array::from_fn(|i| std::array::from_fn(|j| variants[i * 2 + j]));
            Ok((variants, module.function(combine, 0)?))
        };
        Ok(Some(Self {
            f16: load(names!("f16"), "moefy_ffn_few_combine_f16")?,
            bf16: load(names!("bf16"), "moefy_ffn_few_combine_bf16")?,
        }))
    }

    fn of(&self, dtype: DType) -> Option<&([[Variant; 2]; 3], Function)> {
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
        let (variants, combine) = device.ffn_few.as_ref()?.of(dtype)?;
        let (d_model, num_experts, hidden) =
            (neurons.d_model(), neurons.num_experts, router.hidden());
        let tiles = num_tokens.div_ceil(MOEFY_FFN_FEW_TILE as usize).max(1);
        let size = TILES.iter().position(|&most| tiles <= most)?;
        let columns = d_model.div_ceil(16).div_ceil(WARPS);
        let fits = columns * TILES[size] <= MAX_COLUMNS
            && num_experts <= MOEFY_FFN_FEW_EXPERTS as usize
            && hidden.is_multiple_of(8);
        if !fits {
            return None;
        }
        let width = if hidden == 0 { num_experts } else { hidden };
        let round_up = |bytes: usize| bytes.next_multiple_of(128);
        let fixed = round_up(4 * num_tokens * num_experts)
            + round_up(4 * num_tokens.checked_mul(width.checked_next_multiple_of(8)?)?);
        // As many neurons a stage as fit; a GLU's take two rows of a fragment each.
        let sizes = if neurons.glu { 0..1 } else { 0..2 };
        let ring = |which: usize| {
            let (function, available) = variants[size][which];
            let rows = NEURONS[which] * (neurons.halves() + 1);
            let stage_bytes = rows * (d_model * dtype.bytes() + ROW_PAD);
            let left = available.checked_sub(fixed)?;
            let num_stages = (left / stage_bytes).min(MOEFY_FFN_FEW_STAGES as usize);
            let ring_bytes = (num_stages * stage_bytes).max(SCRATCH_BYTES);
            (num_stages > 0 && ring_bytes <= left).then_some((function, num_stages, ring_bytes))
        };
        let (stream_kernel, num_stages, ring_bytes) = sizes.rev().find_map(ring)?;

        let num_blocks = device.properties().multiprocessors;
        let mut layout = Layout::default();
        let first = layout.place(num_tokens.checked_mul(width)?, 4)?;
        let rows = num_blocks.checked_mul(num_tokens)?;
        let partials = layout.place(rows.checked_mul(d_model)?, 4)?;
        Some(Self {
            dtype,
            stream_kernel,
            combine: *combine,
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
