//! Lists of tokens per expert, from masks.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::select::check_num_experts;
use super::view::{Arguments, Format, View, Workspace};
use crate::abi::{
    MOEFY_ROUTE_INDEX_BLOCKS, MOEFY_ROUTE_INDEX_CHUNK, MOEFY_ROUTE_INDEX_DIRECT_WORDS,
    MOEFY_ROUTE_INDEX_WARP_BLOCKS, moefy_route_index_params,
};
use crate::error::Result;

/// Tokens of a warp where each expert reads the masks itself, warps of an expert, and words that all experts read: 128
/// experts read those of 8192 tokens in less time than a second launch takes.
const WARP_TOKENS: usize = 32 * MOEFY_ROUTE_INDEX_WARP_BLOCKS as usize;
const MAX_WARPS: usize = 32;
const MAX_DIRECT_WORDS: usize = 128 * 8192 * 4;

pub(super) struct Kernels {
    direct: Function,
    transpose: Function,
    lists: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self {
            direct: modules.function("route_index", "moefy_route_index_direct", 0)?,
            transpose: modules.function("route_index", "moefy_route_index_transpose", 0)?,
            lists: modules.function("route_index", "moefy_route_index_lists", 0)?,
        })
    }
}

/// What [`route_index`] writes, all u32. Entries beyond what the numbers say are left as they were.
#[derive(Clone, Copy, Debug)]
pub struct RouteIndexOutputs {
    /// Tokens of each expert, \[1, E\].
    pub counts: View,
    /// Where each expert's list begins in `token_ids`, \[1, E + 1\].
    pub offsets: View,
    /// The tokens of expert 0, ascending, then those of expert 1, … \[1, capacity\]. When a batch has
    /// more pairs than the capacity, the lists end there and the status word gains
    /// `MOEFY_STATUS_TOO_MANY_PAIRS`; T · E, or T · cap under a cap, is always enough.
    pub token_ids: View,
    /// The transpose of the masks, \[E, ⌈T/32⌉\].
    pub expert_masks: View,
    /// Where the tokens of each of its words begin in `token_ids`, \[E, ⌈T/32⌉\].
    pub word_offsets: View,
    /// The experts that any token selects, ascending, \[1, E\].
    pub union_ids: View,
    /// How many those are, \[1, 1\].
    pub num_union: View,
    /// One word that gains the bit `MOEFY_STATUS_MASK_BEYOND_EXPERTS` when a mask has a bit at or
    /// beyond E, which is ignored. It is never cleared here.
    pub status: Option<View>,
}

/// Bytes of workspace that [`route_index`] needs for at most `num_tokens` tokens.
pub fn route_index_workspace_bytes(num_tokens: usize, num_experts: usize) -> usize {
    if is_direct(num_tokens, num_experts) {
        return 0;
    }
    num_chunks(num_tokens, num_experts).saturating_mul(num_experts).saturating_mul(4)
}

/// Whether one launch does everything.
fn is_direct(num_tokens: usize, num_experts: usize) -> bool {
    let row_words = num_experts.div_ceil(32);
    let words = num_experts.saturating_mul(num_tokens).saturating_mul(row_words);
    row_words <= MOEFY_ROUTE_INDEX_DIRECT_WORDS as usize
        && num_tokens <= WARP_TOKENS * MAX_WARPS
        && words <= MAX_DIRECT_WORDS
}

/// Chunks of tokens that are counted apart, as many as keep the GPU busy.
pub(super) fn num_chunks(num_tokens: usize, num_experts: usize) -> usize {
    let num_blocks = num_tokens.div_ceil(32);
    let most = MOEFY_ROUTE_INDEX_BLOCKS as usize / num_experts.div_ceil(32).max(1);
    num_blocks.div_ceil(MOEFY_ROUTE_INDEX_CHUNK as usize).clamp(1, most.max(1))
}

/// The lists of the masks u32 \[num_tokens, ⌈num_experts/32⌉\]: number for number what
/// [`reference::route_index`](crate::reference::route_index) gives, in every run. Rows at and beyond
/// the device-side `num_valid_tokens` (u32 \[1, 1\]) enter no list.
///
/// # Errors
/// For more than 4096 experts or 2³¹ token-expert pairs, and on any argument that does not fit;
/// nothing was launched then.
///
/// # Safety
/// As for [`select`](super::select).
pub unsafe fn route_index(
    device: &Device,
    stream: RawStream,
    outputs: &RouteIndexOutputs,
    mask: View,
    num_experts: usize,
    num_valid_tokens: Option<View>,
    workspace: Workspace,
) -> Result<()> {
    let check = Arguments { device, op: "route_index" };
    let row_words = check_num_experts(&check, num_experts)?;
    let num_tokens = mask.shape[0];
    let num_blocks = num_tokens.div_ceil(32);
    check.size("num_tokens * num_experts", num_tokens.saturating_mul(num_experts))?;
    let is_direct = is_direct(num_tokens, num_experts);
    let needed = route_index_workspace_bytes(num_tokens, num_experts);
    let chunk_counts = check.workspace(workspace, needed)?;
    let capacity = outputs.token_ids.shape[1];
    let vector = |name, view, len| check.dense(name, view, Format::Word, [1, len]);
    let params = moefy_route_index_params {
        mask: check.dense("mask", mask, Format::Word, [num_tokens, row_words])?,
        num_valid_tokens: check.optional_words("num_valid_tokens", num_valid_tokens, 1)?,
        counts: vector("counts", outputs.counts, num_experts)?,
        offsets: vector("offsets", outputs.offsets, num_experts + 1)?,
        token_ids: vector("token_ids", outputs.token_ids, capacity)?,
        expert_masks: check.dense(
            "expert_masks",
            outputs.expert_masks,
            Format::Word,
            [num_experts, num_blocks],
        )?,
        word_offsets: check.dense(
            "word_offsets",
            outputs.word_offsets,
            Format::Word,
            [num_experts, num_blocks],
        )?,
        union_ids: vector("union_ids", outputs.union_ids, num_experts)?,
        num_union: vector("num_union", outputs.num_union, 1)?,
        status: check.optional_words("status", outputs.status, 1)?,
        chunk_counts,
        capacity: capacity as u64,
        num_chunks: num_chunks(num_tokens, num_experts) as u32,
        num_tokens: num_tokens as u32,
        num_experts: num_experts as u32,
        reserved: 0,
    };
    device.context.bind()?;
    let kernels = &device.route_index;
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe {
        let grid = [num_experts as u32, 1, 1];
        if is_direct {
            let threads = 32 * num_tokens.div_ceil(WARP_TOKENS).max(1) as u32;
            return kernels.direct.launch(stream, grid, threads, 0, &params);
        }
        count_experts(device, stream, &params)?;
        kernels.lists.launch(stream, grid, 256, 0, &params)
    }
}

/// The transpose, and the tokens of each expert in each chunk: the first of two launches.
///
/// # Safety
/// The addresses must be what the kernel expects, and the context must be bound.
pub(super) unsafe fn count_experts(
    device: &Device,
    stream: RawStream,
    params: &moefy_route_index_params,
) -> Result<()> {
    let grid = [params.num_experts.div_ceil(32), params.num_chunks, 1];
    // SAFETY: the caller's promise.
    unsafe { device.route_index.transpose.launch(stream, grid, 256, 0, params) }
}
