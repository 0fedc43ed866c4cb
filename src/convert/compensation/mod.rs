//! What stands in for the skipped experts, fitted to tokens.

mod goal;
mod ridge;

use super::hidden::for_each_hidden;
use crate::cpu::{self, Workspace};
use crate::error::Result;
use crate::ffn::{Compensation, ExpertMask, MoeFfn};
use crate::tensor::Tensor;
pub(super) use goal::Goal;
use ridge::Moments;

/// Tokens whose outputs are in memory at once.
const CHUNK_TOKENS: usize = 4096;
/// The ridge penalty in units of the inputs' mean variance. Between 1e-4 and 1e-2 nothing changes.
const RIDGE: f64 = 1e-3;

/// What stands in for the experts that a token skips.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CompensationMethod {
    /// Nothing.
    None,
    /// Every neuron's mean over the tokens that skip it: [`Compensation::Mean`].
    Mean,
    /// A reduced-rank ridge regression on the inputs: [`Compensation::Linear`].
    Linear {
        /// Its rank, between 1 and d_model.
        rank: usize,
    },
}

impl CompensationMethod {
    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mean => "mean",
            Self::Linear { .. } => "linear",
        }
    }
}

/// Tokens of an FFN, and what it should make of them.
pub(super) struct Sample<'a> {
    /// \[T, d_model\].
    pub(super) inputs: &'a [f32],
    /// \[T, d_model\].
    pub(super) targets: &'a [f32],
    /// How much an error counts at each token, \[T\]; only ratios matter.
    pub(super) weights: &'a [f32],
    /// What an error e of the output costs, eᵀ M e, M \[d_model, d_model\].
    pub(super) metric: &'a [f64],
}

/// The same layer with a compensation fitted to a sample.
pub(super) fn compensated(
    moe: MoeFfn,
    method: CompensationMethod,
    sample: &Sample<'_>,
) -> Result<MoeFfn> {
    let compensation = match method {
        CompensationMethod::None => return Ok(moe),
        CompensationMethod::Mean => mean(&moe, sample.inputs)?,
        CompensationMethod::Linear { rank } => linear(&moe, sample, rank)?,
    };
    moe.with_compensation(compensation)
}

/// μ of every neuron over the tokens that skip its expert; 0 for shared neurons and where no token
/// skips.
fn mean(moe: &MoeFfn, inputs: &[f32]) -> Result<Compensation> {
    let (d_model, d_ff, width) = (moe.d_model(), moe.d_ff(), moe.expert_width());
    let num_experts = moe.num_experts();
    let scores = cpu::router_scores(moe.router(), inputs, d_model)?;
    let mut mask = ExpertMask::none(inputs.len() / d_model, num_experts);
    cpu::select(&moe.selection(), &scores, &mut mask);

    let mut sums = vec![0.0f64; d_ff];
    let mut counts = vec![0usize; num_experts];
    let mut token = 0;
    for_each_hidden(moe.neurons(), inputs, |hidden| {
        for h in hidden.chunks_exact(d_ff) {
            for expert in (0..num_experts).filter(|&expert| !mask.contains(token, expert)) {
                counts[expert] += 1;
                let neurons = expert * width..(expert + 1) * width;
                let sums = &mut sums[neurons.clone()];
                sums.iter_mut().zip(&h[neurons]).for_each(|(sum, &h)| *sum += f64::from(h));
            }
            token += 1;
        }
    });
    for (sums, &count) in sums.chunks_exact_mut(width).zip(&counts) {
        sums.iter_mut().for_each(|sum| *sum /= count.max(1) as f64);
    }
    let mean: Vec<f32> = sums.into_iter().map(|mean| mean as f32).collect();
    Ok(Compensation::Mean { mean: Tensor::vector(mean).to_dtype(moe.neurons().dtype()) })
}

/// U (V x) + c, the regression of what is missing of the targets.
fn linear(moe: &MoeFfn, sample: &Sample<'_>, rank: usize) -> Result<Compensation> {
    let d_model = moe.d_model();
    let experts = cpu::MoeFfn::new(moe);
    let mut workspace = Workspace::default();
    let mut moments = Moments::new(d_model, d_model);
    let mut output = vec![0.0; CHUNK_TOKENS * d_model];
    let chunk = CHUNK_TOKENS * d_model;
    let tokens = sample.inputs.chunks(chunk).zip(sample.targets.chunks(chunk));
    for ((x, target), weights) in tokens.zip(sample.weights.chunks(CHUNK_TOKENS)) {
        let missing = &mut output[..x.len()];
        experts.run(x, missing, &mut workspace)?;
        missing.iter_mut().zip(target).for_each(|(y, target)| *y = target - *y);
        moments.add(x, missing, weights);
    }
    let fit = moments.fit(rank, RIDGE, sample.metric);
    let dtype = moe.neurons().dtype();
    let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<_>>();
    let matrix = |values: Vec<f64>| {
        let rows = values.len() / d_model;
        Ok(Tensor::matrix(narrow(values), [rows, d_model])?.to_dtype(dtype))
    };
    Ok(Compensation::Linear {
        u: matrix(fit.u)?,
        v: matrix(fit.v)?,
        c: Tensor::vector(narrow(fit.c)).to_dtype(dtype),
    })
}
