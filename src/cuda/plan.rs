//! How a MoEfied FFN runs: which path, in which workspace.

use std::sync::Arc;

use super::dense::{Dense, DenseLayer, DenseRun, dense_workspace_bytes};
use super::driver::RawStream;
use super::statistics::Counters;
use super::view::{Arguments, Format, View, Workspace};
use super::workspace::Layout;
use super::{
    Buffer, ExpertLists, ExpertsInputs, MoeFfn, RouteIndexOutputs, RouterSelectOutputs,
    RoutingCounts, SelectOutputs, experts, experts_workspace_bytes, gates, padding, route_index,
    router_select, router_select_workspace_bytes, select,
};
use crate::abi::{moefy_clear_invalid_params, moefy_split_valid_params};
use crate::error::Result;
use crate::ffn::{Gate, SelectionRule};

/// Tokens that go through the layer together; more go in turns, so that the workspace is bounded.
const MAX_CHUNK: usize = 8192;
/// Bytes of h of the experts that a chunk may have.
const MAX_HIDDEN_BYTES: usize = 512 << 20;
/// Tokens up to which `auto` streams the union of the experts.
const MAX_FEW_TOKENS: usize = 8;

/// A way to compute the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// `few`: streams the union of the tokens' experts.
    Few,
    /// `expert-major`: each expert with its own tokens.
    ExpertMajor,
    /// `dense-exact`: the original FFN.
    DenseExact,
    /// `dense-masked`: the function of the experts, computed densely.
    DenseMasked,
}

impl Path {
    /// Every path.
    pub const ALL: [Self; 4] = [Self::Few, Self::ExpertMajor, Self::DenseExact, Self::DenseMasked];

    /// Its name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Few => "few",
            Self::ExpertMajor => "expert-major",
            Self::DenseExact => "dense-exact",
            Self::DenseMasked => "dense-masked",
        }
    }
}

/// What runs where the dense products are faster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The original FFN, without a router: at least as accurate as the sparse one.
    #[default]
    Exact,
    /// The sparse layer's own function: one function at every number of tokens.
    Masked,
}

/// What a plan may choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanOptions {
    /// Always this path; `None` chooses by the number of tokens.
    pub path: Option<Path>,
    /// What a choice may fall back to.
    pub fallback: Fallback,
    /// Whether to count what selection does.
    pub statistics: bool,
}

/// What a sparse run does, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Route,
    Index,
    Experts,
}

/// What a run reads.
#[derive(Clone, Copy, Debug)]
pub struct FfnInputs {
    /// \[num_tokens, d_model\], without gaps, aligned to 16 bytes, of the weights' element type.
    pub x: View,
    /// u32 \[1, 1\]: rows at and beyond it are padding and come back as zeros.
    pub num_valid_tokens: Option<View>,
    /// f32 \[num_tokens, num_experts\]: selection reads these scores instead of the router's, which
    /// runs all the same. For measurements under imposed routing.
    pub scores: Option<View>,
    /// One word that gains status bits; see [`SelectOutputs`] and [`RouteIndexOutputs`].
    pub status: Option<View>,
}

impl FfnInputs {
    /// Nothing but tokens.
    pub fn new(x: View) -> Self {
        Self { x, num_valid_tokens: None, scores: None, status: None }
    }
}

/// A layer that is ready to run up to a number of tokens.
pub struct FfnPlan {
    ffn: Arc<MoeFfn>,
    max_tokens: usize,
    options: PlanOptions,
    places: Places,
    dense: Option<Dense>,
    counters: Option<Counters>,
}

/// Places in the workspace, of one chunk but for `valid`.
#[derive(Clone, Copy, Debug)]
struct Places {
    chunk: usize,
    max_k: usize,
    valid: u64,
    mask: u64,
    scores: u64,
    counts: u64,
    offsets: u64,
    token_ids: u64,
    expert_masks: u64,
    union_ids: u64,
    num_union: u64,
    /// Of whatever runs: one after another.
    op: u64,
    bytes: usize,
}

