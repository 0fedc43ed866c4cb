//! The kernels of [`experts`](super::experts) for few tokens: the union of their experts, neuron by
//! neuron. One token goes another way where it can ([`super::experts_one`]).

use super::driver::RawStream;
use super::experts::{Launch, THREADS, VECTOR_BYTES, Variants, variants};
use super::kernels::Modules;
use super::workspace::Layout;
use super::{Device, add_shares};
use crate::abi::moefy_experts_params;
use crate::dtype::DType;
use crate::error::Result;

/// Tokens of a fragment.
const TILE: usize = 8;
/// Fragments of a block: of the variants small to large.
const TILES: [usize; 3] = [1, 2, 4];
/// Vectors of columns that a lane of the second kernel takes: of f32, and of the variants.
const WIDE_F32: usize = 1;
const WIDE: [usize; 3] = [2, 1, 1];
/// Columns of `hidden` that a warp of the second kernel takes at a time.
const STEP: usize = 16;
/// Warps of the second kernel that lie side by side.
const WARPS_ACROSS: usize = 4;

pub(super) struct Kernels {
    hidden: Variants,
    output: Variants,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let load = |names| Variants::load(modules, "experts_few", names, [0; 3]);
        Ok(Self {
            hidden: load(variants!("moefy_experts_few_hidden_", "1", ["1", "2", "4"]))?,
            output: load(variants!("moefy_experts_few_output_", "1", ["1", "2", "4"]))?,
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
    partials: u64,
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
        let wide = if dtype == DType::F32 { WIDE_F32 } else { WIDE[size] };
        let stripe = WARPS_ACROSS * TILE * wide * vector;
        let stripes = launch.d_model.div_ceil(stripe);
        let neurons = launch.d_ff + launch.rank;
        // Two blocks on every multiprocessor, as long as they have something to do.
        let wanted = 2 * multiprocessors / (stripes * token_tiles).max(1);
        let splits = wanted.min(neurons.div_ceil(4 * STEP)).max(1);
        let hidden_stride = neurons.checked_next_multiple_of(STEP)?;

        let mut layout = Layout::default();
        let tokens = token_tiles.checked_mul(tile_tokens)?;
        let hidden = layout.place(tokens.checked_mul(hidden_stride)?, dtype.bytes())?;
        // A bound on the shares of all tokens that grows with them, so that a workspace for many is enough for fewer, and for
        // the only one of experts_one: at most 4096 columns for each multiprocessor.
        let one_share = num_tokens.checked_mul(launch.d_model)?;
        let partials =
            layout.place(one_share.max(2 * multiprocessors * tile_tokens * stripe), 4)?;
        Some(Self {
            size,
            dtype,
            token_tiles,
            stripes,
            splits,
            hidden_blocks: neurons.min(2 * multiprocessors),
            hidden_stride,
            hidden,
            partials,
            bytes: layout.bytes(),
        })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        stream: RawStream,
        params: &moefy_experts_params,
        workspace: u64,
    ) -> Result<()> {
        let params = moefy_experts_params {
            hidden: workspace + self.hidden,
            hidden_stride: self.hidden_stride as u64,
            partials: workspace + self.partials,
            num_splits: self.splits as u32,
            ..*params
        };
        let [tiles, stripes, splits, blocks] =
            [self.token_tiles, self.stripes, self.splits, self.hidden_blocks].map(|n| n as u32);
        let Kernels { hidden, output } = &device.experts.few;
        let shares = add_shares::of_experts(&params, self.splits);
        // SAFETY: the caller's promise; the places do not overlap.
        unsafe {
            let grid = [blocks, tiles, 1];
            hidden.get(self.dtype, self.size).launch(stream, grid, THREADS, 0, &params)?;
            let grid = [stripes, splits, tiles];
            output.get(self.dtype, self.size).launch(stream, grid, THREADS, 0, &params)?;
            device.add_shares.launch(stream, self.dtype, &shares)
        }
    }
}
