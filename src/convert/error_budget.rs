//! The density that an error budget asks for.

use std::sync::atomic::AtomicBool;

use super::model::{CalibrationText, Progress, Watch};
use super::stream::{Stream, spread};
use super::thresholds::{ThresholdTarget, converted_layers, set_thresholds};
use super::{STATISTICS_TOKENS, ThresholdScope};
use crate::error::{Error, Result};
use crate::eval::relative_errors;
use crate::ffn::Partition;
use crate::model::{Backend, Encoder, FfnRun, Folder};

/// Densities that are tried one after another.
const STEP: f64 = 0.05;
/// How often the first step that is good enough is halved.
const HALVINGS: usize = 4;

/// What is wrong with a refined model whose dense original is not given.
pub const NEEDS_REFERENCE: &str =
    "was refined and no longer holds the dense model: give that as the reference";

/// How far a converted model may be from the dense one.
#[derive(Clone, Copy)]
pub struct ErrorBudget<'a, B: Backend> {
    /// The most that mean over tokens of ‖h − h₀‖/‖h₀‖ may be, with h the final hidden states and h₀ the
    /// dense model's.
    pub max_error: f64,
    /// What shares one τ.
    pub scope: ThresholdScope,
    /// The dense model; without one, the dense FFNs that the converted model holds, unless it was refined.
    pub reference: Option<&'a Encoder<B>>,
}

/// The smallest density ρ, to a third of a percent, at which a converted model keeps within an error
/// budget on about [`STATISTICS_TOKENS`] tokens of `text`: the density for a [`ThresholdTarget`] of the
/// same scope. On text that the conversion saw errors are too small.
///
/// Densities are tried from below, because a model that was refined or compensated at one density need
/// not become better with every expert more.
///
/// # Errors
/// When the folder is not converted, no density is good enough, the text has no token, it or the reference
/// does not fit the model, or the device refuses.
pub fn density_for_error<B: Backend>(
    encoder: &Encoder<B>,
    folder: &Folder,
    text: CalibrationText<'_>,
    budget: ErrorBudget<'_, B>,
    progress: &dyn Progress,
    interrupted: &AtomicBool,
) -> Result<f64> {
    let ErrorBudget { max_error, scope, reference } = budget;
    let watch = Watch { progress, interrupted };
    text.check("error budget")?;
    let (moefy, mut layers) = converted_layers(folder)?;
    if reference.is_none() && moefy.is_refined() {
        return Err(Error::file(folder.path(), NEEDS_REFERENCE));
    }
    let d_model = encoder.d_model();
    let dense = reference.unwrap_or(encoder);
    if dense.d_model() != d_model {
        let expected = format!("of width {d_model}");
        return Err(Error::argument("error budget", "reference", expected, dense.d_model()));
    }
    let least = layers.iter().map(|l| least_density(&l.partition)).fold(0.0, f64::max);
    let sample = spread(text.sequences, STATISTICS_TOKENS);
    let dense = final_states(dense, &sample)?;
    let mut error_at = |density| -> Result<f64> {
        let target = ThresholdTarget::Density { density, scope };
        let states = set_thresholds(encoder, &sample, Some(target), &watch, &mut layers)?;
        Ok(relative_errors(&states, &dense, d_model) * d_model as f64 / dense.len() as f64)
    };

    let num_steps = ((1.0 - least) / STEP).ceil() as usize;
    let mut best = f64::INFINITY;
    let mut too_little = least;
    for step in 0..=num_steps {
        let mut enough = (least + step as f64 * STEP).min(1.0);
        let error = error_at(enough)?;
        if error <= max_error {
            let halvings = if step == 0 { 0 } else { HALVINGS };
            for _ in 0..halvings {
                let middle = f64::midpoint(too_little, enough);
                if error_at(middle)? <= max_error {
                    enough = middle;
                } else {
                    too_little = middle;
                }
            }
            return Ok(enough);
        }
        best = best.min(error);
        too_little = enough;
    }
    let expected = format!("at least {best:.4}, the least at any density");
    Err(Error::argument("error budget", "max_error", expected, max_error))
}

/// That of one expert per token.
fn least_density(partition: &Partition) -> f64 {
    (partition.shared() + partition.expert_width()) as f64 / partition.d_ff() as f64
}

/// The final hidden states of the dense model.
fn final_states<B: Backend>(encoder: &Encoder<B>, sample: &[&[u32]]) -> Result<Vec<f32>> {
    let mut stream = Stream::start(encoder, sample)?;
    for layer in 0..encoder.num_layers() {
        stream.attention(encoder, layer, &|_, _| Ok(()))?;
        stream.ffn(encoder, layer, FfnRun::Dense, &|_, _| Ok(()))?;
    }
    stream.to_host(encoder)
}
