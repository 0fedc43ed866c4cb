//! A whole layer for few tokens on Hopper: the first layer of the router, then a kernel that finishes the routing and
//! streams the rows of the executed neurons, then the sum of its shares. Up to eight tokens of narrow layers, clusters of
//! blocks do the first two in one launch: they stream the rows of the executed neurons ([`super::ffn_few_cluster`]) or, where
//! those are most, all rows while they route ([`super::ffn_few_whole`]).
//!
//! The second layer of a router of f16 is kept a second time as two matrices of bf16: 4 · E · hidden bytes.

use super::driver::{Function, RawStream};
use super::kernels::{Modules, Variant};
use super::workspace::Layout;
use super::{Device, Neurons, RouterView, ffn_few_cluster, ffn_few_whole};
use crate::abi::{
    MOEFY_FFN_FEW_EXPERTS, MOEFY_FFN_FEW_ROUTER_ROWS, MOEFY_FFN_FEW_STAGES, MOEFY_FFN_FEW_THREADS,
    MOEFY_FFN_FEW_TILE, moefy_add_shares_params, moefy_ffn_few_params,
};
use crate::dtype::DType;
use crate::error::Result;

/// Tiles of tokens and steps of 32 columns that a warp can own, of the variants, the better first.
const VARIANTS: [(usize, usize); 4] = [(1, 4), (1, 16), (2, 8), (4, 4)];
/// Neurons of a stage, the better first: index of the kernel that multiplies 8 or 16 at once, and how many by their
/// logarithm.
const STAGES: [(usize, usize); 3] = [(1, 4), (0, 3), (0, 2)];
/// The most tokens.
pub(super) const MAX_TOKENS: usize = 4 * MOEFY_FFN_FEW_TILE as usize;
pub(super) const WARPS: usize = MOEFY_FFN_FEW_THREADS as usize / 32;
/// More than its rows of the widest token take.
const MAX_ROUTER_SHARED_BYTES: usize = 96 << 10;
/// Indices of neurons are exact in the kernel's arithmetic below this.
const MAX_NEURONS: usize = 1 << 21;

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

/// Bytes in the ring of a neuron, as in the kernels.
pub(super) fn neuron_bytes(neurons: &Neurons, row_bytes: usize) -> usize {
    neurons.halves() * in_row_stride(row_bytes) + (row_bytes + 111) / 128 * 128 + 16
}

/// What sorting the scores of a selection takes of the ring, while it is empty.
pub(super) fn scratch_bytes(sorts: bool) -> usize {
    if sorts { WARPS * MOEFY_FFN_FEW_EXPERTS as usize * 4 } else { 0 }
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

/// The launch that streams the rows of the executed neurons.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    pub(super) kernel: Function,
    pub(super) num_blocks: usize,
    pub(super) log_stage_neurons: usize,
    pub(super) num_stages: usize,
    /// Where all rows are asked for: neurons of a block at most, and shared memory of the routing beside them.
    pub(super) block_neurons: usize,
    pub(super) routing_bytes: usize,
    pub(super) shared_bytes: usize,
    /// What all launches take, on an H100 (kernels/NOTES.md).
    pub(super) us: f64,
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Where the stream needs one.
    first_layer: Option<FirstLayer>,
    stream: Stream,
    dtype: DType,
    first: u64,
    partials: u64,
    pub(super) bytes: usize,
}

/// What a shape is for.
pub(super) struct Sizes<'a> {
    pub(super) neurons: &'a Neurons,
    pub(super) router: RouterView,
    pub(super) dtype: DType,
    pub(super) num_tokens: usize,
    /// Whether the selection does.
    pub(super) sorts: bool,
    /// That the tokens together probably execute.
    pub(super) expected_neurons: usize,
}

impl Sizes<'_> {
    /// Microseconds that the rows of so many neurons take from memory.
    pub(super) fn read_us(&self, neurons: usize) -> f64 {
        let rows = neurons * (self.neurons.halves() + 1);
        (rows * self.neurons.d_model() * self.dtype.bytes()) as f64 / 2.8e6
    }
}

impl Shape {
    /// What all launches take, on an H100.
    pub(super) fn us(&self) -> f64 {
        self.stream.us
    }

