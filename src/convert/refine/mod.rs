//! Refinement: the experts of a converted model, its routers, and its linear compensations, are trained
//! until its final hidden states are close to the dense model's. No labels are needed, only text.
//!
//! The loss is the mean over tokens of ‖h − h₀‖²/‖h₀‖² plus the mean over texts of ‖e − e₀‖², with h
//! the final hidden states, e the text's embedding (their mean, of unit length), and h₀, e₀ the dense
//! model's. Every token trains the experts that it selects, and D2DMoE's routers learn to select what
//! the loss needs, at the same density, where k is dynamic (see [`router`]); other routers stay. The
//! gradient is written by hand and passes through attention and norms, whose weights are frozen, so that
//! every layer learns what the last hidden states need of it.

mod attention;
mod ffn;
#[cfg(test)]
mod finite_differences;
mod layer_norm;
mod loss;
mod router;
mod student;

use std::sync::atomic::AtomicBool;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::model::{CalibrationText, Progress, Watch, dense_ffn};
use super::thresholds::{ThresholdTarget, set_thresholds};
use super::{ConvertOptions, STATISTICS_TOKENS};
use crate::cpu::Cpu;
use crate::error::{Error, Result};
use crate::model::{Batch, Conversion, Encoder, Ffn, FfnRun, Folder};
use ffn::Trained;
use loss::loss_and_gradient;
use student::Student;

/// Tokens of a step, about. Fewer take more steps, but products of them are slower.
const BATCH_TOKENS: usize = 1024;
/// After the warm-up; falls to zero along half a cosine. MiniLM's hidden error after a million tokens at
/// density 0.26, with the routers as they were, is 0.509 with these two, 0.514 with 2e-3 and 2048 tokens,
/// 0.524 with 5e-4 and 2048.
const LEARNING_RATE: f32 = 1e-3;
/// Steps over which the learning rate rises from zero.
const WARM_UP_STEPS: usize = 50;

/// Refines every layer of a conversion, on about `options.refine_tokens` tokens of the text, which is
/// gone through again and again in random order. Experts and linear compensations are trained, and
/// D2DMoE's routers where k is dynamic, until the mean over tokens of ‖h − h₀‖²/‖h₀‖² plus the mean over
/// texts of ‖e − e₀‖² is small: h are the final hidden states, e is a text's mean of them at unit length,
/// h₀ and e₀ are the dense model's. Meanwhile τ keeps the density, and afterwards it is calibrated again.
///
/// `encoder` is the dense model. In memory are the hidden values of one batch in every layer.
///
/// # Errors
/// When an FFN is a GLU or has a mean compensation or gates, a layer is not converted, the text has no
/// token or does not fit the model, or the loss is not finite.
pub fn refine_model(
    mut encoder: Encoder<Cpu>,
    folder: &Folder,
    conversion: &mut Conversion,
    text: CalibrationText<'_>,
    options: &ConvertOptions,
    progress: &dyn Progress,
    interrupted: &AtomicBool,
) -> Result<()> {
    let watch = Watch { progress, interrupted };
    text.check("refine")?;
    if conversion.layers.len() != encoder.num_layers() {
        let expected = format!("all {} layers converted", encoder.num_layers());
        return Err(Error::argument("refine", "conversion", expected, conversion.layers.len()));
    }
    let layers = conversion.layers.iter();
    let ffns = layers
        .map(|record| Trained::new(record.moe_ffn(&dense_ffn(folder, record.layer)?)?))
        .collect::<Result<Vec<_>>>()?;
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(u64::MAX);
    let ffns = train(&encoder, ffns, text.sequences, options, &mut rng, &watch)?;
    for (record, ffn) in conversion.layers.iter_mut().zip(ffns) {
        let moe = ffn.to_moe()?;
        record.neurons = Some(moe.neurons().clone());
        record.compensation = moe.compensation().cloned();
        if record.router != *moe.router() {
            record.router = moe.router().clone();
            // That was another router.
            record.router_training = None;
        }
        encoder.replace_ffn(record.layer, &Ffn::Moe(moe))?;
    }
    let sample = sample_texts(text.sequences, STATISTICS_TOKENS, &mut rng);
    let target =
        ThresholdTarget::Density { density: options.density, scope: options.rel_threshold_scope };
    set_thresholds(&encoder, &sample, Some(target), &watch, &mut conversion.layers)?;
    Ok(())
}

fn train(
    encoder: &Encoder<Cpu>,
    ffns: Vec<Trained>,
    sequences: &[Vec<u32>],
    options: &ConvertOptions,
    rng: &mut impl Rng,
    watch: &Watch<'_>,
) -> Result<Vec<Trained>> {
    let tokens = options.refine_tokens;
    let mut student = Student::new(encoder, ffns);
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let mut workspace = encoder.workspace(longest.max(BATCH_TOKENS))?;
    let mut order: Vec<&Vec<u32>> = Vec::new();
    let (mut done, mut step) = (0, 0);
    while done < tokens {
        let batch = next_batch(&mut order, sequences, rng)?;
        let device_batch = encoder.batch(&batch)?;
        let mut dense = encoder.activations(batch.num_tokens())?;
        encoder.forward(FfnRun::Dense, &mut dense, &device_batch, &mut workspace, None)?;
        let (states, trace) = student.forward(&batch)?;
        let (loss, gradient) = loss_and_gradient(&states, &dense, &batch, encoder.d_model());
        if !(loss.tokens + loss.embeddings).is_finite() {
            let got = "a loss that is not finite";
            return Err(Error::argument("refine", "model", "of finite hidden states", got));
        }
        student.follow_density(&trace, options.density, options.rel_threshold_scope);
        let gradients = student.backward(gradient, trace, &batch);

        step += 1;
        let warm = (step as f32 / WARM_UP_STEPS as f32).min(1.0);
        let cosine = (std::f32::consts::PI * done as f32 / tokens as f32).cos();
        let rate = LEARNING_RATE * warm * (1.0 + cosine) / 2.0;
        for (ffn, gradients) in student.ffns.iter_mut().zip(&gradients) {
            ffn.step(gradients, rate);
        }
        done += batch.num_tokens();
        watch.step("refinement", done.min(tokens), tokens)?;
    }
    Ok(student.ffns)
}

/// The next texts of a random order, about [`BATCH_TOKENS`] of them; a new order when one is used up.
fn next_batch<'a>(
    order: &mut Vec<&'a Vec<u32>>,
    sequences: &'a [Vec<u32>],
    rng: &mut impl Rng,
) -> Result<Batch> {
    if order.is_empty() {
        order.extend(sequences);
        order.shuffle(rng);
    }
    let mut num_tokens = 0;
    let mut texts = Vec::new();
    while let Some(text) = order.last() {
        if !texts.is_empty() && num_tokens + text.len() > BATCH_TOKENS {
            break;
        }
        num_tokens += text.len();
        texts.extend(order.pop());
    }
    Batch::pack(texts)
}

/// About `num_tokens` tokens in whole texts at random, so that every length is as frequent as in the
/// whole: routers that learned run more experts on short texts, whose tokens matter more to the loss.
fn sample_texts<'a>(
    sequences: &'a [Vec<u32>],
    num_tokens: usize,
    rng: &mut impl Rng,
) -> Vec<&'a [u32]> {
    let mut order: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    order.shuffle(rng);
    let mut taken = 0;
    order.retain(|text| {
        let wanted = taken < num_tokens;
        taken += text.len();
        wanted
    });
    order
}
