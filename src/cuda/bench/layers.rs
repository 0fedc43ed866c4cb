//! Random layers, tokens and routing, and graphs of layers in a row.

use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, sys};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{FfnBench, LayerSpec, Routing};
use crate::cuda::driver::cannot;
use crate::cuda::plan::Stage;
use crate::cuda::view::{Format, View, Workspace};
use crate::cuda::{Buffer, Device, FfnInputs, FfnPlan, PlanOptions};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{self, DenseFfn, ExpertMask, MlpKind, Partition, Router, Selection};
use crate::tensor::Tensor;

/// One plan per set of weights.
pub(super) struct Layers {
    pub(super) plans: Vec<FfnPlan>,
    workspace: Buffer,
    y: Buffer,
    shape: [usize; 2],
    format: Format,
}

impl Layers {
    pub(super) fn new(
        bench: &FfnBench,
        num_sets: usize,
        tokens: usize,
        options: PlanOptions,
    ) -> Result<Self> {
        let first = bench.sets[0].plan(tokens, options)?;
        let rest = bench.sets[1..num_sets].iter().map(|set| first.with_ffn(set));
        let rest: Vec<FfnPlan> = rest.collect::<Result<_>>()?;
        let workspace = Buffer::new(&bench.device, first.workspace_bytes())?;
        let (shape, dtype) = ([tokens, bench.spec.d_model], bench.spec.dtype);
        let y = Buffer::new(&bench.device, tokens * shape[1] * dtype.bytes())?;
        let plans = std::iter::once(first).chain(rest).collect();
        Ok(Self { plans, workspace, y, shape, format: Format::Float(dtype) })
    }

    /// A graph of all layers, one after another.
    pub(super) fn capture(
        &self,
        stream: &Arc<CudaStream>,
        inputs: &[Inputs],
        last: Stage,
    ) -> Result<CudaGraph> {
        let y = View::matrix(self.y.address(), self.format, self.shape);
        let workspace =
            Workspace { address: self.workspace.address(), bytes: self.workspace.bytes() };
        let launch = || -> Result<()> {
            for (plan, inputs) in self.plans.iter().zip(inputs) {
                let inputs = inputs.of(self.format, self.shape, plan.ffn().neurons().num_experts);
                // SAFETY: the buffers have these sizes and outlive the graph.
                unsafe {
                    plan.run_until(last, stream.as_ref().into(), y, &inputs, workspace)?;
                }
            }
            Ok(())
        };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(cannot("capture a graph"))?;
        let launched = launch();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;
        let graph = stream.end_capture(flags).map_err(cannot("capture a graph"));
        launched?;
        graph?.ok_or_else(|| Error::argument("bench", "tokens", "at least 1", 0))
    }
}

/// Tokens and imposed scores of one layer.
pub(super) struct Inputs {
    x: Buffer,
    scores: Buffer,
}

impl Inputs {
    pub(super) fn new(
        device: &Device,
        rng: &mut ChaCha8Rng,
        spec: &LayerSpec,
        masks: &ExpertMask,
    ) -> Result<Self> {
        let x = random(rng, [masks.num_tokens(), spec.d_model], 1.0, spec.dtype);
        let mut scores = vec![0.0f32; masks.num_tokens() * masks.num_experts()];
        for (token, row) in scores.chunks_exact_mut(masks.num_experts()).enumerate() {
            // 1 + ε, so that an equal score would show.
            masks.experts(token).for_each(|e| row[e] = 1.0 + f32::EPSILON * e as f32);
        }
        Ok(Self {
            x: Buffer::from_slice(device, x.as_bytes())?,
            scores: Buffer::from_slice(device, &scores)?,
        })
    }

    fn of(&self, format: Format, shape: [usize; 2], num_experts: usize) -> FfnInputs {
        let scores = View::matrix(self.scores.address(), Format::F32, [shape[0], num_experts]);
        let x = View::matrix(self.x.address(), format, shape);
        FfnInputs { scores: Some(scores), ..FfnInputs::new(x) }
    }
}

pub(super) fn union(masks: &ExpertMask) -> usize {
    let runs = |e: &usize| (0..masks.num_tokens()).any(|token| masks.contains(token, *e));
    (0..masks.num_experts()).filter(runs).count()
}

/// Rows of `tokens` tokens, of a trace from row `first` on.
pub(super) fn draw_masks(
    rng: &mut ChaCha8Rng,
    routing: &Routing,
    tokens: usize,
    num_experts: usize,
    first: usize,
) -> ExpertMask {
    let mut mask = ExpertMask::none(tokens, num_experts);
    match routing {
        Routing::Trace { masks, .. } => {
            for token in 0..tokens {
                let row = (first + token) % masks.num_tokens().max(1);
                masks.experts(row).for_each(|expert| mask.insert(token, expert));
            }
        }
        Routing::Random { density } => {
            let mut experts: Vec<usize> = (0..num_experts).collect();
            let k = density.clamp(0.0, 1.0) * num_experts as f64;
            let offset: f64 = rng.random();
            for token in 0..tokens {
                // Floor and ceiling mixed so that the mean is k.
                let upto = |token: usize| (token as f64 * k + offset).floor() as usize;
                let count = (upto(token + 1) - upto(token)).clamp(1, num_experts);
                let (chosen, _) = experts.partial_shuffle(rng, count);
                chosen.iter().for_each(|&expert| mask.insert(token, expert));
            }
        }
    }
    mask
}

pub(super) fn random(rng: &mut ChaCha8Rng, shape: [usize; 2], scale: f32, dtype: DType) -> Tensor {
    let values: Vec<f32> =
        (0..shape[0] * shape[1]).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from((shape, values)).to_dtype(dtype)
}

pub(super) fn random_layer(spec: &LayerSpec) -> Result<ffn::MoeFfn> {
    let LayerSpec { d_model, d_ff, glu, activation, num_experts, shared, dtype, .. } = *spec;
    let width = Partition::width_of_experts(d_ff, num_experts, shared)?;
    let rng = &mut ChaCha8Rng::seed_from_u64(spec.seed);
    let scale = |depth: usize| (3.0 / depth as f32).sqrt();
    let inputs = if glu { 2 * d_ff } else { d_ff };
    let w_in = random(rng, [inputs, d_model], scale(d_model), dtype);
    let w_out = random(rng, [d_ff, d_model], scale(d_ff), dtype);
    let biases = (!glu)
        .then(|| [random(rng, [1, inputs], 0.5, dtype), random(rng, [1, d_model], 0.5, dtype)]);
    let [b_in, b_out] = biases.map_or([None, None], |biases| biases.map(Some));
    let neurons = DenseFfn::from_neuron_major(activation, glu, w_in, b_in, w_out, b_out)?;
    let router = match spec.router_hidden {
        0 => Router::Linear { w: random(rng, [num_experts, d_model], scale(d_model), dtype) },
        hidden => Router::Mlp {
            kind: MlpKind::D2dMoe,
            w1: random(rng, [hidden, d_model], scale(d_model), dtype),
            w2: random(rng, [num_experts, hidden], scale(hidden), dtype),
        },
    };
    let labels = (0..d_ff).map(|n| (n / width).min(num_experts) as u32).collect();
    let partition = Partition::new(num_experts, labels)?;
    ffn::MoeFfn::from_expert_order(neurons, partition, router, Selection::dynamic_k(0.5))
}
