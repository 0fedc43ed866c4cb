//! Scores and selection of a router in one launch, for many tokens on Hopper.

use super::driver::{Function, RawStream, matrix_map};
use super::kernels::{Half, Modules, Variant, half_names};
use super::router_select::first_width;
use super::{Device, Properties};
use crate::abi::{
    MOEFY_ROUTER_MANY_PIECES, MOEFY_ROUTER_MANY_STAGES, MOEFY_ROUTER_MANY_THREADS,
    MOEFY_ROUTER_MANY_TOKENS as TOKENS, moefy_router_many_params, moefy_router_select_params,
    moefy_rule,
};
use crate::dtype::DType;
use crate::error::Result;

/// Fewer tokens have their rows of the first layer dealt out.
const MIN_TOKENS: u32 = 256;
/// Of the second layer, and of the scores of a token.
const MAX_EXPERTS: u32 = 512;
const MAX_HIDDEN: u32 = 256;
/// The most blocks of a cluster, and the least stages of each: with fewer, blocks lose in adding up what they save in reading.
const MAX_BLOCKS: u32 = 8;
const MIN_STAGES: u32 = 3;
/// Experts, and columns, of a piece of the second layer; columns of a stage.
const PIECE: u32 = 64;
/// Bytes of a row of 64 columns.
const ROW_BYTES: u32 = 128;
const WARPS: u32 = MOEFY_ROUTER_MANY_THREADS / 32;
/// Of two blocks that share a multiprocessor.
const SMALL_SHARED_BYTES: usize = 110 << 10;

/// What a kernel is made for, as its template's arguments say.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Of the first layer, at most.
    outputs: u32,
    /// Tokens of a block, at most.
    columns: u32,
    /// Blocks that fit a multiprocessor.
    resident: u32,
}

impl Size {
    /// The same, of a cluster of so many blocks: where wide tokens make it large, more stages are worth more.
    fn resident(&self, blocks: u32) -> u32 {
        if blocks == MAX_BLOCKS { 1 } else { self.resident }
    }
}

const SIZES: [Size; 3] = [
    Size { outputs: 128, columns: 32, resident: 2 },
    Size { outputs: 256, columns: 64, resident: 1 },
    Size { outputs: 512, columns: 64, resident: 1 },
];

pub(super) struct Kernels {
    variants: Half<{ SIZES.len() }>,
    multiprocessors: u32,
}

impl Kernels {
    /// `None` where the device is no Hopper.
    pub(super) fn load(modules: &Modules, properties: &Properties) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_router_many") else { return Ok(None) };
        let names = half_names!("moefy_router_many": "128", "256", "512");
        let load =
            |name| module.function_with_all_shared(name, properties.max_shared_bytes).map(Some);
        let multiprocessors = properties.multiprocessors as u32;
        let variants = Half::load(names, load)?;
        Ok(variants.map(|variants| Self { variants, multiprocessors }))
    }

    /// The best kernel and number of blocks that share its tokens.
    fn choose(&self, num_tokens: u32, d_model: u32, outputs: u32) -> Option<(usize, u32)> {
        let fitting = SIZES.iter().position(|size| outputs <= size.outputs)?;
        let size = SIZES[fitting];
        let tiles = num_tokens.div_ceil(TOKENS);
        // Enough blocks to fill the chip, but not more clusters than there is room for at a time: large ones leave gaps.
        let least = TOKENS / size.columns;
        let room = |blocks: u32| {
            let all = self.multiprocessors * size.resident(blocks) / blocks;
            if blocks > 2 { all * 10 / 11 } else { all }
        };
        let mut blocks = least;
        while blocks < MAX_BLOCKS
            && 2 * blocks * MIN_STAGES <= d_model.div_ceil(PIECE)
            && 4 * tiles * blocks < 3 * self.multiprocessors
            && tiles <= room(2 * blocks)
        {
            blocks *= 2;
        }
        Some((fitting, blocks))
    }
}

/// A launch.
pub(super) struct Shape {
    kernel: Function,
    size: Size,
    num_blocks: u32,
    num_stages: u32,
    num_pieces: u32,
    parts_offset: u32,
    pieces_offset: u32,
    rows_offset: u32,
    shared_bytes: usize,
}

