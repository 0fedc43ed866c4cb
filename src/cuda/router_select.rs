//! Scores and selection of a router.

use super::driver::{Function, RawStream};
use super::ffn_few::FirstLayer;
use super::kernels::{Modules, PerDType};
use super::select::{
    SelectOutputs, abi_selection, check_num_experts, launch_select, selection_words,
};
use super::view::{Arguments, Format, View, Workspace};
use super::{Device, RouterView, router_block, router_few, router_many};
use crate::abi::{
    MOEFY_ROUTER_TILE, moefy_ffn_few_params, moefy_router_activation, moefy_router_kind,
    moefy_router_layer_params, moefy_router_select_params, moefy_select_params, moefy_selection,
};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{MlpKind, Selection};

/// Up to here the rows of the first layer are dealt out, and each is read once for eight tokens: beyond,
/// tiles read the weights less often.
const MAX_FEW_TOKENS: usize = 1024;
pub(super) const MAX_FEW_EXPERTS: usize = 512;
/// What every supported device gives to a block without being asked.
const MAX_FEW_SHARED_BYTES: usize = 48 << 10;
/// Rows of a block of the first layer.
const FIRST_ROWS: u32 = 4;
/// Tokens of its variants.
const FIRST_TOKENS: [u32; 2] = [1, 8];
/// Threads of a block of the second kernel.
const SELECT_THREADS: u32 = 512;
/// From here on a layer is a product on tensor cores, where the types allow it ...
const MIN_PRODUCT_TOKENS: u32 = 96;
/// ... of so many outputs a block: narrow ones fill the chip, wide ones read the tokens less often.
const PRODUCT_OUTPUTS: [u32; 2] = [32, 128];
const MIN_WIDE_TOKENS: u32 = 4096;
const PRODUCT_STAGES: u32 = 4;
/// Bytes of a row of a stage.
const PRODUCT_ROW_BYTES: u32 = 128;
pub(super) struct Kernels {
    first: [PerDType; 2],
    select: PerDType,
    select_shared_bytes: usize,
    layer: PerDType,
    hidden_f16: Function,
    hidden_bf16: Function,
    /// Of f16, then of bf16.
    product: [[Function; 2]; 2],
}

impl Kernels {
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Self> {
        // Some of it is the kernel's own.
        let select_shared_bytes = max_shared_bytes.saturating_sub(1 << 10);
        let module = "router_select";
        let load = |names, shared_bytes| modules.per_dtype(module, names, shared_bytes);
        let one =
            ["moefy_router_first_f32_1", "moefy_router_first_f16_1", "moefy_router_first_bf16_1"];
        let eight =
            ["moefy_router_first_f32_8", "moefy_router_first_f16_8", "moefy_router_first_bf16_8"];
        let select =
            ["moefy_router_select_f32", "moefy_router_select_f16", "moefy_router_select_bf16"];
        let layer = ["moefy_router_layer_f32", "moefy_router_layer_f16", "moefy_router_layer_bf16"];
        Ok(Self {
            first: [load(one, 0)?, load(eight, 0)?],
            select: load(select, select_shared_bytes)?,
            select_shared_bytes,
            layer: load(layer, 0)?,
            hidden_f16: modules.function(module, "moefy_router_layer_hidden_f16", 0)?,
            hidden_bf16: modules.function(module, "moefy_router_layer_hidden_bf16", 0)?,
            product: [
                ["moefy_router_product_f16_32", "moefy_router_product_f16_128"],
                ["moefy_router_product_bf16_32", "moefy_router_product_bf16_128"],
            ]
            .map(|names| product(modules, names))
            .into_iter()
            .collect::<Result<Vec<_>>>()?
            .try_into()
            .unwrap_or_else(|_| unreachable!("two types")),
        })
    }

    /// The first layer of at least so many tokens on tensor cores, if its types and sizes allow it.
    fn product(&self, dtype: DType, layer: &moefy_router_layer_params) -> Option<(&Function, u32)> {
        let kernels = match dtype {
            DType::F32 => return None,
            DType::F16 => &self.product[0],
            DType::BF16 => &self.product[1],
        };
        let aligned = layer.in_width.is_multiple_of(8) && layer.in_stride.is_multiple_of(8);
        let wide = usize::from(layer.num_tokens >= MIN_WIDE_TOKENS);
        (aligned && layer.num_tokens >= MIN_PRODUCT_TOKENS)
            .then_some((&kernels[wide], PRODUCT_OUTPUTS[wide]))
    }

