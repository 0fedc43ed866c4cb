//! The kernels of [`experts`](super::experts) for few tokens: the union of their experts, neuron by
//! neuron.

use super::Device;
use super::driver::{Function, RawStream};
use super::experts::{Launch, THREADS, VECTOR_BYTES, Variants, variants};
use super::kernels::Modules;
use super::workspace::Layout;
use crate::abi::{moefy_add_shares_params, moefy_experts_params};
use crate::dtype::DType;
use crate::error::Result;

/// Tokens of a fragment.
const TILE: usize = 8;
/// Fragments of a block: of the variants small to large.
const TILES: [usize; 3] = [1, 2, 4];
/// Vectors of columns that a lane takes of an output: of f32, and of the variants.
const WIDE_F32: usize = 1;
const WIDE: [usize; 3] = [2, 1, 1];
/// Columns of `hidden` that a warp takes of an output at a time.
const STEP: usize = 16;
/// Warps of an output that lie side by side.
const WARPS_ACROSS: usize = 4;

pub(super) struct Kernels {
    whole: Variants,
    begin: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        let names = variants!("moefy_experts_few_", "1", ["1", "2", "4"]);
        Ok(Self {
            whole: Variants::load(modules, "experts_few", names, [0; 3])?,
            begin: modules.function("experts_few", "moefy_experts_few_begin", 0)?,
        })
    }
}

/// Words at `turns`, which a router or [`begin`] makes zeros before every launch.
pub(super) const TURNS: usize = 2;

/// Zeros at `turns`.
///
/// # Safety
/// The address must lead to [`TURNS`] words, and the context must be bound.
pub(super) unsafe fn begin(device: &Device, stream: RawStream, turns: u64) -> Result<()> {
    let params = moefy_experts_params { turns, ..bytemuck::Zeroable::zeroed() };
    // SAFETY: the caller's promise.
    unsafe { device.experts.few.begin.launch(stream, [1, 1, 1], 32, 0, &params) }
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    dtype: DType,
    blocks: usize,
    stripes: usize,
    splits: usize,
    hidden_splits: usize,
    hidden_stride: usize,
    hidden: u64,
    partials: u64,
    turns: u64,
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
        let hidden_splits = neurons.min(2 * multiprocessors);
        let pieces = hidden_splits.max(stripes * splits) * token_tiles;
        let hidden_stride = neurons.checked_next_multiple_of(STEP)?;

        let mut layout = Layout::default();
        let tokens = token_tiles.checked_mul(tile_tokens)?;
        let hidden = layout.place(tokens.checked_mul(hidden_stride)?, dtype.bytes())?;
        // A bound on the shares of all tokens that grows with them, so that a workspace for many is enough for fewer.
        let one_share = num_tokens.checked_mul(launch.d_model)?;
        let partials =
            layout.place(one_share.max(2 * multiprocessors * tile_tokens * stripe), 4)?;
        let turns = layout.place(TURNS, 4)?;
        Some(Self {
            size,
            dtype,
            blocks: pieces.min(2 * multiprocessors),
            stripes,
            splits,
            hidden_splits,
            hidden_stride,
            hidden,
            partials,
            turns,
            bytes: layout.bytes(),
        })
    }

    /// Where `params` have no `turns`, they are in the workspace, and begun here.
    ///
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
            turns: if params.turns == 0 { workspace + self.turns } else { params.turns },
            hidden_splits: self.hidden_splits as u32,
            num_splits: self.splits as u32,
            num_stripes: self.stripes as u32,
            ..*params
        };
        let needs_begin = params.turns == workspace + self.turns;
        let kernel = device.experts.few.whole.get(self.dtype, self.size);
        let shares = moefy_add_shares_params {
            shares: params.partials,
            b_out: params.neurons.b_out,
            num_valid_tokens: params.num_valid_tokens,
            y: params.y,
            num_shares: params.num_splits,
            num_tokens: params.num_tokens,
            d_model: params.neurons.d_model,
        };
        // SAFETY: the caller's promise; the places do not overlap.
        unsafe {
            if needs_begin {
                begin(device, stream, params.turns)?;
            }
            kernel.launch(stream, [self.blocks as u32, 1, 1], THREADS, 0, &params)?;
            device.add_shares.launch(stream, self.dtype, &shares)
        }
    }
}
