//! Training of two-layer routers.
//!
//! D2DMoE (arXiv 2310.04361, section 3.2): r(x) = |W2 relu(W1 x)| regresses on the norm of every
//! expert's output with a mean squared error. MoEfication (arXiv 2110.01786, section 3.3):
//! r(x) = sigmoid(W2 tanh(W1 x/‖x‖)) learns every expert's sum of activations, in units of the largest
//! of the batch, with a binary cross-entropy; W1 begins as the experts' centroids, W2 as the identity.

use rand::Rng;
use rand::seq::SliceRandom;

use super::adam::Adam;
use super::router_network::{Batch, Network};
use crate::cpu::select;
use crate::error::{Error, Result};
use crate::ffn::{ExpertMask, MlpKind, Router, Selection};
use crate::model::format::RouterTraining;

/// How a kind is trained.
struct Recipe {
    /// Tokens of a step.
    batch_tokens: usize,
    /// At the first step; falls to zero along half a cosine.
    learning_rate: f32,
}

/// Small steps, as training is short of steps before it is short of tokens; the paper's rate of 1e-3
/// is for far more of them.
const D2DMOE: Recipe = Recipe { batch_tokens: 128, learning_rate: 4e-3 };
/// The authors' own.
const MOEFICATION: Recipe = Recipe { batch_tokens: 512, learning_rate: 1e-2 };
/// Tokens are held out in blocks, because neighbours in a text resemble each other.
const BLOCK_TOKENS: usize = 32;
/// One block in this many is held out.
const HELD_OUT_BLOCKS: usize = 10;
/// The fewest tokens of which a whole block is held out.
pub const MIN_TOKENS: usize = BLOCK_TOKENS * HELD_OUT_BLOCKS;

/// What a router learns from.
pub(super) struct TrainingData<'a> {
    /// \[T, d_model\], T ≥ [`MIN_TOKENS`].
    pub(super) inputs: &'a [f32],
    /// What the scores should say, ≥ 0, \[T, num_experts\].
    pub(super) targets: &'a [f32],
    /// E.
    pub(super) num_experts: usize,
    /// The top-k rule for which recall is reported.
    pub(super) k: Selection,
}

impl TrainingData<'_> {
    fn d_model(&self) -> usize {
        self.inputs.len() / (self.targets.len() / self.num_experts)
    }
}

