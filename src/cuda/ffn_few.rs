//! A whole layer for few tokens in three launches, on Hopper: the first layer of the router, then a kernel
//! that finishes the routing and streams the rows of the executed neurons, then the sum of its shares.
//!
//! The second layer of a router of f16 is kept a second time as two matrices of bf16: 4 · E · hidden bytes.

use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::workspace::Layout;
use super::{Device, Neurons, RouterView};
use crate::abi::{
    MOEFY_FFN_FEW_EXPERTS, MOEFY_FFN_FEW_ROUTER_ROWS, MOEFY_FFN_FEW_STAGES, MOEFY_FFN_FEW_THREADS,
    MOEFY_FFN_FEW_TILE, moefy_add_shares_params, moefy_ffn_few_params,
};
use crate::dtype::DType;
use crate::error::Result;

/// Tiles of tokens and steps of 32 columns that a warp can own, of the variants, the better first.
const VARIANTS: [(usize, usize); 4] = [(1, 4), (1, 16), (2, 8), (4, 4)];
/// Neurons of a stage, the better first: index of the kernel that multiplies 8 or 16 at once, and how many.
const STAGES: [(usize, usize); 3] = [(1, 16), (0, 8), (0, 4)];
/// The most tokens.
pub(super) const MAX_TOKENS: usize = 4 * MOEFY_FFN_FEW_TILE as usize;
const WARPS: usize = MOEFY_FFN_FEW_THREADS as usize / 32;
/// What sorting the scores of a selection takes of the ring, while it is empty.
const SCRATCH_BYTES: usize = WARPS * MOEFY_FFN_FEW_EXPERTS as usize * 4;
/// How far the last step may read beyond the last row.
const SLACK_BYTES: usize = 64;
/// More than its rows of the widest token take.
const MAX_ROUTER_SHARED_BYTES: usize = 96 << 10;
/// Indices of neurons are exact in the kernel's arithmetic below this.
const MAX_NEURONS: usize = 1 << 21;

/// A kernel, and how much dynamic shared memory it can have.
type Variant = (Function, usize);

struct OfDType {
    router: [Function; 4],
    stream: [[Variant; 2]; 4],
}

pub(super) struct Kernels {
    f16: OfDType,
    bf16: OfDType,
}

/// Names of entry points: of the first launch, and of the second by the neurons of a stage.
type Names = ([&'static str; 4], [[&'static str; 2]; 4]);

macro_rules! names {
    ($dtype:literal) => {
        (
            [
                concat!("moefy_ffn_few_router_", $dtype, "_1_4"),
                concat!("moefy_ffn_few_router_", $dtype, "_1_16"),
                concat!("moefy_ffn_few_router_", $dtype, "_2_8"),
                concat!("moefy_ffn_few_router_", $dtype, "_4_4"),
            ],
            [
                names!(@ $dtype, "_1_4"),
                names!(@ $dtype, "_1_16"),
                names!(@ $dtype, "_2_8"),
                names!(@ $dtype, "_4_4"),
            ],
        )
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
        let load = |(router, stream): Names| {
            let mut variants = Vec::with_capacity(8);
            for name in stream.into_iter().flatten() {
                variants.push(module.function_with_all_shared(name, max_shared_bytes)?);
            }
            let mut routers = Vec::with_capacity(4);
            for name in router {
                let shared = MAX_ROUTER_SHARED_BYTES;
                routers.push(modules.function("sm90_ffn_few_router", name, shared)?);
            }
            Ok(OfDType {
                router: std::array::from_fn(|i| routers[i]),
                stream: std::array::from_fn(|i| std::array::from_fn(|j| variants[i * 2 + j])),
            })
        };
        Ok(Some(Self { f16: load(names!("f16"))?, bf16: load(names!("bf16"))? }))
    }

    fn of(&self, dtype: DType) -> Option<&OfDType> {
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(&self.f16),
            DType::BF16 => Some(&self.bf16),
        }
    }
}