impl Shape {
    /// `None` where these sizes are not for this kernel, or the device is not.
    pub(super) fn new(
        device: &Device,
        dtype: DType,
        router: &moefy_router_select_params,
    ) -> Option<Self> {
        let kernels = device.router_many.as_ref()?;
        let variants = kernels.variants.of(dtype)?;
        let fits = router.num_tokens >= MIN_TOKENS
            && router.num_experts <= MAX_EXPERTS
            && router.hidden <= MAX_HIDDEN
            && router.d_model.is_multiple_of(8)
            && router.hidden.is_multiple_of(8)
            && router.x_stride.is_multiple_of(8);
        if !fits {
            return None;
        }
        let (which, least) =
            kernels.choose(router.num_tokens, router.d_model, first_width(router))?;
        // With more blocks, each has fewer tokens to keep scores of.
        let blocks = (0..).map(|power| least << power).take_while(|&blocks| blocks <= MAX_BLOCKS);
        let ((function, all), size) = (variants[which], SIZES[which]);
        { blocks }.find_map(|blocks| {
            let available = if size.resident(blocks) == 1 { all } else { SMALL_SHARED_BYTES };
            Self::with_blocks((function, available), size, blocks, dtype, router)
        })
    }

    fn with_blocks(
        (kernel, available): Variant,
        size: Size,
        num_blocks: u32,
        dtype: DType,
        router: &moefy_router_select_params,
    ) -> Option<Self> {
        let available = available as u32;
        let sorted = match router.selection.rule {
            moefy_rule::MOEFY_RULE_CUMULATIVE_SHARE => {
                router.num_experts.max(32).next_power_of_two()
            }
            _ => 0,
        };
        // Sums, in whose place the rows of scores are where stages leave no other room; then parts of the hidden units, in whose
        // place selection sorts.
        let sums = TOKENS * (size.outputs + 8) * 4;
        let depths = router.hidden.div_ceil(PIECE);
        let row = router.num_experts.next_multiple_of(PIECE) + 4;
        let rows = if router.w2 == 0 { 0 } else { TOKENS / num_blocks * row * 4 };
        let (first, second) = if router.w2 == 0 {
            (sums, WARPS * sorted * 4)
        } else {
            let parts = if dtype == DType::F16 { 2 } else { 3 };
            let of_parts = parts * depths * size.columns * ROW_BYTES;
            (sums.max(rows), of_parts.max(WARPS * sorted * 4))
        };
        let parts_offset = first.next_multiple_of(1024);
        let least = (parts_offset + second).next_multiple_of(1024);
        // Each of two warpgroups has pieces of its own.
        let of_pieces = 2 * PIECE * ROW_BYTES;
        let wanted = router.num_experts.div_ceil(PIECE).div_ceil(2) * depths;
        let room = available.checked_sub(least)? / of_pieces;
        let num_pieces = wanted.min(MOEFY_ROUTER_MANY_PIECES).min(room);
        // Stages lie where all that will be, and take what pieces leave.
        let stage = (TOKENS + size.outputs) * ROW_BYTES;
        let useful = router.d_model.div_ceil(PIECE).div_ceil(num_blocks);
        let room = (available - num_pieces * of_pieces) / stage;
        let num_stages = room.min(MOEFY_ROUTER_MANY_STAGES).min(useful);
        let pieces_offset = least.max(num_stages * stage);
        // Where stages leave more room, rows lie apart, and no block waits until the others have read its sums.
        let rows_offset = if rows > 0 && least + rows <= pieces_offset { least } else { 0 };
        (num_stages >= useful.min(2) && num_pieces >= wanted.min(1)).then_some(Self {
            kernel,
            size,
            num_blocks,
            num_stages,
            num_pieces,
            parts_offset,
            pieces_offset,
            rows_offset,
            shared_bytes: (pieces_offset + num_pieces * of_pieces) as usize,
        })
    }

    /// # Safety
    /// The addresses must lead to what the parameters say, of at least one token, and the context must be
    /// bound.
    pub(super) unsafe fn launch(
        &self,
        stream: RawStream,
        dtype: DType,
        router: &moefy_router_select_params,
    ) -> Result<()> {
        let (r, outputs) = (router, self.size.outputs);
        let (d_model, width) = (r.d_model, first_width(r));
        let w1 = matrix_map(dtype, r.w1, [width, d_model], d_model.into(), outputs.min(256))?;
        let w2 = match r.w2 {
            0 => w1,
            w2 => matrix_map(dtype, w2, [r.num_experts, r.hidden], r.hidden.into(), PIECE)?,
        };
        let params = moefy_router_many_params {
            x: matrix_map(dtype, r.x, [r.num_tokens, d_model], r.x_stride, TOKENS)?,
            w1,
            w2,
            router: *r,
            num_blocks: self.num_blocks,
            num_stages: self.num_stages,
            num_pieces: self.num_pieces,
            parts_offset: self.parts_offset,
            pieces_offset: self.pieces_offset,
            rows_offset: self.rows_offset,
            reserved: [0; 8],
        };
        let grid = [r.num_tokens.div_ceil(TOKENS) * self.num_blocks, 1, 1];
        let threads = MOEFY_ROUTER_MANY_THREADS;
        // SAFETY: the caller's promise.
        unsafe {
            self.kernel.launch_clusters(
                stream,
                grid,
                self.num_blocks,
                threads,
                self.shared_bytes,
                &params,
            )
        }
    }
}
