//! Scores and selection of a router of two layers in one launch, for many tokens on Hopper, where a block takes some of them
//! through all of it.

use super::driver::{Function, RawStream, matrix_map};
use super::kernels::{Half, Modules, half_names};
use super::{Device, Properties};
use crate::abi::{
    MOEFY_ROUTER_BLOCK_OUTPUTS as OUTPUTS, MOEFY_ROUTER_BLOCK_STAGES, MOEFY_ROUTER_BLOCK_THREADS,
    moefy_router_block_params, moefy_router_kind, moefy_router_select_params, moefy_rule,
};
use crate::dtype::DType;
use crate::error::Result;

/// Fewer tokens have their rows of the first layer dealt out. More have clusters, whose blocks read less each.
const TOKENS: std::ops::RangeInclusive<u32> = 96..=8192;
/// A wider token's weights of the first layer take longer to read than clusters need.
const MAX_D_MODEL: u32 = 1024;
/// Of the second layer, all of which is in shared memory.
const MAX_EXPERTS: u32 = 256;
/// Experts, and columns, of a piece of the second layer; columns of a stage.
const PIECE: u32 = 64;
/// Bytes of a row of 64 columns.
const ROW_BYTES: u32 = 128;
const WARPS: u32 = MOEFY_ROUTER_BLOCK_THREADS / 32;
/// Tokens of a block, of each kernel.
const SIZES: [u32; 3] = [16, 32, 64];

pub(super) struct Kernels {
    variants: Half<{ SIZES.len() }>,
    multiprocessors: u32,
}

impl Kernels {
    /// `None` where the device is no Hopper.
    pub(super) fn load(modules: &Modules, properties: &Properties) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_router_block") else { return Ok(None) };
        let names = half_names!("moefy_router_block": "16", "32", "64");
        let load =
            |name| module.function_with_all_shared(name, properties.max_shared_bytes).map(Some);
        let multiprocessors = properties.multiprocessors as u32;
        let variants = Half::load(names, load)?;
        Ok(variants.map(|variants| Self { variants, multiprocessors }))
    }
}

/// A launch.
pub(super) struct Shape {
    kernel: Function,
    /// Of a block.
    tokens: u32,
    num_stages: u32,
    w2_offset: u32,
    parts_offset: u32,
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
        let kernels = device.router_block.as_ref()?;
        let variants = kernels.variants.of(dtype)?;
        let fits = TOKENS.contains(&router.num_tokens)
            && router.kind == moefy_router_kind::MOEFY_ROUTER_D2DMOE
            && router.d_model <= MAX_D_MODEL
            && router.num_experts <= MAX_EXPERTS
            && router.hidden <= OUTPUTS
            && router.d_model.is_multiple_of(8)
            && router.hidden.is_multiple_of(8)
            && router.x_stride.is_multiple_of(8);
        if !fits {
            return None;
        }
        // All tokens at once, if that is possible.
        let enough = |tokens: u32| router.num_tokens.div_ceil(tokens) <= kernels.multiprocessors;
        let which = SIZES.iter().position(|&tokens| enough(tokens)).unwrap_or(SIZES.len() - 1);
        let ((kernel, available), tokens) = (variants[which], SIZES[which]);
        let depths = router.hidden.div_ceil(PIECE);
        let pieces = router.num_experts.div_ceil(PIECE);
        let of_w2 = pieces * depths * PIECE * ROW_BYTES;
        let parts = if dtype == DType::F16 { 2 } else { 3 };
        let of_parts = parts * (OUTPUTS / PIECE) * tokens * ROW_BYTES;
        let of_rows = tokens * (pieces * PIECE + 4) * 4;
        let stage = (OUTPUTS + tokens) * ROW_BYTES;
        let room = (available as u32).checked_sub(of_w2 + of_parts + of_rows)? / stage;
        let useful = router.d_model.div_ceil(PIECE);
        let num_stages = room.min(MOEFY_ROUTER_BLOCK_STAGES).min(useful);
        // Selection sorts where the stages were.
        let sorted = match router.selection.rule {
            moefy_rule::MOEFY_RULE_CUMULATIVE_SHARE => {
                router.num_experts.max(32).next_power_of_two()
            }
            _ => 0,
        };
        let w2_offset = (num_stages * stage).max(WARPS * sorted * 4).next_multiple_of(1024);
        let (parts_offset, rows_offset) = (w2_offset + of_w2, w2_offset + of_w2 + of_parts);
        let shared_bytes = (rows_offset + of_rows) as usize;
        (num_stages >= useful.min(2) && shared_bytes <= available).then_some(Self {
            kernel,
            tokens,
            num_stages,
            w2_offset,
            parts_offset,
            rows_offset,
            shared_bytes,
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
        let r = router;
        let params = moefy_router_block_params {
            x: matrix_map(dtype, r.x, [r.num_tokens, r.d_model], r.x_stride, self.tokens)?,
            w1: matrix_map(dtype, r.w1, [r.hidden, r.d_model], r.d_model.into(), OUTPUTS)?,
            w2: matrix_map(dtype, r.w2, [r.num_experts, r.hidden], r.hidden.into(), PIECE)?,
            router: *r,
            num_stages: self.num_stages,
            w2_offset: self.w2_offset,
            parts_offset: self.parts_offset,
            rows_offset: self.rows_offset,
            reserved: [0; 10],
        };
        let grid = [r.num_tokens.div_ceil(self.tokens), 1, 1];
        // SAFETY: the caller's promise.
        unsafe {
            self.kernel.launch(stream, grid, MOEFY_ROUTER_BLOCK_THREADS, self.shared_bytes, &params)
        }
    }
}