    /// The layer whose input is f32 and whose weights are `dtype`.
    fn layer_after_hidden(&self, dtype: DType) -> &Function {
        match dtype {
            DType::F32 => self.layer.get(dtype),
            DType::F16 => &self.hidden_f16,
            DType::BF16 => &self.hidden_bf16,
        }
    }
}

fn product(modules: &Modules, names: [&'static str; 2]) -> Result<[Function; 2]> {
    let load = |which: usize| {
        let shared_bytes = product_shared_bytes(PRODUCT_OUTPUTS[which]);
        modules.function("router_product", names[which], shared_bytes)
    };
    Ok([load(0)?, load(1)?])
}

fn product_shared_bytes(outputs: u32) -> usize {
    (PRODUCT_STAGES * (MOEFY_ROUTER_TILE + outputs) * PRODUCT_ROW_BYTES) as usize
}

/// What [`router_select`] writes.
#[derive(Clone, Copy, Debug)]
pub struct RouterSelectOutputs {
    /// Masks, counts and status, as of [`select`](super::select).
    pub selected: SelectOutputs,
    /// r, f32 \[num_tokens, E\].
    pub scores: Option<View>,
}

/// Bytes of workspace that [`router_select`] needs for at most `num_tokens` tokens, scores wanted or
/// not.
pub fn router_select_workspace_bytes(num_tokens: usize, router: &RouterView) -> usize {
    let (hidden, num_experts) = (router.hidden(), router.num_experts());
    num_tokens.saturating_mul(hidden.saturating_add(num_experts)).saturating_mul(4)
}

/// Shared memory of the second kernel for few tokens, without and with its weights, if they are few and
/// their rows aligned.
fn few_shared_bytes(
    [num_tokens, tokens_each]: [usize; 2],
    d_model: usize,
    dtype: DType,
    router: &RouterView,
    selection: &moefy_selection,
) -> Option<[usize; 2]> {
    let (num_experts, hidden) = (router.num_experts(), router.hidden());
    if num_tokens > MAX_FEW_TOKENS || num_experts > MAX_FEW_EXPERTS {
        return None;
    }
    let bytes = 4
        * (tokens_each * (first_row_words(router)? + num_experts.next_multiple_of(32))
            + selection_words(selection, num_experts));
    let weights = num_experts.checked_mul(hidden)?.checked_mul(dtype.bytes())?;
    let is_aligned = d_model.is_multiple_of(8) && hidden.is_multiple_of(8);
    (is_aligned && bytes <= MAX_FEW_SHARED_BYTES).then_some([bytes, bytes.checked_add(weights)?])
}

/// Words that the outputs of the first layer take of shared memory.
fn first_row_words(router: &RouterView) -> Option<usize> {
    let width = if router.hidden() == 0 { router.num_experts() } else { router.hidden() };
    width.checked_next_multiple_of(128)
}

/// What [`router_select`] launches for tokens of a number.
pub(super) enum Launches {
    /// One kernel, which lets the next one begin when x is there.
    Block(router_block::Shape),
    /// One kernel.
    Many(router_many::Shape),
    /// A kernel for few tokens, or several.
    Others,
}

impl Launches {
    fn new(device: &Device, dtype: DType, params: &moefy_router_select_params) -> Self {
        if let Some(shape) = router_block::Shape::new(device, dtype, params) {
            return Self::Block(shape);
        }
        router_many::Shape::new(device, dtype, params).map_or(Self::Others, Self::Many)
    }

    /// For so many tokens without gaps.
    ///
    /// # Errors
    /// On parameters that do not fit.
    pub(super) fn of(
        device: &Device,
        num_tokens: usize,
        dtype: DType,
        router: &RouterView,
        selection: &Selection,
    ) -> Result<Self> {
        let check = Arguments { device, op: "router_select" };
        // It could be anywhere.
        let x = router.first().address;
        let x = View::matrix(x, Format::Float(dtype), [num_tokens, router.d_model()]);
        let (params, dtype) = check_router(&check, x, None, router, selection)?;
        Ok(Self::new(device, dtype, &params))
    }
}

/// Whether [`router_select`] takes one launch for so many tokens without gaps: many tokens of 16 bits on Hopper do, unless
/// the router is too wide.
///
/// # Errors
/// On parameters that do not fit.
pub fn router_select_is_one_launch(
    device: &Device,
    num_tokens: usize,
    dtype: DType,
    router: &RouterView,
    selection: &Selection,
) -> Result<bool> {
    let launches = Launches::of(device, num_tokens, dtype, router, selection)?;
    Ok(!matches!(launches, Launches::Others))
}

/// When a kernel begins that is launched next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NextBegins {
    /// When x is there, and not sooner.
    WithTokens,
    /// Perhaps sooner.
    Anytime,
}