/// Which of the variants does these sizes.
fn variant(num_tokens: usize, d_model: usize) -> Option<usize> {
    let tiles = num_tokens.div_ceil(MOEFY_FFN_FEW_TILE as usize);
    let steps = d_model.div_ceil(32).div_ceil(WARPS);
    VARIANTS.iter().position(|&(t, s)| tiles <= t && steps <= s)
}

/// Bytes from one row of w_in to the next in shared memory, as in the kernels.
pub(super) fn in_row_stride(row_bytes: usize) -> usize {
    (row_bytes + 63) / 128 * 128 + 64
}

/// The first layer of a router.
#[derive(Clone, Copy)]
pub(super) struct FirstLayer {
    kernel: Function,
    blocks: [u32; 2],
    shared_bytes: usize,
}

impl FirstLayer {
    /// `None` where these sizes are not for this kernel, or the device is not. `width` is the number of
    /// its outputs; d_model is a multiple of 8.
    pub(super) fn new(
        device: &Device,
        dtype: DType,
        num_tokens: usize,
        d_model: usize,
        width: usize,
    ) -> Option<Self> {
        let kernels = device.ffn_few.as_ref()?.of(dtype)?;
        let rows = MOEFY_FFN_FEW_ROUTER_ROWS as usize;
        // The widest variant that there are tokens for.
        let tile = MOEFY_FFN_FEW_TILE as usize;
        let most = (0..3).rev().map(|power| tile << power).find(|&tokens| {
            (tokens < 2 * num_tokens || tokens == tile) && variant(tokens, d_model).is_some()
        })?;
        Some(Self {
            kernel: kernels.router[variant(most, d_model)?],
            blocks: [width.div_ceil(rows) as u32, num_tokens.div_ceil(most) as u32],
            shared_bytes: rows * in_row_stride(d_model * dtype.bytes()),
        })
    }

    /// Of `params` reads `router`, and of `w2` whether there is one: then the outputs are parts.
    ///
    /// # Safety
    /// As for [`Shape::launch`].
    pub(super) unsafe fn launch(
        &self,
        stream: RawStream,
        params: &moefy_ffn_few_params,
    ) -> Result<()> {
        let [across, down] = self.blocks;
        let (grid, threads) = ([across, down, 1], MOEFY_FFN_FEW_THREADS);
        // SAFETY: the caller's promise.
        unsafe { self.kernel.launch(stream, grid, threads, self.shared_bytes, params) }
    }
}

/// Matrices of bf16 that the second layer of a router takes.
pub(super) fn num_w2(dtype: DType) -> usize {
    if dtype == DType::F16 { 2 } else { 1 }
}