    /// `None` where these sizes are not for this path, or the device is not.
    pub(super) fn new(device: &Device, sizes: &Sizes) -> Option<Self> {
        let &Sizes { neurons, router, dtype, num_tokens, .. } = sizes;
        let (d_model, num_experts, hidden) =
            (neurons.d_model(), neurons.num_experts, router.hidden());
        let fits = num_experts <= MOEFY_FFN_FEW_EXPERTS as usize
            && hidden.is_multiple_of(8)
            && neurons.d_ff() + neurons.rank < MAX_NEURONS;
        if !fits {
            return None;
        }
        let mut layout = Layout::default();
        let of_clusters =
            [ffn_few_whole::stream(device, sizes), ffn_few_cluster::stream(device, sizes)];
        let fastest = of_clusters.into_iter().flatten().min_by(|a, b| a.us.total_cmp(&b.us));
        let (first_layer, stream, first) = match fastest {
            Some(stream) => (None, stream, 0),
            None => {
                let width = if hidden == 0 { num_experts } else { hidden };
                let first_layer = FirstLayer::new(device, dtype, num_tokens, d_model, width)?;
                let stream = stream(device, sizes)?;
                let scores = num_tokens.checked_mul(4 * num_experts)?;
                let bytes = if hidden == 0 { scores } else { part_bytes(num_tokens, hidden)? };
                (Some(first_layer), stream, layout.place(bytes, 1)?)
            }
        };
        let rows = stream.num_blocks.checked_mul(num_tokens)?;
        let partials = layout.place(rows.checked_mul(d_model)?, 4)?;
        Some(Self { first_layer, stream, dtype, first, partials, bytes: layout.bytes() })
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
        let Stream { kernel, num_blocks, shared_bytes, .. } = self.stream;
        let mut params = *params;
        params.router.first = workspace + self.first;
        params.partials = workspace + self.partials;
        params.inverse_blocks = 1.0 / num_blocks as f32;
        params.num_stages = self.stream.num_stages as u32;
        params.log_stage_neurons = self.stream.log_stage_neurons as u32;
        params.block_neurons = self.stream.block_neurons as u32;
        params.routing_bytes = self.stream.routing_bytes as u32;
        let shares = moefy_add_shares_params {
            shares: params.partials,
            b_out: params.neurons.b_out,
            num_valid_tokens: params.router.num_valid_tokens,
            y: params.y,
            num_shares: num_blocks as u32,
            num_tokens: params.router.num_tokens,
            d_model: params.neurons.d_model,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(first_layer) = &self.first_layer {
                first_layer.launch(stream, &params)?;
            }
            let (grid, threads) = ([num_blocks as u32, 1, 1], MOEFY_FFN_FEW_THREADS);
            kernel.launch(stream, grid, threads, shared_bytes, &params)?;
            device.add_shares.launch(stream, self.dtype, &shares)
        }
    }
}

/// Of the outputs of a router's first layer as three numbers of bf16 each.
fn part_bytes(num_tokens: usize, hidden: usize) -> Option<usize> {
    (3 * num_tokens).checked_mul(in_row_stride(2 * hidden))
}

/// The launch after that of the first layer.
fn stream(device: &Device, sizes: &Sizes) -> Option<Stream> {
    let &Sizes { neurons, router, dtype, num_tokens, sorts, .. } = sizes;
    let kernels = device.ffn_few.as_ref()?.of(dtype)?;
    let (num_experts, hidden) = (neurons.num_experts, router.hidden());
    let size = variant(num_tokens, neurons.d_model())?;
    let round_up = |bytes: usize| bytes.next_multiple_of(128);
    let of_parts = if hidden == 0 { 0 } else { part_bytes(num_tokens, hidden)? };
    let fixed = round_up(4 * num_tokens * num_experts.next_multiple_of(32)) + round_up(of_parts);
    let num_blocks = device.properties().multiprocessors;
    let w2_bytes = num_w2(dtype).checked_mul(num_experts.checked_mul(hidden)?)?.checked_mul(2)?;
    let products = 4 * num_experts.next_multiple_of(16) * (3 * num_tokens).next_multiple_of(8);
    let of_router = round_up(w2_bytes) + if hidden == 0 { 0 } else { products };
    let least_bytes = of_router.max(scratch_bytes(sorts));
    // As many neurons a stage as leave two stages; a GLU's take two rows of a fragment each.
    let stages = if neurons.glu { &STAGES[1..] } else { &STAGES[..] };
    let ring = |&(which, log_stage_neurons): &(usize, usize), enough: usize| {
        let (kernel, available) = kernels.stream[size][which];
        let stage_bytes =
            neuron_bytes(neurons, neurons.d_model() * dtype.bytes()) << log_stage_neurons;
        let left = available.checked_sub(fixed)?;
        // No more than a block has neurons for.
        let useful = (neurons.d_ff() + neurons.rank).div_ceil(num_blocks << log_stage_neurons);
        let most = useful.clamp(1, MOEFY_FFN_FEW_STAGES as usize);
        let num_stages = (left / stage_bytes).min(most);
        let ring_bytes = (num_stages * stage_bytes).max(least_bytes);
        let shared_bytes = fixed + ring_bytes;
        let fits = num_stages >= enough.min(useful) && ring_bytes <= left;
        fits.then_some(Stream {
            kernel,
            num_blocks,
            log_stage_neurons,
            num_stages,
            block_neurons: 0,
            routing_bytes: 0,
            shared_bytes,
            us: us(sizes, num_blocks),
        })
    };
    let find = |enough| stages.iter().find_map(|stage| ring(stage, enough));
    find(2).or_else(|| find(1))
}

/// Launches and routing; the rows; each block's share of y; tokens beyond a tile.
fn us(sizes: &Sizes, num_blocks: usize) -> f64 {
    let (tokens, d_model) = (sizes.num_tokens as f64, sizes.neurons.d_model() as f64);
    let shares = (num_blocks * 8) as f64 * tokens * d_model / 4e6;
    let beyond = 0.6 * (tokens - MOEFY_FFN_FEW_TILE as f64).max(0.0);
    7.5 + 0.0008 * d_model + sizes.read_us(sizes.expected_neurons) + shares + beyond
}