/// Scores r and selection S(t) of tokens x \[num_tokens, d_model\], whose rows may lie apart. The
/// scores are computed and compared in f32. Rows whose width is a multiple of 8, of x and of the
/// weights, must begin at multiples of 16 bytes. Rows at and beyond the device-side
/// `num_valid_tokens` (u32 \[1, 1\]) select nothing, and their scores are zeros.
///
/// # Errors
/// For more than 4096 experts, and on any argument that does not fit; nothing was launched then.
///
/// # Safety
/// As for [`select`](super::select).
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, parameters, workspace")]
pub unsafe fn router_select(
    device: &Device,
    stream: RawStream,
    outputs: &RouterSelectOutputs,
    x: View,
    num_valid_tokens: Option<View>,
    router: &RouterView,
    selection: &Selection,
    workspace: Workspace,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        router_select_by(
            device,
            stream,
            outputs,
            x,
            num_valid_tokens,
            router,
            selection,
            None,
            workspace,
        )?;
    }
    Ok(())
}

/// The same, but `imposed`, f32 \[num_tokens, E\], is what selection reads; the router runs all the same.
///
/// # Safety
/// As for [`router_select`].
#[expect(clippy::too_many_arguments, reason = "outputs, inputs, parameters, workspace")]
pub(super) unsafe fn router_select_by(
    device: &Device,
    stream: RawStream,
    outputs: &RouterSelectOutputs,
    x: View,
    num_valid_tokens: Option<View>,
    router: &RouterView,
    selection: &Selection,
    imposed: Option<View>,
    workspace: Workspace,
) -> Result<NextBegins> {
    let check = Arguments { device, op: "router_select" };
    let (params, dtype) = check_router(&check, x, num_valid_tokens, router, selection)?;
    let (num_tokens, num_experts) = (x.shape[0], router.num_experts());
    let scores = match outputs.scores {
        Some(scores) => check.dense("scores", scores, Format::F32, [num_tokens, num_experts])?,
        None => 0,
    };
    let needed = router_select_workspace_bytes(num_tokens, router);
    let selected = outputs.selected;
    let mask = [num_tokens, num_experts.div_ceil(32)];
    let params = moefy_router_select_params {
        first: check.workspace(workspace, needed)?,
        scores,
        imposed: match imposed {
            Some(imposed) => {
                let shape = [num_tokens, num_experts];
                check.dense("imposed scores", imposed, Format::F32, shape)?
            }
            None => 0,
        },
        mask: check.dense("mask", selected.mask, Format::Word, mask)?,
        counts: check.optional_words("counts", selected.counts, num_tokens)?,
        status: check.optional_words("status", selected.status, 1)?,
        ..params
    };
    if num_tokens == 0 {
        return Ok(NextBegins::Anytime);
    }
    device.context.bind()?;
    // SAFETY: the arguments were checked, the rest is the caller's promise.
    unsafe {
        match Launches::new(device, dtype, &params) {
            Launches::Block(shape) => {
                shape.launch(stream, dtype, &params)?;
                return Ok(NextBegins::WithTokens);
            }
            Launches::Many(shape) => {
                shape.launch(stream, dtype, &params)?;
                return Ok(NextBegins::Anytime);
            }
            Launches::Others => {}
        }
        if let Some(kernel) = router_few::launch_of(device, x, &params, dtype) {
            kernel.run(stream, &params)?;
            return Ok(NextBegins::Anytime);
        }
        // One block fits a multiprocessor.
        let tokens_each = num_tokens.div_ceil(device.properties().multiprocessors);
        let counts = [num_tokens, tokens_each];
        match few_shared_bytes(counts, x.shape[1], dtype, router, &params.selection) {
            Some([without, with]) => {
                let kernels = &device.router_select;
                launch_first(device, stream, &params, dtype)?;
                let has_room = with <= kernels.select_shared_bytes;
                let shared_bytes = if has_room { with } else { without };
                let params = moefy_router_select_params {
                    w2_in_shared: (has_room && params.w2 != 0).into(),
                    ..params
                };
                let grid = [num_tokens.div_ceil(tokens_each) as u32, 1, 1];
                let kernel = kernels.select.get(dtype);
                kernel.launch(stream, grid, SELECT_THREADS, shared_bytes, &params)?;
            }
            None => launch_many(device, stream, &params, dtype)?,
        }
    }
    Ok(NextBegins::Anytime)
}

