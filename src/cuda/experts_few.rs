//! The kernels of [`experts`](super::experts) for few tokens: the union of their experts, neuron by
//! neuron.

use super::driver::RawStream;
use super::experts::{Launch, THREADS, VECTOR_BYTES, Variants, variants};
use super::kernels::Modules;
use super::workspace::Layout;
use crate::abi::moefy_experts_params;
use crate::dtype::DType;
use crate::error::Result;

/// Tokens of a fragment.
const TILE: usize = 8;
/// Fragments of a block: of the variants small to large.
const TILES: [usize; 3] = [1, 2, 4];
/// Columns of `hidden` that a warp of the second kernel takes at a time.
const STEP: usize = 16;
/// Warps of a block.
const WARPS: usize = THREADS as usize / 32;

pub(super) struct Kernels {
    hidden: Variants,
    combine: Variants,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let load = |names| Variants::load(modules, "experts_few", names, [0; 3]);
        Ok(Self {
            hidden: load(variants!("moefy_experts_few_hidden_", "1", ["1", "2", "4"]))?,
            combine: load(variants!("moefy_experts_few_combine_", "1", ["1", "2", "4"]))?,
        })
    }
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    dtype: DType,
    token_tiles: usize,
    stripes: usize,
    splits: usize,
    hidden_blocks: usize,
    hidden_stride: usize,
    hidden: u64,
    neuron_ids: u64,
    partials: u64,
    arrivals: u64,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where the sizes overflow.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let Launch { dtype, num_tokens, multiprocessors, .. } = *launch;
        let vector = VECTOR_BYTES / dtype.bytes();
        let size = match (dtype, num_tokens) {
            (DType::F32, _) | (_, ..=8) => 0,
            (_, ..=16) => 1,
            _ => 2,
        };
        let tile_tokens = TILE * TILES[size];
        let token_tiles = num_tokens.div_ceil(tile_tokens);
        let stripes = launch.d_model.div_ceil(TILE * vector);
        let neurons = launch.d_ff + launch.rank;
        // Blocks enough for two on every multiprocessor, as long as each warp has a few steps to take.
        let wanted = (2 * multiprocessors).div_ceil((stripes * token_tiles).max(1));
        let splits = wanted.min(neurons.div_ceil(STEP * WARPS * 4)).max(1);
        let hidden_stride = neurons.checked_next_multiple_of(STEP)?;
        let groups = hidden_stride / STEP * launch.halves;

        let mut layout = Layout::default();
        let tokens = token_tiles.checked_mul(tile_tokens)?;
        let hidden = layout.place(tokens.checked_mul(hidden_stride)?, dtype.bytes())?;
        let neuron_ids = layout.place(hidden_stride, 4)?;
        // A bound on stripes * token_tiles * splits that grows with the tokens, so that a workspace for
        // many is enough for fewer.
        let blocks = stripes.checked_mul(token_tiles)?.checked_add(2 * multiprocessors)?;
        let outputs = tile_tokens * TILE * vector;
        let partials = layout.place(blocks.checked_mul(outputs)?, 4)?;
        let arrivals = layout.place(stripes.checked_mul(token_tiles)?, 4)?;
        Some(Self {
            size,
            dtype,
            token_tiles,
            stripes,
            splits,
            hidden_blocks: groups.min(4 * multiprocessors),
            hidden_stride,
            hidden,
            neuron_ids,
            partials,
            arrivals,
            bytes: layout.bytes(),
        })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        kernels: &Kernels,
        stream: RawStream,
        params: &moefy_experts_params,
        workspace: u64,
    ) -> Result<()> {
        let params = moefy_experts_params {
            hidden: workspace + self.hidden,
            hidden_stride: self.hidden_stride as u64,
            neuron_ids: workspace + self.neuron_ids,
            partials: workspace + self.partials,
            arrivals: workspace + self.arrivals,
            num_splits: self.splits as u32,
            num_arrivals: (self.stripes * self.token_tiles) as u32,
            ..*params
        };
        let [tiles, stripes, splits, blocks] =
            [self.token_tiles, self.stripes, self.splits, self.hidden_blocks].map(|n| n as u32);
        let (hidden, combine) = (&kernels.hidden, &kernels.combine);
        // SAFETY: the caller's promise; the places do not overlap.
        unsafe {
            hidden.get(self.dtype, self.size).launch(
                stream,
                [blocks, tiles, 1],
                THREADS,
                0,
                &params,
            )?;
            let grid = [stripes, splits, tiles];
            combine.get(self.dtype, self.size).launch(stream, grid, THREADS, 0, &params)
        }
    }
}
