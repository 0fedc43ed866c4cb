//! Tiles of tokens whose masks are alike.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::route_index::{count_experts, num_chunks};
use super::select::check_num_experts;
use super::view::{Arguments, Format, View, Workspace};
use super::workspace::Layout;
use crate::abi::{
    MOEFY_MAX_EXPERTS, MOEFY_TILE_CHUNK, MOEFY_TILE_MAX_TOKENS, MOEFY_TILE_TOKENS,
    moefy_route_index_params, moefy_token_tiles_params,
};
use crate::error::Result;

/// Tokens of a tile.
pub(super) const TILE_TOKENS: usize = MOEFY_TILE_TOKENS as usize;
/// Words of the tokens of a tile that select an expert.
pub(super) const TILE_WORDS: usize = TILE_TOKENS / 32;
/// Most tokens that are sorted together.
pub(super) const MAX_TOKENS: usize = MOEFY_TILE_MAX_TOKENS as usize;
/// Most experts.
pub(super) const MAX_EXPERTS: usize = MOEFY_MAX_EXPERTS as usize - 1;
const CHUNK: usize = MOEFY_TILE_CHUNK as usize;
/// Threads of the blocks of the three kernels, and keys that a block of the second looks up.
const KEY_THREADS: u32 = 1024;
const PLACE_THREADS: u32 = 256;
const UNION_THREADS: u32 = 64 / 32 * MOEFY_TILE_TOKENS;
const PLACES: usize = 64;

pub(super) struct Kernels {
    keys: Function,
    places: Function,
    unions: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let of_ranks = shared_bytes(MAX_EXPERTS);
        Ok(Self {
            keys: modules.function("token_tiles", "moefy_token_tiles_keys", of_ranks)?,
            places: modules.function("token_tiles", "moefy_token_tiles_places", MAX_TOKENS * 4)?,
            unions: modules.function("token_tiles", "moefy_token_tiles_unions", 0)?,
        })
    }
}

/// Of the kernel that finds keys.
fn shared_bytes(num_experts: usize) -> usize {
    2 * num_experts.next_multiple_of(32) * 4
}

/// What [`token_tiles`] writes, all u32. Entries beyond what the counts say are left as they were.
#[derive(Clone, Copy, Debug)]
pub struct TokenTiles {
    /// All tokens, padding last, \[1, T\]: a tile has 128 that follow each other.
    pub token_ids: View,
    /// Experts that any token of a tile selects, \[1, ⌈T/128⌉\].
    pub counts: View,
    /// Those of each tile, ascending, \[⌈T/128⌉, E\].
    pub expert_ids: View,
    /// Of each of those the tokens of the tile that select it, least significant bit first,
    /// \[⌈T/128⌉, 4 E\].
    pub masks: View,
}

/// Places in the workspace.
struct Shape {
    num_chunks: usize,
    chunk_counts: u64,
    expert_masks: u64,
    sorted: u64,
    bytes: usize,
}

impl Shape {
    fn new(num_tokens: usize, num_experts: usize) -> Option<Self> {
        let num_chunks = num_chunks(num_tokens, num_experts);
        let mut layout = Layout::default();
        Some(Self {
            num_chunks,
            chunk_counts: layout.place(num_chunks.checked_mul(num_experts)?, 4)?,
            expert_masks: layout.place(num_experts.checked_mul(num_tokens.div_ceil(32))?, 4)?,
            sorted: layout.place(num_tokens.checked_next_multiple_of(CHUNK)?, 4)?,
            bytes: layout.bytes(),
        })
    }
}

/// Bytes of workspace that [`token_tiles`] needs; `None` when the sizes overflow.
pub fn token_tiles_workspace_bytes(num_tokens: usize, num_experts: usize) -> Option<usize> {
    Shape::new(num_tokens, num_experts).map(|shape| shape.bytes)
}

/// Orders tokens by the rarest of their experts, then by the second rarest, as often as this batch selects them, and gives
/// what each tile of 128 tokens selects: number for number what
/// [`reference::token_tiles`](crate::reference::token_tiles) gives, in every run. `mask` is u32
/// \[num_tokens, ⌈num_experts/32⌉\]; rows at and beyond the device-side `num_valid_tokens` (u32 \[1, 1\]) select
/// nothing.
///
/// # Errors
/// For more than 8192 tokens or 4095 experts, and on any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](super::select).
pub unsafe fn token_tiles(
    device: &Device,
    stream: RawStream,
    outputs: &TokenTiles,
    mask: View,
    num_experts: usize,
    num_valid_tokens: Option<View>,
    workspace: Workspace,
) -> Result<()> {
    let check = Arguments { device, op: "token_tiles" };
    let row_words = check_num_experts(&check, num_experts)?;
    let num_tokens = mask.shape[0];
    if num_tokens > MAX_TOKENS {
        return Err(check.error("num_tokens", format!("at most {MAX_TOKENS}"), num_tokens));
    }
    if num_experts > MAX_EXPERTS {
        return Err(check.error("num_experts", format!("at most {MAX_EXPERTS}"), num_experts));
    }
    let num_tiles = num_tokens.div_ceil(TILE_TOKENS);
    let shape = Shape::new(num_tokens, num_experts).expect("sizes are small");
    let base = check.workspace(workspace, shape.bytes)?;
    let words = |name, view, shape| check.dense(name, view, Format::Word, shape);
    let counted = moefy_route_index_params {
        mask: words("mask", mask, [num_tokens, row_words])?,
        num_valid_tokens: check.optional_words("num_valid_tokens", num_valid_tokens, 1)?,
        expert_masks: base + shape.expert_masks,
        chunk_counts: base + shape.chunk_counts,
        num_chunks: shape.num_chunks as u32,
        num_tokens: num_tokens as u32,
        num_experts: num_experts as u32,
        ..bytemuck::Zeroable::zeroed()
    };
    let params = moefy_token_tiles_params {
        mask: counted.mask,
        num_valid_tokens: counted.num_valid_tokens,
        chunk_counts: counted.chunk_counts,
        sorted: base + shape.sorted,
        token_ids: words("token_ids", outputs.token_ids, [1, num_tokens])?,
        tile_counts: words("counts", outputs.counts, [1, num_tiles])?,
        tile_expert_ids: words("expert_ids", outputs.expert_ids, [num_tiles, num_experts])?,
        tile_masks: words("masks", outputs.masks, [num_tiles, num_experts * TILE_WORDS])?,
        num_chunks: counted.num_chunks,
        num_tokens: counted.num_tokens,
        num_experts: counted.num_experts,
        reserved: 0,
    };
    if num_tokens == 0 {
        return Ok(());
    }
    check.address("masks", params.tile_masks, 16)?;
    device.context.bind()?;
    let kernels = &device.token_tiles;
    let grid = |blocks: usize| [blocks as u32, 1, 1];
    let chunks = num_tokens.div_ceil(CHUNK);
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe {
        count_experts(device, stream, &counted)?;
        kernels.keys.launch(
            stream,
            grid(chunks),
            KEY_THREADS,
            shared_bytes(num_experts),
            &params,
        )?;
        let places = grid(num_tokens.div_ceil(PLACES));
        kernels.places.launch(stream, places, PLACE_THREADS, chunks * CHUNK * 4, &params)?;
        kernels.unions.launch(stream, grid(num_tiles), UNION_THREADS, 0, &params)
    }
}
