//! The experts of a layer, on the tokens that select them.

use super::driver::{Function, RawStream};
use super::kernels::Modules;
use super::neurons::Neurons;
use super::select::check_num_experts;
use super::token_tiles::{self, TILE_TOKENS, TILE_WORDS};
use super::view::{Arguments, Format, View, Workspace};
use super::{
    Device, TokenTiles, experts_few, experts_many, experts_many_kernels, experts_many_ways,
    experts_one, experts_tiled,
};
use crate::abi::{moefy_experts_params, moefy_experts_tiled_params, moefy_neurons};
use crate::dtype::DType;
use crate::error::Result;

/// Bytes of the loads of the kernels.
pub(super) const VECTOR_BYTES: usize = 16;
/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Without lists and tiles: tokens are the second dimension of the grid that adds shares.
const MAX_FEW_TOKENS: usize = 65_535;

/// Names of entry points: element types by sizes. f32 has one size.
macro_rules! variants {
    ($prefix:literal, $f32:literal, $half:tt) => {
        [
            variants!(@ $prefix, "f32_", [$f32, $f32, $f32]),
            variants!(@ $prefix, "f16_", $half),
            variants!(@ $prefix, "bf16_", $half),
        ]
    };
    (@ $prefix:literal, $dtype:literal, [$a:literal, $b:literal, $c:literal]) => {
        [concat!($prefix, $dtype, $a), concat!($prefix, $dtype, $b), concat!($prefix, $dtype, $c)]
    };
}
pub(super) use variants;

/// One entry point per element type and size of tile, small to large.
pub(super) struct Variants([[Function; 3]; 3]);

impl Variants {
    pub(super) fn load(
        modules: &Modules,
        module: &str,
        names: [[&'static str; 3]; 3],
        shared_bytes: [usize; 3],
    ) -> Result<Self> {
        let mut loaded = Vec::with_capacity(9);
        for names in names {
            for (name, shared_bytes) in names.into_iter().zip(shared_bytes) {
                loaded.push(modules.function(module, name, shared_bytes)?);
            }
        }
        Ok(Self(std::array::from_fn(|i| std::array::from_fn(|j| loaded[i * 3 + j]))))
    }

    pub(super) fn get(&self, dtype: DType, size: usize) -> &Function {
        let of_dtype = match dtype {
            DType::F32 => &self.0[0],
            DType::F16 => &self.0[1],
            DType::BF16 => &self.0[2],
        };
        &of_dtype[size]
    }
}

pub(super) struct Kernels {
    pub(super) few: experts_few::Kernels,
    pub(super) one: experts_one::Kernels,
    pub(super) many: experts_many_kernels::Kernels,
    pub(super) tiled: Option<experts_tiled::Kernels>,
}

impl Kernels {
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Self> {
        Ok(Self {
            few: experts_few::Kernels::load(modules)?,
            one: experts_one::Kernels::load(modules, max_shared_bytes)?,
            many: experts_many_kernels::Kernels::load(modules, max_shared_bytes)?,
            tiled: experts_tiled::Kernels::load(modules)?,
        })
    }
}

/// What [`experts`] reads beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsInputs {
    /// \[num_tokens, d_model\], without gaps, aligned to 16 bytes, of the weights' element type.
    pub x: View,
    /// S(t) as u32 \[num_tokens, ⌈num_experts/32⌉\].
    pub mask: View,
    /// g f32 \[num_tokens, num_experts\]; 1 where absent.
    pub gates: Option<View>,
    /// u32 \[1, 1\]: rows of y at and beyond it become zeros, and it must have bounded the lists too.
    pub num_valid_tokens: Option<View>,
    /// Which tokens run which experts: each expert goes through its own tokens then. Without lists, for few
    /// tokens, every neuron of the union of their experts is streamed once, for all of them.
    pub lists: Option<ExpertLists>,
    /// Instead of lists: tiles of tokens, each of which runs the union of its tokens' experts. For f16 and bf16 on Hopper.
    pub tiles: Option<TokenTiles>,
}

/// What [`route_index`](super::route_index) found.
#[derive(Clone, Copy, Debug)]
pub struct ExpertLists {
    /// u32 \[1, num_experts + 1\].
    pub offsets: View,
    /// u32 \[1, capacity\]. Where it is full, lists may have ended early as far as kernels know, and each pair is looked up: one
    /// entry more than there are pairs is faster.
    pub token_ids: View,
    /// Where the tokens of each 32 begin in an expert's list, u32 \[num_experts, ⌈num_tokens/32⌉\].
    pub word_offsets: View,
    /// About how many pairs there will be, where that is known: which kernels are fastest depends on it. Any number of them is
    /// right. `None` goes by an eighth of the capacity.
    pub expected_pairs: Option<usize>,
}

/// The sizes that decide how the kernels are launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Launch {
    pub(super) dtype: DType,
    pub(super) num_tokens: usize,
    pub(super) d_model: usize,
    pub(super) d_ff: usize,
    pub(super) num_experts: usize,
    pub(super) expert_width: usize,
    pub(super) shared: usize,
    pub(super) rank: usize,
    pub(super) halves: usize,
    pub(super) multiprocessors: usize,
    /// Whether whole warpgroups multiply for many tokens.
    pub(super) is_wide: bool,
}

