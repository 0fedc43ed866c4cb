//! A layer that is ready to run: what its path takes, in which order, where in the workspace.

use std::sync::Arc;

use super::dense::{Dense, DenseLayer};
use super::driver::{Branch, RawStream};
use super::path::Paths;
use super::places::Places;
use super::router_select::{NextBegins, check_router, router_select_by};
use super::statistics::Counters;
use super::view::{Arguments, Format, View, Workspace};
use super::{
    ExpertsInputs, FfnInputs, MoeFfn, Path, PlanOptions, RouteIndexOutputs, RouterSelectOutputs,
    RoutingCounts, SelectOutputs, experts, ffn_few, gates, padding, route_index, token_tiles,
};
use crate::abi::{moefy_ffn_few_params, moefy_gate, moefy_split_valid_params};
use crate::error::Result;
use crate::ffn::Gate;

/// What a sparse run does, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Route,
    Index,
    Experts,
}

/// What routing left.
pub(super) struct Routed {
    pub(super) mask: View,
    /// Where they are not 1.
    pub(super) gates: Option<View>,
    pub(super) next_begins: NextBegins,
}

/// A layer that is ready to run up to a number of tokens.
pub struct FfnPlan {
    pub(super) ffn: Arc<MoeFfn>,
    pub(super) max_tokens: usize,
    options: PlanOptions,
    pub(super) places: Places,
    paths: Paths,
    /// The fused path for 1, 2, … tokens.
    few_fused: Vec<Option<ffn_few::Shape>>,
    pub(super) dense: Option<Dense>,
    counters: Option<Counters>,
    /// For the router of a masked dense layer.
    pub(super) branch: Option<Arc<Branch>>,
}

impl MoeFfn {
    /// Makes the layer ready for at most `max_tokens` tokens. Times the algorithms of dense products
    /// if they may run, and waits for the device. Make every plan before you capture the first graph:
    /// graphs that are there already can run up to 4 % slower afterwards (kernels/NOTES.md).
    ///
    /// # Errors
    /// When the sizes overflow, cuBLASLt is needed and missing, or the device has too little memory
    /// to time products.
    pub fn plan(self: &Arc<Self>, max_tokens: usize, options: PlanOptions) -> Result<FfnPlan> {
        self.plan_with(max_tokens, options, |plan, layer| {
            let chunk = plan.places.chunk;
            let smaller = (0..).map(|power| 1 << power).take_while(|&size| size < chunk);
            plan.tune(layer, &smaller.chain([chunk]).collect::<Vec<_>>())
        })
    }

    /// The same with dense products from `dense`, if they may run.
    pub(super) fn plan_with(
        self: &Arc<Self>,
        max_tokens: usize,
        options: PlanOptions,
        dense: impl FnOnce(&FfnPlan, DenseLayer) -> Result<Dense>,
    ) -> Result<FfnPlan> {
        if options.path == Some(Path::FewFused) && self.few_fused(max_tokens, &options).is_none() {
            let check = Arguments { device: self.device(), op: "plan" };
            let expected = "one that can do these sizes (few-fused is for f16 and bf16 on Hopper, \
                            at most 32 tokens, d_model up to 4096 for 8 of them, and 512 experts)";
            let got = format!("few-fused for {max_tokens} tokens");
            return Err(check.error("path", expected, got));
        }
        if options.path == Some(Path::TokenTile) && !self.token_tiles() {
            let check = Arguments { device: self.device(), op: "plan" };
            let expected = "one that can do this layer (token-tile is for f16 and bf16 on Hopper, and 4095 experts)";
            let got = format!(
                "token-tile for {} and {} experts",
                self.dtype(),
                self.neurons().num_experts
            );
            return Err(check.error("path", expected, got));
        }
        let places = self.places(max_tokens, &options)?;
        let mut plan = FfnPlan {
            ffn: self.clone(),
            max_tokens,
            options,
            paths: self.paths(&options, places.many),
            few_fused: self.few_fused_shapes(max_tokens, &options),
            places,
            dense: None,
            counters: None,
            branch: None,
        };
        if self.may_be_masked(&options) && max_tokens > 0 {
            plan.branch = Some(Arc::new(Branch::new(&self.device().context)?));
        }
        if let Some(layer) = self.dense_layer_of(max_tokens, &options)? {
            plan.dense = Some(dense(&plan, layer)?);
        }
        if options.statistics {
            plan.counters = Some(Counters::new(self.device(), self.neurons().num_experts)?);
        }
        Ok(plan)
    }
}