/// Trains a D2DMoE router of width `hidden`. `each_epoch` hears how many epochs are done, of how many,
/// and may stop the training with an error. Losses are in units of the squared mean target; recall is
/// the share of the k experts with the largest targets that are among the k with the highest scores.
/// The bits do not depend on the number of threads.
///
/// # Errors
/// When the loss is not finite, and what `each_epoch` returns.
pub(super) fn train_d2dmoe(
    data: &TrainingData<'_>,
    hidden: usize,
    epochs: usize,
    rng: &mut impl Rng,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(Router, RouterTraining)> {
    // Inputs and targets of about 1, so that one learning rate suits every layer. The scales end up
    // in the weights.
    let input_scale = root_mean_square(data.inputs);
    let target_scale = mean(data.targets);
    let d_model = data.d_model();
    let gather = |tokens: &[usize]| Batch {
        inputs: gather_scaled(data.inputs, d_model, tokens, 1.0 / input_scale),
        targets: gather_scaled(data.targets, data.num_experts, tokens, 1.0 / target_scale),
    };
    let network = Network::random(MlpKind::D2dMoe, d_model, hidden, data.num_experts, rng);
    let (mut network, training) = train(data, network, &gather, &D2DMOE, epochs, rng, each_epoch)?;
    let (w1, w2) = network.values.split_at_mut(hidden * d_model);
    w1.iter_mut().for_each(|w| *w /= input_scale);
    w2.iter_mut().for_each(|w| *w *= target_scale);
    Ok((network.router()?, training))
}

/// Trains MoEfication's router from the experts' `centroids` \[E, d_model\]; the rest as for
/// [`train_d2dmoe`], with losses as they are.
///
/// # Errors
/// As for [`train_d2dmoe`].
pub(super) fn train_moefication(
    data: &TrainingData<'_>,
    centroids: Vec<f32>,
    epochs: usize,
    rng: &mut impl Rng,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(Router, RouterTraining)> {
    let (d_model, num_experts) = (data.d_model(), data.num_experts);
    let gather = |tokens: &[usize]| {
        let mut inputs = gather_scaled(data.inputs, d_model, tokens, 1.0);
        for x in inputs.chunks_exact_mut(d_model) {
            let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            x.iter_mut().for_each(|x| *x /= norm);
        }
        let mut targets = gather_scaled(data.targets, num_experts, tokens, 1.0);
        let largest = targets.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
        targets.iter_mut().for_each(|target| *target /= largest);
        Batch { inputs, targets }
    };
    let mut values = centroids;
    values.extend(
        (0..num_experts * num_experts)
            .map(|i| f32::from(u8::from(i / num_experts == i % num_experts))),
    );
    let kind = MlpKind::Moefication;
    let network = Network { kind, d_model, hidden: num_experts, num_experts, values };
    let (network, training) = train(data, network, &gather, &MOEFICATION, epochs, rng, each_epoch)?;
    Ok((network.router()?, training))
}

/// The weights of the epoch with the least held-out loss.
fn train(
    data: &TrainingData<'_>,
    mut network: Network,
    gather: &dyn Fn(&[usize]) -> Batch,
    recipe: &Recipe,
    epochs: usize,
    rng: &mut impl Rng,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(Network, RouterTraining)> {
    let num_tokens = data.targets.len() / data.num_experts;
    let is_held_out = |token: usize| token / BLOCK_TOKENS % HELD_OUT_BLOCKS == HELD_OUT_BLOCKS - 1;
    let (held_out, mut train): (Vec<usize>, Vec<usize>) =
        (0..num_tokens).partition(|&token| is_held_out(token));
    let held_out = gather(&held_out);

    let mut optimiser = Adam::new(network.values.len());
    let num_steps = epochs * train.len().div_ceil(recipe.batch_tokens);
    let mut step = 0;
    let mut best: Option<(RouterTraining, Network)> = None;
    for epoch in 1..=epochs {
        train.shuffle(rng);
        let mut train_loss = 0.0;
        for tokens in train.chunks(recipe.batch_tokens) {
            let (loss, gradient) = network.loss_and_gradient(&gather(tokens));
            train_loss += loss * tokens.len() as f64 / train.len() as f64;
            let progress = step as f32 / num_steps as f32;
            let share = (1.0 + (std::f32::consts::PI * progress).cos()) / 2.0;
            optimiser.step(&mut network.values, &gradient, recipe.learning_rate * share);
            step += 1;
        }
        let (scores, held_out_loss) = network.scores_and_loss(&held_out);
        let held_out_recall = recall(&scores, &held_out.targets, data.num_experts, &data.k);
        let least = best.as_ref().map_or(f64::INFINITY, |(best, _)| best.held_out_loss);
        if held_out_loss < least {
            let training = RouterTraining {
                epochs,
                best_epoch: epoch,
                train_loss,
                held_out_loss,
                held_out_recall,
            };
            best = Some((training, network.clone()));
        }
        each_epoch(epoch, epochs)?;
    }
    let (training, network) = best.ok_or_else(|| {
        let expected = "of a size whose squares are finite";
        Error::argument("router training", "calibration inputs", expected, "larger ones")
    })?;
    Ok((network, training))
}

/// The share of the experts that `k` selects by the targets that it selects by the scores.
fn recall(scores: &[f32], targets: &[f32], num_experts: usize, k: &Selection) -> f64 {
    let top = |values: &[f32]| {
        let mut mask = ExpertMask::none(values.len() / num_experts, num_experts);
        select(k, values, &mut mask);
        mask
    };
    let (chosen, wanted) = (top(scores), top(targets));
    let both = chosen.words().iter().zip(wanted.words()).map(|(a, b)| (a & b).count_ones());
    f64::from(both.sum::<u32>()) / wanted.num_pairs() as f64
}

/// `rows` of a row-major matrix, multiplied by `scale`.
fn gather_scaled(matrix: &[f32], cols: usize, rows: &[usize], scale: f32) -> Vec<f32> {
    let mut gathered = Vec::with_capacity(rows.len() * cols);
    for &row in rows {
        gathered.extend(matrix[row * cols..][..cols].iter().map(|x| x * scale));
    }
    gathered
}

/// Or 1 where all values are zero, as for [`mean`]: something to divide by.
fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
    if sum > 0.0 { (sum / values.len() as f64).sqrt() as f32 } else { 1.0 }
}

fn mean(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
    if sum > 0.0 { (sum / values.len() as f64) as f32 } else { 1.0 }
}