impl MoeFfn {
    /// Makes the layer ready for at most `max_tokens` tokens. Times the algorithms of dense products
    /// if they may run, and waits for the device.
    ///
    /// # Errors
    /// When the sizes overflow, cuBLASLt is needed and missing, or the device has too little memory
    /// to time products.
    pub fn plan(self: &Arc<Self>, max_tokens: usize, options: PlanOptions) -> Result<FfnPlan> {
        let mut plan = FfnPlan {
            ffn: self.clone(),
            max_tokens,
            options,
            places: self.places(max_tokens, &options)?,
            dense: None,
            counters: None,
        };
        if options.statistics {
            plan.counters = Some(Counters::new(self.device(), self.neurons().num_experts)?);
        }
        if let Some(layer) = self.dense_layer_of(max_tokens, &options)? {
            plan.dense = Some(plan.tune(layer)?);
        }
        Ok(plan)
    }

    /// The path for so many tokens.
    fn path(num_tokens: usize, options: &PlanOptions) -> Path {
        match (options.path, options.fallback) {
            (Some(path), _) => path,
            (None, _) if num_tokens <= MAX_FEW_TOKENS => Path::Few,
            (None, Fallback::Exact) => Path::DenseExact,
            (None, Fallback::Masked) => Path::DenseMasked,
        }
    }

    fn dense_layer_of(&self, tokens: usize, options: &PlanOptions) -> Result<Option<DenseLayer>> {
        match Self::path(tokens, options) {
            _ if tokens == 0 => Ok(None),
            Path::DenseExact => self.exact().map(Some),
            Path::DenseMasked => self.masked().map(Some),
            Path::Few | Path::ExpertMajor => Ok(None),
        }
    }

    fn places(&self, max_tokens: usize, options: &PlanOptions) -> Result<Places> {
        let check = Arguments { device: self.device(), op: "plan" };
        let neurons = self.neurons();
        let num_experts = neurons.num_experts;
        check.size("max_tokens", max_tokens)?;
        let max_k = match self.selection().rule {
            SelectionRule::TopK { k } => k,
            _ => num_experts,
        };
        let max_k = max_k.min(self.selection().max_experts.unwrap_or(num_experts));
        let mut chunk = max_tokens.min(MAX_CHUNK);
        let hidden_row = neurons.expert_width.next_multiple_of(8) * self.dtype().bytes() * max_k;
        while chunk > 1024 && chunk * hidden_row > MAX_HIDDEN_BYTES {
            chunk /= 2;
        }
        let mut places = Places {
            chunk,
            max_k,
            valid: 0,
            mask: 0,
            scores: 0,
            counts: 0,
            offsets: 0,
            token_ids: 0,
            expert_masks: 0,
            union_ids: 0,
            num_union: 0,
            op: 0,
            bytes: 0,
        };
        let op = self.op_bytes(&places, max_tokens, options)?;
        let mut layout = Layout::default();
        let mut place = |count: usize| layout.place(count, 4);
        let mut fill = || {
            places.valid = place(max_tokens.div_ceil(chunk.max(1)))?;
            places.mask = place(chunk * num_experts.div_ceil(32))?;
            places.scores = place(chunk.checked_mul(num_experts)?)?;
            places.counts = place(num_experts)?;
            places.offsets = place(num_experts + 1)?;
            places.token_ids = place(chunk.checked_mul(max_k)?)?;
            places.expert_masks = place(num_experts.checked_mul(chunk.div_ceil(32))?)?;
            places.union_ids = place(num_experts)?;
            places.num_union = place(1)?;
            places.op = place(op?.div_ceil(4))?;
            Some(())
        };
        fill().ok_or_else(|| {
            check.error("max_tokens", "such that the workspace can exist", max_tokens)
        })?;
        places.bytes = layout.bytes();
        Ok(places)
    }

