//! Conversion of a whole model, layer by layer along its dense hidden states.

use std::sync::atomic::{AtomicBool, Ordering};

use super::compensation::{Goal, Sample, compensated};
use super::stream::{Stream, spread};
use super::thresholds::{ThresholdTarget, set_thresholds};
use super::{CompensationMethod, ConvertOptions, STATISTICS_TOKENS, ThresholdScope, make_experts};
use crate::error::{Error, Result};
use crate::ffn::DenseFfn;
use crate::model::format::Calibration;
use crate::model::{Backend, Conversion, ConvertedLayer, Encoder, Ffn, FfnRun, Folder};

/// A text that routers and τ are fitted on.
#[derive(Clone, Copy, Debug)]
pub struct CalibrationText<'a> {
    /// What the converted model will say about it: the file's name.
    pub name: &'a str,
    /// Tokens as the model takes them, in the order of the text.
    pub sequences: &'a [Vec<u32>],
}

impl CalibrationText<'_> {
    /// Nothing can be fitted to a text without tokens.
    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        match self.sequences.iter().any(|sequence| !sequence.is_empty()) {
            true => Ok(()),
            false => Err(Error::argument(op, "text", "of at least one token", "an empty one")),
        }
    }
}

/// Hears how far a conversion is.
pub trait Progress {
    /// `done` of `total` parts of `what` are done.
    fn step(&self, what: &str, done: usize, total: usize);
}

/// Tells nobody.
impl Progress for () {
    fn step(&self, _: &str, _: usize, _: usize) {}
}

/// What every long loop calls.
pub(super) struct Watch<'a> {
    pub progress: &'a dyn Progress,
    pub interrupted: &'a AtomicBool,
}

impl Watch<'_> {
    pub fn step(&self, what: &str, done: usize, total: usize) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.progress.step(what, done, total);
        Ok(())
    }
}

/// Converts every FFN of `folder`; `encoder` is that folder on a device. One layer after another gets
/// its partition, router, selection and compensation, on about `calibration_tokens` tokens as the
/// *converted* model takes them there. A compensation is fitted so that the residual sum comes out as
/// in the dense model: it also makes up for what earlier layers lost, and errors cost what the norm
/// behind the FFN makes of them. Statistics, and a threshold that all layers share, come from about [`STATISTICS_TOKENS`]
/// tokens. Such a threshold is found last, while compensations are fitted under each layer's own.
///
/// In memory are the hidden states of the calibration tokens, one layer's FFN inputs, and one layer's FFN;
/// with a compensation also the dense model's hidden states, and one layer's targets. `interrupted` may be raised to stop with
/// [`Error::Interrupted`].
///
/// # Errors
/// When the folder is converted already, the options do not fit it, the text is shorter than
/// [`MIN_TOKENS`](super::MIN_TOKENS) or does not fit the model, or the device refuses.
pub fn convert_model<B: Backend>(
    mut encoder: Encoder<B>,
    folder: &Folder,
    text: CalibrationText<'_>,
    options: &ConvertOptions,
    progress: &dyn Progress,
    interrupted: &AtomicBool,
) -> Result<Conversion> {
    let watch = Watch { progress, interrupted };
    options.check(&dense_ffn(folder, 0)?)?;
    let compensations = options.compensations(encoder.num_layers())?;
    let sequences = spread(text.sequences, options.calibration_tokens);
    let compensates = compensations.iter().any(|&method| method != CompensationMethod::None);
    let mut dense = compensates.then(|| Stream::start(&encoder, &sequences)).transpose()?;
    let mut converted = Stream::start(&encoder, &sequences)?;
    let num_layers = encoder.num_layers();
    let mut layers = Vec::with_capacity(num_layers);
    for (layer, method) in compensations.into_iter().enumerate() {
        let step = |part: &str, done, total| {
            watch.step(&format!("layer {} of {num_layers}: {part}", layer + 1), done, total)
        };
        let attention = |done, total| step("attention", done, total);
        let inputs = converted.attention(&encoder, layer, &attention)?;
        let ffn = dense_ffn(folder, layer)?;
        let (moe, router_training) =
            make_experts(&ffn, &inputs, options, layer, &mut |done, total| {
                step("router", done, total)
            })?;
        let run = |done, total| step("FFN", done, total);
        let moe = match &mut dense {
            None => moe,
            Some(dense) => {
                let dense_inputs = dense.attention(&encoder, layer, &attention)?;
                dense.ffn(&encoder, layer, FfnRun::Dense, &run)?;
                let norm_weight = encoder.ffn_norm_weight(layer)?;
                let goal = Goal::new(&ffn, &dense_inputs, &dense.to_host(&encoder)?, &norm_weight)?;
                drop(dense_inputs);
                let targets = goal.targets(&inputs);
                let (weights, metric) = (&goal.weights, &goal.metric);
                let sample = Sample { inputs: &inputs, targets: &targets, weights, metric };
                compensated(moe, method, &sample)?
            }
        };
        drop(inputs);

        layers.push(ConvertedLayer { router_training, ..ConvertedLayer::new(layer, &moe) });
        encoder.replace_ffn(layer, &Ffn::Moe(moe))?;
        converted.ffn(&encoder, layer, FfnRun::Stored, &run)?;
    }
    drop((dense, converted));

    let sample = spread(&sequences, STATISTICS_TOKENS);
    let target = match options.rel_threshold_scope {
        ThresholdScope::Layer => None,
        scope => Some(ThresholdTarget::Density { density: options.density, scope }),
    };
    set_thresholds(&encoder, &sample, target, &watch, &mut layers)?;
    let num_tokens = sequences.iter().map(|sequence| sequence.len()).sum();
    let calibration = Calibration { file_name: text.name.into(), num_tokens };
    Ok(Conversion { method: options.method(calibration), layers })
}

pub(super) fn dense_ffn(folder: &Folder, layer: usize) -> Result<DenseFfn> {
    match folder.ffn(layer)? {
        Ffn::Dense(ffn) => Ok(ffn),
        Ffn::Moe(_) => Err(Error::file(
            folder.path(),
            "is converted already: change it with `retune`, or `restore` it first",
        )),
    }
}
