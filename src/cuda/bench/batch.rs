//! What all measurements with the same number of tokens share.

use std::cell::OnceCell;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::baseline::{Baseline, padded};
use super::graph::TimedGraph;
use crate::cuda::LayerShape;
use crate::cuda::dense::Dense;
use crate::cuda::plan::Stage;
use crate::cuda::synthetic::{imposed_scores, random};
use crate::cuda::view::{Format, View, Workspace};
use crate::cuda::{Buffer, Device, FfnInputs, FfnPlan, MoeFfn, PlanOptions};
use crate::error::Result;
use crate::ffn::ExpertMask;

/// Tokens and outputs of a number of tokens, and dense products that were timed for exactly that many.
pub(super) struct Batch {
    pub(super) tokens: usize,
    pub(super) baseline: Baseline,
    layer_shape: LayerShape,
    /// Of each set of weights.
    x: Vec<Buffer>,
    y: Buffer,
    exact: OnceCell<Dense>,
    masked: OnceCell<Dense>,
}

impl Batch {
    /// `passes` are those of the baseline over its sets.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        layer_shape: LayerShape,
        sets: &[Arc<MoeFfn>],
        tokens: usize,
        passes: usize,
    ) -> Result<Self> {
        let device = sets[0].device();
        let x = (0..sets.len()).map(|set| draw_tokens(device, &layer_shape, tokens, set));
        let x = x.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            tokens,
            baseline: Baseline::new(stream, sets, &x, tokens, passes)?,
            y: Buffer::new(device, tokens * layer_shape.d_model * layer_shape.dtype.bytes())?,
            layer_shape,
            x,
            exact: OnceCell::new(),
            masked: OnceCell::new(),
        })
    }

    /// Draws tokens for as many sets of weights.
    pub(super) fn draw_tokens(&mut self, device: &Device, num_sets: usize) -> Result<()> {
        for set in self.x.len()..num_sets {
            self.x.push(draw_tokens(device, &self.layer_shape, self.tokens, set)?);
        }
        Ok(())
    }

    /// A plan for these tokens. Dense products are timed when the first plan needs them.
    pub(super) fn plan(&self, set: &Arc<MoeFfn>, options: PlanOptions) -> Result<FfnPlan> {
        set.plan_with(self.tokens, options, |plan, layer| {
            let timed = if layer.masked.is_some() { &self.masked } else { &self.exact };
            if timed.get().is_none() {
                // Whoever was first would do as well as this one.
                let _ = timed.set(plan.tune_full(layer)?);
            }
            timed.get().expect("just set").with_layer(layer)
        })
    }

    /// The same plan on several sets of weights, each with its own tokens and masks.
    pub(super) fn layers(
        &self,
        sets: &[Arc<MoeFfn>],
        masks: &[ExpertMask],
        options: PlanOptions,
    ) -> Result<Layers<'_>> {
        let device = sets[0].device();
        let plans = sets.iter().map(|set| self.plan(set, options)).collect::<Result<Vec<_>>>()?;
        let scores: Vec<f32> = masks.iter().flat_map(imposed_scores).collect();
        Ok(Layers {
            workspace: Buffer::new(device, plans[0].workspace_bytes())?,
            scores: Buffer::from_slice(device, &scores)?,
            batch: self,
            plans,
        })
    }
}

fn draw_tokens(
    device: &Device,
    layer_shape: &LayerShape,
    tokens: usize,
    set: usize,
) -> Result<Buffer> {
    let rng = &mut ChaCha8Rng::seed_from_u64(set as u64 + 1);
    let drawn = random(rng, [padded(tokens), layer_shape.d_model], 1.0, layer_shape.dtype);
    Buffer::from_slice(device, drawn.as_bytes())
}

/// One plan per set of weights, and what they run on.
pub(super) struct Layers<'a> {
    pub(super) batch: &'a Batch,
    plans: Vec<FfnPlan>,
    scores: Buffer,
    workspace: Buffer,
}

impl Layers<'_> {
    /// Captures so many layers, one after another, each up to a stage. The graph must not outlive
    /// `self`.
    pub(super) fn capture(
        &self,
        stream: &Arc<CudaStream>,
        num_layers: usize,
        last: Stage,
    ) -> Result<TimedGraph> {
        let Batch { tokens, layer_shape, x, y, .. } = self.batch;
        let (shape, float) = ([*tokens, layer_shape.d_model], Format::Float(layer_shape.dtype));
        let workspace =
            Workspace { address: self.workspace.address(), bytes: self.workspace.bytes() };
        let y = View::matrix(y.address(), float, shape);
        TimedGraph::capture(stream, num_layers, |stream, layer| {
            let set = layer % self.plans.len();
            let scores =
                self.scores.address() + (set * tokens * layer_shape.num_experts * 4) as u64;
            let scores = View::matrix(scores, Format::F32, [*tokens, layer_shape.num_experts]);
            let x = View::matrix(x[set].address(), float, shape);
            let inputs = FfnInputs { scores: Some(scores), ..FfnInputs::new(x) };
            // SAFETY: the buffers have these sizes and outlive the graph.
            unsafe { self.plans[set].run_until(last, stream, y, &inputs, workspace) }
        })
    }
}