    /// Workspace of the operations of a chunk.
    fn op_bytes(
        &self,
        places: &Places,
        max_tokens: usize,
        options: &PlanOptions,
    ) -> Result<Option<usize>> {
        let neurons = self.neurons();
        let router = self.router().view();
        let routing = router_select_workspace_bytes(places.chunk, neurons.d_model(), &router);
        let mut bytes = Some(routing);
        let mut include = |other: Option<usize>| bytes = bytes.zip(other).map(|(a, b)| a.max(b));
        let sparse = |tokens, path| {
            let lists = places.lists(0, path, neurons.num_experts, tokens);
            experts_workspace_bytes(self.device(), neurons, tokens, &lists)
        };
        let at_most = Self::path(max_tokens, options);
        if let Some(layer) = self.dense_layer_of(max_tokens, options)? {
            include(dense_workspace_bytes(&layer, places.chunk));
        } else {
            include(Some(sparse(places.chunk, at_most)?));
        }
        if options.path.is_none() {
            include(Some(sparse(MAX_FEW_TOKENS.min(max_tokens), Path::Few)?));
        }
        Ok(bytes)
    }
}

impl Places {
    fn lists(&self, base: u64, path: Path, num_experts: usize, tokens: usize) -> ExpertLists {
        match path {
            Path::Few => ExpertLists::Union {
                union_ids: View::words(base + self.union_ids, num_experts),
                num_union: View::words(base + self.num_union, 1),
            },
            _ => ExpertLists::Tokens {
                offsets: View::words(base + self.offsets, num_experts + 1),
                token_ids: View::words(base + self.token_ids, tokens * self.max_k),
            },
        }
    }
}

impl FfnPlan {
    /// The same plan for another layer with the same sizes, without timing anything again.
    ///
    /// # Errors
    /// When the layer differs in size, type, activation, biases, selection or gate.
    pub fn with_ffn(&self, ffn: &Arc<MoeFfn>) -> Result<Self> {
        if !self.ffn.is_like(ffn) {
            let check = Arguments { device: self.ffn.device(), op: "plan" };
            return Err(check.error("ffn", "of the sizes and rules of the plan's", "another"));
        }
        let layer = ffn.dense_layer_of(self.max_tokens, &self.options)?;
        let dense = match (&self.dense, layer) {
            (Some(dense), Some(layer)) => Some(dense.with_layer(layer)?),
            _ => None,
        };
        let counters = match &self.counters {
            Some(_) => Some(Counters::new(ffn.device(), ffn.neurons().num_experts)?),
            None => None,
        };
        Ok(Self { ffn: ffn.clone(), dense, counters, ..*self })
    }

    /// Bytes of workspace that a run needs.
    pub fn workspace_bytes(&self) -> usize {
        self.places.bytes
    }

    /// The path that a run of so many tokens takes.
    pub fn path(&self, num_tokens: usize) -> Path {
        MoeFfn::path(num_tokens, &self.options)
    }

    /// The layer.
    pub fn ffn(&self) -> &Arc<MoeFfn> {
        &self.ffn
    }

    /// What selection did so far, read while streams run on. `None` without
    /// [`PlanOptions::statistics`].
    ///
    /// # Errors
    /// When an earlier kernel failed.
    pub fn statistics(&self) -> Result<Option<RoutingCounts>> {
        self.counters.as_ref().map(|counters| counters.read(self.ffn.device())).transpose()
    }