/// A matrix of bf16 whose parts add up to one of f16, [2, rows, columns]: the second layer of a router
/// as the kernels multiply it.
pub(super) fn parts_of_f16(matrix: &[half::f16]) -> Vec<half::bf16> {
    let high = matrix.iter().map(|&v| half::bf16::from_f32(v.to_f32()));
    let low = matrix.iter().map(|&v| {
        let high = half::bf16::from_f32(v.to_f32());
        half::bf16::from_f32(v.to_f32() - high.to_f32())
    });
    high.chain(low).collect()
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    first_layer: FirstLayer,
    stream_kernel: Function,
    dtype: DType,
    shared_bytes: usize,
    stage_neurons: usize,
    num_stages: usize,
    num_blocks: usize,
    first: u64,
    partials: u64,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where these sizes are not for this path, or the device is not. `sorts`: whether the
    /// selection does.
    pub(super) fn new(
        device: &Device,
        neurons: &Neurons,
        router: &RouterView,
        sorts: bool,
        dtype: DType,
        num_tokens: usize,
    ) -> Option<Self> {
        let kernels = device.ffn_few.as_ref()?.of(dtype)?;
        let (d_model, num_experts, hidden) =
            (neurons.d_model(), neurons.num_experts, router.hidden());
        let size = variant(num_tokens, d_model)?;
        let neurons_in_all = neurons.d_ff() + neurons.rank;
        let fits = num_experts <= MOEFY_FFN_FEW_EXPERTS as usize
            && hidden.is_multiple_of(8)
            && neurons_in_all < MAX_NEURONS;
        if !fits {
            return None;
        }
        let width = if hidden == 0 { num_experts } else { hidden };
        let first_layer = FirstLayer::new(device, dtype, num_tokens, d_model, width)?;
        let round_up = |bytes: usize| bytes.next_multiple_of(128);
        let parts = 3 * num_tokens;
        let of_parts =
            if hidden == 0 { 0 } else { parts.checked_mul(in_row_stride(2 * hidden))? };
        let fixed =
            round_up(4 * num_tokens * num_experts.next_multiple_of(32)) + round_up(of_parts);
        let num_blocks = device.properties().multiprocessors;
        let row_bytes = d_model * dtype.bytes();
        // As in the kernel.
        let out_stride = (row_bytes + 111) / 128 * 128 + 16;
        let w2_bytes =
            num_w2(dtype).checked_mul(num_experts.checked_mul(hidden)?)?.checked_mul(2)?;
        let products = 4 * num_experts.next_multiple_of(16) * parts.next_multiple_of(8);
        let of_router = round_up(w2_bytes) + if hidden == 0 { 0 } else { products };
        let scratch = if sorts { SCRATCH_BYTES } else { 0 };
        let least_bytes = of_router.max(scratch);
        // As many neurons a stage as leave two stages; a GLU's take two rows of a fragment each.
        let sizes = if neurons.glu { &STAGES[1..] } else { &STAGES[..] };
        let ring = |&(which, stage_neurons): &(usize, usize), enough: usize| {
            let (function, available) = kernels.stream[size][which];
            let in_bytes = neurons.halves() * in_row_stride(row_bytes);
            let stage_bytes = stage_neurons * (in_bytes + out_stride);
            let left = available.checked_sub(fixed)?.checked_sub(SLACK_BYTES)?;
            // No more than a block has neurons for.
            let useful = neurons_in_all.div_ceil(num_blocks * stage_neurons);
            let most = useful.clamp(1, MOEFY_FFN_FEW_STAGES as usize);
            let num_stages = (left / stage_bytes).min(most);
            let ring_bytes = (num_stages * stage_bytes).max(least_bytes);
            let fits = num_stages >= enough.min(useful) && ring_bytes <= left;
            fits.then_some((function, stage_neurons, num_stages, ring_bytes + SLACK_BYTES))
        };
        let find = |enough| sizes.iter().find_map(|stage| ring(stage, enough));
        let (stream_kernel, stage_neurons, num_stages, ring_bytes) = find(2).or_else(|| find(1))?;

        let mut layout = Layout::default();
        let first =
            layout.place(if hidden == 0 { 4 * num_tokens * num_experts } else { of_parts }, 1)?;
        let rows = num_blocks.checked_mul(num_tokens)?;
        let partials = layout.place(rows.checked_mul(d_model)?, 4)?;
        Some(Self {
            first_layer,
            stream_kernel,
            dtype,
            shared_bytes: fixed + ring_bytes,
            stage_neurons,
            num_stages,
            num_blocks,
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
        params.stage_neurons = self.stage_neurons as u32;
        let shares = moefy_add_shares_params {
            shares: params.partials,
            b_out: params.neurons.b_out,
            num_valid_tokens: params.router.num_valid_tokens,
            y: params.y,
            num_shares: params.num_blocks,
            num_tokens: params.router.num_tokens,
            d_model: params.neurons.d_model,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if params.is_routed == 0 {
                self.first_layer.launch(stream, &params)?;
            }
            let (grid, threads) = ([params.num_blocks, 1, 1], MOEFY_FFN_FEW_THREADS);
            self.stream_kernel.launch(stream, grid, threads, self.shared_bytes, &params)?;
            device.add_shares.launch(stream, self.dtype, &shares)
        }
    }
}