/// What the kernels take of tokens, router and rule; outputs and workspace are null.
pub(super) fn check_router(
    check: &Arguments<'_>,
    x: View,
    num_valid_tokens: Option<View>,
    router: &RouterView,
    selection: &Selection,
) -> Result<(moefy_router_select_params, DType)> {
    let [num_tokens, d_model] = x.shape;
    let (num_experts, hidden) = (router.num_experts(), router.hidden());
    check_num_experts(check, num_experts)?;
    let dtype = match x.format {
        Format::Float(dtype) => dtype,
        Format::Word => return Err(check.error("x", "of type f32, f16 or bf16", x.format)),
    };
    let alignment = |width: usize| if width.is_multiple_of(8) { 16 } else { dtype.bytes() };
    let weight = |name, view: View, shape: [usize; 2]| {
        check.dense(name, view, x.format, shape)?;
        check.strided(name, view, x.format, shape, alignment(shape[1]))
    };
    let (kind, w1, w2, w1_scale) = match *router {
        RouterView::Linear { w } => {
            let w = weight("w", w, [num_experts, d_model])?;
            (moefy_router_kind::MOEFY_ROUTER_LINEAR, w, 0, 0)
        }
        RouterView::Mlp { kind, w1, w2 } => {
            if hidden == 0 {
                return Err(check.error("w1", "at least one hidden unit", 0));
            }
            let w1 = weight("w1", w1, [hidden, d_model])?;
            let w2 = weight("w2", w2, [num_experts, hidden])?;
            let kind = match kind {
                MlpKind::D2dMoe => moefy_router_kind::MOEFY_ROUTER_D2DMOE,
                MlpKind::Moefication => moefy_router_kind::MOEFY_ROUTER_MOEFICATION,
            };
            (kind, w1, w2, 0)
        }
        RouterView::Centroid { centroids, inverse_norms } => {
            let w = weight("centroids", centroids, [num_experts, d_model])?;
            let shape = [1, num_experts];
            let norms = check.dense("inverse_norms", inverse_norms, Format::F32, shape)?;
            (moefy_router_kind::MOEFY_ROUTER_CENTROID, w, 0, norms)
        }
    };
    let params = moefy_router_select_params {
        x: check.strided("x", x, x.format, x.shape, alignment(d_model))?,
        w1,
        w2,
        w1_scale,
        num_valid_tokens: check.optional_words("num_valid_tokens", num_valid_tokens, 1)?,
        x_stride: x.row_stride as u64,
        selection: abi_selection(selection, num_experts)?,
        kind,
        d_model: check.size("d_model", d_model)?,
        hidden: check.size("hidden", hidden)?,
        num_experts: num_experts as u32,
        num_tokens: check.size("num_tokens", num_tokens)?,
        ..bytemuck::Zeroable::zeroed()
    };
    Ok((params, dtype))
}

/// The first layer for few tokens, by the fastest kernel that can.
///
/// # Safety
/// The addresses must lead to what the parameters say, of at least one token, and the context must be
/// bound.
unsafe fn launch_first(
    device: &Device,
    stream: RawStream,
    params: &moefy_router_select_params,
    dtype: DType,
) -> Result<()> {
    let width = first_width(params);
    let [tokens, d_model, outputs] = [params.num_tokens, params.d_model, width].map(|n| n as usize);
    // That kernel takes rows without gaps.
    if params.x_stride == u64::from(params.d_model)
        && let Some(layer) = FirstLayer::new(device, dtype, tokens, d_model, outputs)
    {
        let params = moefy_ffn_few_params { router: *params, ..bytemuck::Zeroable::zeroed() };
        // SAFETY: the caller's promise.
        return unsafe { layer.launch(stream, &params) };
    }
    let size = usize::from(params.num_tokens > 1);
    let grid = [width.div_ceil(FIRST_ROWS), params.num_tokens.div_ceil(FIRST_TOKENS[size]), 1];
    let kernel = device.router_select.first[size].get(dtype);
    // SAFETY: the caller's promise.
    unsafe { kernel.launch(stream, grid, 32 * FIRST_ROWS, 0, params) }
}