    /// y \[num_tokens, d_model\] of `inputs`. Every element of y is written.
    ///
    /// # Errors
    /// On any argument that does not fit, and for more than the plan's tokens; nothing was launched
    /// then.
    ///
    /// # Safety
    /// As for [`select`](super::select).
    pub unsafe fn run(
        &self,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        workspace: Workspace,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.run_until(Stage::Experts, stream, y, inputs, workspace) }
    }

    /// Stops after a stage, to see what each costs.
    ///
    /// # Safety
    /// As for [`Self::run`].
    pub(super) unsafe fn run_until(
        &self,
        last: Stage,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        workspace: Workspace,
    ) -> Result<()> {
        let neurons = self.ffn.neurons();
        let check = Arguments { device: self.ffn.device(), op: "moe_ffn" };
        let num_tokens = inputs.x.shape[0];
        if num_tokens > self.max_tokens {
            let expected = format!("at most the plan's {}", self.max_tokens);
            return Err(check.error("num_tokens", expected, num_tokens));
        }
        let (float, shape) = (Format::Float(self.ffn.dtype()), [num_tokens, neurons.d_model()]);
        check.dense("x", inputs.x, float, shape)?;
        check.dense("y", y, float, shape)?;
        if let Some(scores) = inputs.scores {
            check.dense("scores", scores, Format::F32, [num_tokens, neurons.num_experts])?;
        }
        let num_valid = check.optional_words("num_valid_tokens", inputs.num_valid_tokens, 1)?;
        let base = check.workspace(workspace, self.workspace_bytes())?;
        if num_tokens == 0 {
            return Ok(());
        }
        check.address("x", inputs.x.address, 16)?;
        check.address("y", y.address, 16)?;
        self.ffn.device().context.bind()?;
        let path = self.path(num_tokens);
        let chunks = num_tokens.div_ceil(self.places.chunk);
        // SAFETY: the caller's promise; the workspace is as large as it must be.
        unsafe {
            if num_valid != 0 && chunks > 1 {
                let params = moefy_split_valid_params {
                    num_valid_tokens: num_valid,
                    of_chunk: base + self.places.valid,
                    chunk_tokens: self.places.chunk as u32,
                    num_chunks: chunks as u32,
                };
                padding::split_valid(self.ffn.device(), stream, &params)?;
            }
            for chunk in 0..chunks {
                let first = chunk * self.places.chunk;
                let tokens = (num_tokens - first).min(self.places.chunk);
                let rows = |view: View| rows(view, first, tokens);
                let valid = match (num_valid, chunks) {
                    (0, _) => None,
                    (address, 1) => Some(View::words(address, 1)),
                    _ => Some(View::words(base + self.places.valid + 4 * chunk as u64, 1)),
                };
                let inputs = FfnInputs {
                    x: rows(inputs.x),
                    scores: inputs.scores.map(rows),
                    num_valid_tokens: valid,
                    ..*inputs
                };
                self.run_chunk(last, stream, path, rows(y), &inputs, base)?;
            }
        }
        Ok(())
    }

    unsafe fn run_chunk(
        &self,
        last: Stage,
        stream: RawStream,
        path: Path,
        y: View,
        inputs: &FfnInputs,
        base: u64,
    ) -> Result<()> {
        let (ffn, neurons) = (&self.ffn, self.ffn.neurons());
        let num_tokens = inputs.x.shape[0];
        let op = Workspace {
            address: base + self.places.op,
            bytes: self.places.bytes - self.places.op as usize,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if path == Path::DenseExact {
                return self.run_dense(stream, y, inputs, [0, 0], op);
            }
            let (mask, gates) = self.route(stream, inputs, base, op)?;
            if last == Stage::Route {
                return Ok(());
            }
            if path == Path::DenseMasked {
                let gates = gates.map_or(0, |gates| gates.address);
                return self.run_dense(stream, y, inputs, [mask.address, gates], op);
            }
            let words = |place, len| View::words(base + place, len);
            let num_experts = neurons.num_experts;
            let places = &self.places;
            let outputs = RouteIndexOutputs {
                counts: words(places.counts, num_experts),
                offsets: words(places.offsets, num_experts + 1),
                token_ids: words(places.token_ids, num_tokens * places.max_k),
                expert_masks: View::matrix(
                    base + places.expert_masks,
                    Format::Word,
                    [num_experts, num_tokens.div_ceil(32)],
                ),
                union_ids: words(places.union_ids, num_experts),
                num_union: words(places.num_union, 1),
                status: inputs.status,
            };
            let valid = inputs.num_valid_tokens;
            let device = ffn.device();
            route_index(device, stream, &outputs, mask, num_experts, valid, Workspace::NONE)?;
            if last == Stage::Index {
                return Ok(());
            }
            let lists = places.lists(base, path, num_experts, num_tokens);
            let inputs = ExpertsInputs { x: inputs.x, mask, gates, num_valid_tokens: valid, lists };
            experts(device, stream, y, neurons, &inputs, op)
        }
    }

    /// Masks, and gates where they are not 1.
    unsafe fn route(
        &self,
        stream: RawStream,
        inputs: &FfnInputs,
        base: u64,
        op: Workspace,
    ) -> Result<(View, Option<View>)> {
        let (ffn, device) = (&self.ffn, self.ffn.device());
        let num_experts = ffn.neurons().num_experts;
        let num_tokens = inputs.x.shape[0];
        let row_words = num_experts.div_ceil(32);
        let mask = View::matrix(base + self.places.mask, Format::Word, [num_tokens, row_words]);
        let scores =
            View::matrix(base + self.places.scores, Format::F32, [num_tokens, num_experts]);
        let selected = SelectOutputs { mask, counts: None, status: inputs.status };
        let valid = inputs.num_valid_tokens;
        let outputs =
            RouterSelectOutputs { selected, scores: (ffn.gate() != Gate::One).then_some(scores) };
        let (router, selection) = (ffn.router().view(), ffn.selection());
        // SAFETY: the caller's promise.
        unsafe {
            router_select(device, stream, &outputs, inputs.x, valid, &router, &selection, op)?;
            if let Some(imposed) = inputs.scores {
                let none = Workspace::NONE;
                select(device, stream, &selected, imposed, valid, &selection, none)?;
            }
            if let Some(counters) = &self.counters {
                let valid = valid.map_or(0, |valid| valid.address);
                counters.add(device, stream, mask.address, num_tokens, valid)?;
            }
            let of_scores = inputs.scores.unwrap_or(scores);
            match ffn.gate() {
                Gate::One => Ok((mask, None)),
                Gate::Score => Ok((mask, Some(of_scores))),
                softmax => {
                    let renormalise = softmax == Gate::Renormalised;
                    gates(device, stream, scores, of_scores, mask, renormalise)?;
                    Ok((mask, Some(scores)))
                }
            }
        }
    }

    unsafe fn run_dense(
        &self,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        [mask, gates]: [u64; 2],
        op: Workspace,
    ) -> Result<()> {
        let [num_tokens, d_model] = y.shape;
        let dense = self.dense.as_ref().expect("a plan that takes a dense path has tuned it");
        let run = DenseRun {
            x: inputs.x.address,
            y: y.address,
            mask,
            gates,
            num_tokens,
            workspace: op.address,
        };
        let device = self.ffn.device();
        // SAFETY: the caller's promise.
        unsafe {
            dense.run(device, stream, &run)?;
            if let Some(valid) = inputs.num_valid_tokens {
                let params = moefy_clear_invalid_params {
                    y: y.address,
                    num_valid_tokens: valid.address,
                    row_bytes: (d_model * y.format.bytes()) as u64,
                    num_tokens: num_tokens as u64,
                };
                padding::clear_invalid(device, stream, &params)?;
            }
        }
        Ok(())
    }

    /// Times dense products for powers of two and the largest chunk.
    fn tune(&self, layer: DenseLayer) -> Result<Dense> {
        let device = self.ffn.device();
        let chunk = self.places.chunk;
        let d_model = self.ffn.neurons().d_model();
        // Values as they might be: products of zeros run faster.
        let values: Vec<f32> = (0..chunk * d_model)
            .map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect();
        let x = crate::Tensor::vector(values).to_dtype(self.ffn.dtype());
        let x = Buffer::from_slice(device, x.as_bytes())?;
        let y = Buffer::new(device, x.bytes())?;
        let op_bytes = self.places.bytes - self.places.op as usize;
        let workspace = Buffer::new(device, op_bytes)?;
        let run = DenseRun {
            x: x.address(),
            y: y.address(),
            mask: 0,
            gates: 0,
            num_tokens: chunk,
            workspace: workspace.address(),
        };
        let mut sizes: Vec<usize> =
            (0..).map(|power| 1 << power).take_while(|&size| size < chunk).collect();
        sizes.push(chunk);
        device.context.bind()?;
        // SAFETY: the buffers have the sizes of a chunk, and live until everything has run.
        let dense = unsafe { Dense::new(device, layer, &sizes, &run) };
        device.context.synchronize()?;
        dense
    }
}

fn rows(view: View, first: usize, count: usize) -> View {
    let bytes = first * view.row_stride * view.format.bytes();
    View { address: view.address + bytes as u64, shape: [count, view.shape[1]], ..view }
}
