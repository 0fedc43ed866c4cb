//! Training of the D2DMoE router (arXiv 2310.04361, section 3.2): r(x) = |W2 relu(W1 x)| regresses on
//! the norm of every expert's output with a mean squared error.

mod adam;
mod network;

use rand::Rng;
use rand::seq::SliceRandom;

use crate::cpu::select;
use crate::error::{Error, Result};
use crate::ffn::{ExpertMask, MlpKind, Router, Selection};
use crate::model::format::RouterTraining;
use crate::tensor::Tensor;
use adam::Adam;
use network::{Batch, Network};

/// Tokens of a step. Small ones, as training is short of steps before it is short of tokens.
const BATCH_TOKENS: usize = 128;
/// At the first step; falls to zero along half a cosine. The paper's 1e-3 is for far more steps.
const LEARNING_RATE: f32 = 4e-3;
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
    /// ‖expert_e(x_t)‖₂, \[T, num_experts\].
    pub(super) norms: &'a [f32],
    /// E.
    pub(super) num_experts: usize,
    /// The top-k rule for which recall is reported.
    pub(super) k: Selection,
}

/// Trains a router of width `hidden`. `each_epoch` hears how many epochs are done, of how many, and
/// may stop the training with an error. Losses are in units of the squared mean norm; recall is
/// the share of the k experts with the largest norms that are among the k with the highest scores.
/// The bits do not depend on the number of threads.
///
/// # Errors
/// When the loss is not finite, and what `each_epoch` returns.
pub(super) fn train_router(
    data: &TrainingData<'_>,
    hidden: usize,
    epochs: usize,
    rng: &mut impl Rng,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(Router, RouterTraining)> {
    let num_experts = data.num_experts;
    let num_tokens = data.norms.len() / num_experts;
    let d_model = data.inputs.len() / num_tokens;

    // Inputs and targets of about 1, so that one learning rate suits every layer. The scales end up
    // in the weights.
    let input_scale = root_mean_square(data.inputs);
    let norm_scale = mean(data.norms);
    let gather = |tokens: &[usize]| Batch {
        inputs: gather_scaled(data.inputs, d_model, tokens, 1.0 / input_scale),
        targets: gather_scaled(data.norms, num_experts, tokens, 1.0 / norm_scale),
    };
    let is_held_out = |token: usize| token / BLOCK_TOKENS % HELD_OUT_BLOCKS == HELD_OUT_BLOCKS - 1;
    let (held_out, mut train): (Vec<usize>, Vec<usize>) =
        (0..num_tokens).partition(|&token| is_held_out(token));
    let held_out = gather(&held_out);

    let mut network = Network::random(d_model, hidden, num_experts, rng);
    let mut optimiser = Adam::new(network.values.len());
    let num_steps = epochs * train.len().div_ceil(BATCH_TOKENS);
    let mut step = 0;
    let mut best: Option<(RouterTraining, Network)> = None;
    for epoch in 1..=epochs {
        train.shuffle(rng);
        let mut train_loss = 0.0;
        for tokens in train.chunks(BATCH_TOKENS) {
            let (loss, gradient) = network.loss_and_gradient(&gather(tokens));
            train_loss += loss * tokens.len() as f64 / train.len() as f64;
            let progress = step as f32 / num_steps as f32;
            let cosine = (std::f32::consts::PI * progress).cos();
            optimiser.step(&mut network.values, &gradient, LEARNING_RATE * (1.0 + cosine) / 2.0);
            step += 1;
        }
        let (held_out_loss, held_out_recall) = evaluate(&network, &held_out, &data.k);
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
    let scaled = |w: &[f32], scale: f32| w.iter().map(|w| w * scale).collect::<Vec<_>>();
    let router = Router::Mlp {
        kind: MlpKind::D2dMoe,
        w1: Tensor::matrix(scaled(network.w1(), 1.0 / input_scale), [hidden, d_model])?,
        w2: Tensor::matrix(scaled(network.w2(), norm_scale), [num_experts, hidden])?,
    };
    Ok((router, training))
}

/// Loss and recall.
fn evaluate(network: &Network, batch: &Batch, k: &Selection) -> (f64, f64) {
    let (_, mut scores) = network.forward(&batch.inputs);
    scores.iter_mut().for_each(|z| *z = z.abs());
    let squares = scores.iter().zip(&batch.targets).map(|(r, t)| f64::from(r - t).powi(2));
    let loss = squares.sum::<f64>() / scores.len() as f64;

    let top = |values: &[f32]| {
        let num_tokens = values.len() / network.num_experts;
        let mut mask = ExpertMask::none(num_tokens, network.num_experts);
        select(k, values, &mut mask);
        mask
    };
    let (chosen, wanted) = (top(&scores), top(&batch.targets));
    let both = chosen.words().iter().zip(wanted.words()).map(|(a, b)| (a & b).count_ones());
    (loss, f64::from(both.sum::<u32>()) / wanted.num_pairs() as f64)
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