impl Launch {
    pub(super) fn new(device: &Device, neurons: &Neurons, dtype: DType, num_tokens: usize) -> Self {
        Self {
            dtype,
            num_tokens,
            d_model: neurons.d_model(),
            d_ff: neurons.d_ff(),
            num_experts: neurons.num_experts,
            expert_width: neurons.expert_width,
            shared: neurons.shared,
            rank: neurons.rank,
            halves: neurons.halves(),
            multiprocessors: device.properties().multiprocessors,
            is_wide: device.experts.many.is_wide(dtype),
        }
    }
}

enum Shape {
    One(experts_one::Shape),
    Few(experts_few::Shape),
    Many(Box<experts_many::Shape>),
    Tiled(experts_tiled::Shape),
}

impl Shape {
    fn new(
        check: &Arguments<'_>,
        launch: &Launch,
        lists: Option<ExpertLists>,
        tiles: Option<TokenTiles>,
    ) -> Result<Self> {
        let shape = match (tiles, lists) {
            (Some(_), _) => {
                let tiled = &check.device.experts.tiled;
                if tiled.as_ref().and_then(|kernels| kernels.of(launch.dtype)).is_none() {
                    let expected = "none but for f16 and bf16 on Hopper";
                    return Err(check.error(
                        "tiles",
                        expected,
                        format!("some for {}", launch.dtype),
                    ));
                }
                if launch.num_tokens > token_tiles::MAX_TOKENS {
                    let expected = format!("at most {} in tiles", token_tiles::MAX_TOKENS);
                    return Err(check.error("num_tokens", expected, launch.num_tokens));
                }
                experts_tiled::Shape::new(launch).map(Self::Tiled)
            }
            (None, None) if launch.num_tokens > MAX_FEW_TOKENS => {
                let expected = format!("at most {MAX_FEW_TOKENS} without lists");
                return Err(check.error("num_tokens", expected, launch.num_tokens));
            }
            (None, None) => match experts_one::Shape::new(check.device, launch) {
                Some(shape) => Some(Self::One(shape)),
                None => experts_few::Shape::new(launch).map(Self::Few),
            },
            (None, Some(lists)) => {
                let capacity = lists.token_ids.shape[1];
                let expected = lists.expected_pairs.unwrap_or(capacity / 8);
                let shape = experts_many::Shape::new(launch, capacity, expected as f64);
                shape.map(|shape| Self::Many(Box::new(shape)))
            }
        };
        shape.ok_or_else(|| check.error("sizes", "such that the workspace can exist", "more"))
    }

    fn bytes(&self) -> usize {
        match self {
            Self::One(shape) => shape.bytes,
            Self::Few(shape) => shape.bytes,
            Self::Many(shape) => shape.bytes,
            Self::Tiled(shape) => shape.bytes,
        }
    }
}

/// Bytes of workspace that [`experts`] needs for that many tokens; of `lists` and `tiles` only the shapes count.
///
/// # Errors
/// When the sizes overflow.
pub fn experts_workspace_bytes(
    device: &Device,
    neurons: &Neurons,
    num_tokens: usize,
    lists: Option<ExpertLists>,
    tiles: Option<TokenTiles>,
) -> Result<usize> {
    let check = Arguments { device, op: "experts" };
    let (_, dtype) = neurons.check(&check)?;
    let launch = Launch::new(device, neurons, dtype, num_tokens);
    Ok(Shape::new(&check, &launch, lists, tiles)?.bytes())
}