impl FfnPlan {
    /// The same plan for another layer with the same sizes, without timing anything again.
    ///
    /// # Errors
    /// When the layer differs in size, type, activation, biases, selection or gate, or its density lets it take other paths.
    pub fn with_ffn(&self, ffn: &Arc<MoeFfn>) -> Result<Self> {
        // By its density another layer may need more workspace.
        let places = ffn.places(self.max_tokens, &self.options)?;
        if !self.ffn.is_like(ffn) || places.many != self.places.many {
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
        let paths = ffn.paths(&self.options, self.places.many);
        let few_fused = ffn.few_fused_shapes(self.max_tokens, &self.options);
        let branch = self.branch.clone();
        Ok(Self { ffn: ffn.clone(), places, paths, few_fused, dense, counters, branch, ..*self })
    }

    /// Bytes of workspace that a run needs.
    pub fn workspace_bytes(&self) -> usize {
        self.places.bytes
    }

    /// The path that a run of so many tokens takes.
    pub fn path(&self, num_tokens: usize) -> Path {
        self.paths.get(num_tokens)
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
    /// Nothing is allocated, waited for or read by the host, so that a run can be captured into a graph, on any
    /// stream, from one thread or several. With [`Fallback::Masked`](super::Fallback) a second stream of the plan's
    /// own takes part: let the plan live as long as what was captured or still runs.
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
        if let Some(mask) = inputs.mask {
            let shape = [num_tokens, neurons.num_experts.div_ceil(32)];
            check.dense("mask", mask, Format::Word, shape)?;
        }
        if let Some(selection) = inputs.selection
            && (selection.most_experts(neurons.num_experts) > self.places.max_k
                || selection.sorts() && !self.ffn.selection().sorts())
        {
            let expected = format!("for at most {} experts, like the plan's", self.places.max_k);
            return Err(check.error("selection", expected, format!("{selection:?}")));
        }
        let num_valid = check.optional_words("num_valid_tokens", inputs.num_valid_tokens, 1)?;
        check.optional_words("status", inputs.status, 1)?;
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
                    mask: inputs.mask.map(rows),
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
        let op = self.op_workspace(base);
        // SAFETY: the caller's promise.
        unsafe {
            if path == Path::DenseExact {
                return self.run_dense(stream, y, inputs, op);
            }
            if path == Path::DenseMasked && last == Stage::Experts {
                return self.run_masked(stream, y, inputs, base);
            }
            if path == Path::FewFused && last == Stage::Experts {
                return self.run_few_fused(stream, y, inputs, base, op);
            }
            let Routed { mask, gates, .. } = self.route(stream, inputs, base, op)?;
            self.count(stream, mask.address, inputs)?;
            if last == Stage::Route {
                return Ok(());
            }
            let (valid, device) = (inputs.num_valid_tokens, ffn.device());
            let mut inputs_of_experts = ExpertsInputs {
                x: inputs.x,
                mask,
                gates,
                num_valid_tokens: valid,
                lists: None,
                tiles: None,
            };
            if path == Path::Few {
                return experts(device, stream, y, neurons, &inputs_of_experts, op);
            }
            let words = |place, len| View::words(base + place, len);
            let num_experts = neurons.num_experts;
            let places = &self.places;
            if path == Path::TokenTile {
                let tiles = places.tiles(base, num_experts, num_tokens);
                token_tiles(device, stream, &tiles, mask, num_experts, valid, op)?;
                if last == Stage::Index {
                    return Ok(());
                }
                inputs_of_experts.tiles = Some(tiles);
                return experts(device, stream, y, neurons, &inputs_of_experts, op);
            }
            let by_words = |place| places.by_words(base + place, num_experts, num_tokens);
            let outputs = RouteIndexOutputs {
                counts: words(places.counts, num_experts),
                offsets: words(places.offsets, num_experts + 1),
                token_ids: places.token_ids(base, num_tokens),
                expert_masks: by_words(places.expert_masks),
                word_offsets: by_words(places.word_offsets),
                union_ids: words(places.union_ids, num_experts),
                num_union: words(places.num_union, 1),
                status: inputs.status,
            };
            route_index(device, stream, &outputs, mask, num_experts, valid, op)?;
            if last == Stage::Index {
                return Ok(());
            }
            inputs_of_experts.lists = Some(places.lists(base, num_experts, num_tokens));
            experts(device, stream, y, neurons, &inputs_of_experts, op)
        }
    }

    /// Launches router and selection.
    pub(super) unsafe fn route(
        &self,
        stream: RawStream,
        inputs: &FfnInputs,
        base: u64,
        op: Workspace,
    ) -> Result<Routed> {
        let (ffn, device) = (&self.ffn, self.ffn.device());
        let num_experts = ffn.neurons().num_experts;
        let num_tokens = inputs.x.shape[0];
        let row_words = num_experts.div_ceil(32);
        let own = View::matrix(base + self.places.mask, Format::Word, [num_tokens, row_words]);
        let mask = inputs.mask.unwrap_or(own);
        let scores =
            View::matrix(base + self.places.scores, Format::F32, [num_tokens, num_experts]);
        let selected = SelectOutputs { mask, counts: None, status: inputs.status };
        let valid = inputs.num_valid_tokens;
        let outputs =
            RouterSelectOutputs { selected, scores: (ffn.gate() != Gate::One).then_some(scores) };
        let router = ffn.router().view();
        let selection = inputs.selection.unwrap_or(ffn.selection());
        // SAFETY: the caller's promise.
        unsafe {
            let (x, imposed) = (inputs.x, inputs.scores);
            let mut next_begins = router_select_by(
                device, stream, &outputs, x, valid, &router, &selection, imposed, op,
            )?;
            let of_scores = inputs.scores.unwrap_or(scores);
            let gates = match ffn.gate() {
                Gate::One => None,
                Gate::Score => Some(of_scores),
                softmax => {
                    let renormalise = softmax == Gate::Renormalised;
                    gates(device, stream, scores, of_scores, mask, renormalise)?;
                    next_begins = NextBegins::Anytime;
                    Some(scores)
                }
            };
            Ok(Routed { mask, gates, next_begins })
        }
    }

    /// Counts what was selected, where that was asked for.
    pub(super) unsafe fn count(
        &self,
        stream: RawStream,
        mask: u64,
        inputs: &FfnInputs,
    ) -> Result<()> {
        let Some(counters) = &self.counters else { return Ok(()) };
        let valid = inputs.num_valid_tokens.map_or(0, |valid| valid.address);
        // SAFETY: the caller's promise.
        unsafe { counters.add(self.ffn.device(), stream, mask, inputs.x.shape[0], valid) }
    }

    unsafe fn run_few_fused(
        &self,
        stream: RawStream,
        y: View,
        inputs: &FfnInputs,
        base: u64,
        op: Workspace,
    ) -> Result<()> {
        let (ffn, device) = (&self.ffn, self.ffn.device());
        let check = Arguments { device, op: "ffn_few" };
        let num_tokens = inputs.x.shape[0];
        let shape =
            self.few_fused[num_tokens - 1].as_ref().expect("the path was chosen because it can");
        let (neurons, _) = ffn.neurons().check(&check)?;
        let selection = inputs.selection.unwrap_or(ffn.selection());
        let view = ffn.router().view();
        let valid = inputs.num_valid_tokens;
        let (mut router, _) = check_router(&check, inputs.x, valid, &view, &selection)?;
        router.status = check.optional_words("status", inputs.status, 1)?;
        router.imposed = inputs.scores.map_or(0, |scores| scores.address);
        let mask = inputs.mask.map_or(base + self.places.mask, |mask| mask.address);
        if self.counters.is_some() || inputs.mask.is_some() {
            router.mask = mask;
        }
        let params = moefy_ffn_few_params {
            neurons,
            router,
            w2: ffn.few_w2,
            num_w2: ffn_few::num_w2(ffn.dtype()) as u32,
            inverse_width: 1.0 / neurons.expert_width as f32,
            y: y.address,
            gate: match ffn.gate() {
                Gate::One => moefy_gate::MOEFY_GATE_ONE,
                Gate::Score => moefy_gate::MOEFY_GATE_SCORE,
                Gate::Softmax => moefy_gate::MOEFY_GATE_SOFTMAX,
                Gate::Renormalised => moefy_gate::MOEFY_GATE_RENORMALISED,
            },
            ..bytemuck::Zeroable::zeroed()
        };
        // SAFETY: the caller's promise.
        unsafe {
            shape.launch(device, stream, &params, op.address)?;
            self.count(stream, mask, inputs)
        }
    }

    /// What operations and dense layers have of a workspace.
    pub(super) fn op_workspace(&self, base: u64) -> Workspace {
        let op = self.places.op;
        Workspace { address: base + op, bytes: self.places.bytes - op as usize }
    }

    /// What a router has of it whose layer has other things there.
    pub(super) fn beside(&self, base: u64) -> Workspace {
        Workspace {
            address: base + self.places.beside,
            bytes: (self.places.op - self.places.beside) as usize,
        }
    }
}

fn rows(view: View, first: usize, count: usize) -> View {
    let bytes = first * view.row_stride * view.format.bytes();
    View { address: view.address + bytes as u64, shape: [count, view.shape[1]], ..view }
}