/// What follows the layers of a router.
fn activations(
    kind: moefy_router_kind,
) -> (moefy_router_activation, Option<moefy_router_activation>) {
    use moefy_router_activation as Activation;
    use moefy_router_kind as Kind;
    match kind {
        Kind::MOEFY_ROUTER_LINEAR => (Activation::MOEFY_ROUTER_ACTIVATION_ABS, None),
        Kind::MOEFY_ROUTER_D2DMOE => (
            Activation::MOEFY_ROUTER_ACTIVATION_RELU,
            Some(Activation::MOEFY_ROUTER_ACTIVATION_ABS),
        ),
        Kind::MOEFY_ROUTER_MOEFICATION => (
            Activation::MOEFY_ROUTER_ACTIVATION_TANH,
            Some(Activation::MOEFY_ROUTER_ACTIVATION_SIGMOID),
        ),
        _ => (Activation::MOEFY_ROUTER_ACTIVATION_RELU, None),
    }
}

/// Outputs of the first layer.
pub(super) fn first_width(params: &moefy_router_select_params) -> u32 {
    if params.w2 == 0 { params.num_experts } else { params.hidden }
}

/// Tokens → `out`, the hidden units or the scores.
fn first_layer(params: &moefy_router_select_params, out: u64) -> moefy_router_layer_params {
    use moefy_router_kind as Kind;
    let unit_norm =
        matches!(params.kind, Kind::MOEFY_ROUTER_MOEFICATION | Kind::MOEFY_ROUTER_CENTROID);
    moefy_router_layer_params {
        in_: params.x,
        w: params.w1,
        w_scale: params.w1_scale,
        out,
        num_valid_tokens: params.num_valid_tokens,
        in_stride: params.x_stride,
        activation: activations(params.kind).0,
        unit_norm: unit_norm.into(),
        num_tokens: params.num_tokens,
        in_width: params.d_model,
        out_width: first_width(params),
        reserved: 0,
    }
}

/// A layer whose inputs have the type of its weights.
///
/// # Safety
/// The addresses must lead to what the parameters say, of at least one token, and the context must be
/// bound.
unsafe fn launch_layer(
    device: &Device,
    stream: RawStream,
    dtype: DType,
    layer: &moefy_router_layer_params,
) -> Result<()> {
    let kernels = &device.router_select;
    let (kernel, outputs, shared_bytes) = match kernels.product(dtype, layer) {
        Some((kernel, outputs)) => (kernel, outputs, product_shared_bytes(outputs)),
        None => (kernels.layer.get(dtype), MOEFY_ROUTER_TILE, 0),
    };
    let across = layer.num_tokens.div_ceil(MOEFY_ROUTER_TILE);
    let grid = [across, layer.out_width.div_ceil(outputs), 1];
    // SAFETY: the caller's promise.
    unsafe { kernel.launch(stream, grid, 256, shared_bytes, layer) }
}

/// One product per layer, then the selection.
unsafe fn launch_many(
    device: &Device,
    stream: RawStream,
    params: &moefy_router_select_params,
    dtype: DType,
) -> Result<()> {
    let (_, second) = activations(params.kind);
    let (num_tokens, hidden) = (params.num_tokens, params.first);
    let scores = match params.scores {
        0 => hidden + 4 * u64::from(num_tokens) * u64::from(params.hidden),
        scores => scores,
    };
    let first_layer = first_layer(params, if second.is_some() { hidden } else { scores });
    // SAFETY: the caller's promise.
    unsafe { launch_layer(device, stream, dtype, &first_layer)? };
    if let Some(activation) = second {
        let second_layer = moefy_router_layer_params {
            in_: hidden,
            w: params.w2,
            w_scale: 0,
            out: scores,
            in_stride: params.hidden.into(),
            activation,
            unit_norm: 0,
            in_width: params.hidden,
            out_width: params.num_experts,
            ..first_layer
        };
        let tiles = |n: u32| n.div_ceil(MOEFY_ROUTER_TILE);
        let grid = [tiles(num_tokens), tiles(params.num_experts), 1];
        let kernel = device.router_select.layer_after_hidden(dtype);
        // SAFETY: as above.
        unsafe { kernel.launch(stream, grid, 256, 0, &second_layer)? };
    }
    let select = moefy_select_params {
        scores: if params.imposed == 0 { scores } else { params.imposed },
        mask: params.mask,
        counts: params.counts,
        status: params.status,
        num_valid_tokens: params.num_valid_tokens,
        score_stride: params.num_experts.into(),
        selection: params.selection,
        num_tokens,
        num_experts: params.num_experts,
        ..bytemuck::Zeroable::zeroed()
    };
    unsafe { launch_select(device, stream, &select) }
}