/// `y[t] = b2 + shared(x[t]) + Σ_{e ∈ S(t)} g[t,e] · expert_e(x[t])`, y \[num_tokens, d_model\] of the
/// weights' element type, aligned to 16 bytes: what [`reference::experts`](crate::reference::experts) gives, with sums in
/// f32 and two roundings to the element type, of h and of y. Every element of y is written. Sums have
/// a fixed order: the same inputs give the same bits.
///
/// # Errors
/// On any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](super::select); the lists must belong to the masks.
pub unsafe fn experts(
    device: &Device,
    stream: RawStream,
    y: View,
    neurons: &Neurons,
    inputs: &ExpertsInputs,
    workspace: Workspace,
) -> Result<()> {
    let check = Arguments { device, op: "experts" };
    let (abi, dtype) = neurons.check(&check)?;
    let row_words = check_num_experts(&check, neurons.num_experts)?;
    let num_tokens = inputs.x.shape[0];
    let tokens = [num_tokens, neurons.d_model()];
    let float = Format::Float(dtype);
    let words = |name, view, len| check.dense(name, view, Format::Word, [1, len]);
    let mut params = moefy_experts_params {
        x: check.dense("x", inputs.x, float, tokens)?,
        y: check.dense("y", y, float, tokens)?,
        mask: check.dense("mask", inputs.mask, Format::Word, [num_tokens, row_words])?,
        gates: inputs.gates.map_or(Ok(0), |gates| {
            check.dense("gates", gates, Format::F32, [num_tokens, neurons.num_experts])
        })?,
        num_valid_tokens: check.optional_words("num_valid_tokens", inputs.num_valid_tokens, 1)?,
        num_tokens: check.size("num_tokens", num_tokens)?,
        ..without_addresses(abi)
    };
    if let Some(ExpertLists { offsets, token_ids, word_offsets, .. }) = inputs.lists {
        params.expert_offsets = words("offsets", offsets, neurons.num_experts + 1)?;
        check.size("capacity of token_ids", token_ids.shape[1])?;
        params.token_ids = words("token_ids", token_ids, token_ids.shape[1])?;
        let shape = [neurons.num_experts, num_tokens.div_ceil(32)];
        params.word_offsets = check.dense("word_offsets", word_offsets, Format::Word, shape)?;
    }
    let tiled = inputs.tiles.map(|tiles| tiled_params(&check, &params, &tiles)).transpose()?;
    let launch = Launch::new(device, neurons, dtype, num_tokens);
    let shape = Shape::new(&check, &launch, inputs.lists, inputs.tiles)?;
    let workspace = check.workspace(workspace, shape.bytes())?;
    if num_tokens == 0 {
        return Ok(());
    }
    check.address("x", params.x, VECTOR_BYTES)?;
    check.address("y", params.y, VECTOR_BYTES)?;
    if let Some(tiled) = &tiled {
        check.address("masks of tiles", tiled.tile_masks, VECTOR_BYTES)?;
    }
    device.context.bind()?;
    let kernels = &device.experts;
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe {
        match shape {
            Shape::One(shape) => shape.launch(device, stream, &params, workspace),
            Shape::Few(shape) => shape.launch(device, stream, &params, workspace),
            Shape::Many(shape) => {
                let available = device.properties().max_shared_bytes;
                if shape.shared_bytes(&kernels.many) > available {
                    let expected = format!("so many that their lists fit {available} bytes");
                    return Err(check.error("num_experts", expected, neurons.num_experts));
                }
                shape.launch(&kernels.many, stream, &params, workspace)
            }
            Shape::Tiled(shape) => {
                let products = kernels.tiled.as_ref().and_then(|tiled| tiled.of(dtype));
                let (products, params) = products.zip(tiled).expect("the shape has them");
                shape.launch(products, stream, &params, workspace)
            }
        }
    }
}

/// Microseconds that a layer takes whose experts stream their union, from measurements on an H100, where that takes so long from
/// memory.
pub(super) fn few_us(
    device: &Device,
    neurons: &Neurons,
    dtype: DType,
    num_tokens: usize,
    union_us: f64,
) -> f64 {
    let launch = Launch::new(device, neurons, dtype, num_tokens);
    match experts_one::Shape::new(device, &launch) {
        Some(_) => 7.7 + 0.95 * union_us,
        None => 9.7 + 0.96 * union_us + 0.4 * num_tokens as f64,
    }
}

/// Microseconds that both products for many tokens take, from measurements on an H100, where so many pairs exist of
/// `max_pairs` that there could be.
pub(super) fn many_us(
    device: &Device,
    neurons: &Neurons,
    dtype: DType,
    num_tokens: usize,
    max_pairs: usize,
    pairs: f64,
) -> f64 {
    experts_many_ways::products_us(
        &Launch::new(device, neurons, dtype, num_tokens),
        max_pairs,
        pairs,
    )
}

fn without_addresses(neurons: moefy_neurons) -> moefy_experts_params {
    moefy_experts_params { neurons, ..bytemuck::Zeroable::zeroed() }
}

fn tiled_params(
    check: &Arguments<'_>,
    params: &moefy_experts_params,
    tiles: &TokenTiles,
) -> Result<moefy_experts_tiled_params> {
    let (num_tokens, num_experts) =
        (params.num_tokens as usize, params.neurons.num_experts as usize);
    let num_tiles = num_tokens.div_ceil(TILE_TOKENS);
    let words = |name, view, shape| check.dense(name, view, Format::Word, shape);
    Ok(moefy_experts_tiled_params {
        neurons: params.neurons,
        x: params.x,
        y: params.y,
        gates: params.gates,
        num_valid_tokens: params.num_valid_tokens,
        token_ids: words("token_ids of tiles", tiles.token_ids, [1, num_tokens])?,
        tile_counts: words("counts of tiles", tiles.counts, [1, num_tiles])?,
        tile_expert_ids: words("expert_ids of tiles", tiles.expert_ids, [num_tiles, num_experts])?,
        tile_masks: words("masks of tiles", tiles.masks, [num_tiles, num_experts * TILE_WORDS])?,
        num_tokens: params.num_tokens,
        ..bytemuck::Zeroable::zeroed()
    })
}
