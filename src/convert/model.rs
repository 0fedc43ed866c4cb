//! Conversion of a whole model, layer by layer along its dense hidden states.

use std::sync::atomic::{AtomicBool, Ordering};

use super::stream::{Stream, spread};
use super::{
    ConvertOptions, STATISTICS_TOKENS, ThresholdScope, calibrate, make_experts, routing_statistics,
};
use crate::cpu;
use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, ExpertMask, Selection};
use crate::model::format::Calibration;
use crate::model::{Backend, Conversion, ConvertedLayer, Encoder, Ffn, FfnRun, Folder};

/// Share of the experts that a global τ may run too many or too few.
const TOLERANCE: f64 = 1e-3;
/// Rounds of search for a global τ; two or three are usual.
const MAX_ROUNDS: usize = 8;

/// A text that routers and τ are fitted on.
#[derive(Clone, Copy, Debug)]
pub struct CalibrationText<'a> {
    /// What the converted model will say about it: the file's name.
    pub name: &'a str,
    /// Tokens as the model takes them, in the order of the text.
    pub sequences: &'a [Vec<u32>],
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
struct Watch<'a> {
    progress: &'a dyn Progress,
    interrupted: &'a AtomicBool,
}

impl Watch<'_> {
    fn step(&self, what: &str, done: usize, total: usize) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.progress.step(what, done, total);
        Ok(())
    }
}

/// Converts every FFN of `folder`; `encoder` is that folder on a device. Routers learn from the
/// dense hidden states of about `calibration_tokens` tokens. τ and the statistics come from a
/// part of them, about [`STATISTICS_TOKENS`], run through the *converted* model, so that the
/// density is the one that will be executed.
///
/// In memory are the hidden states of the calibration tokens, one layer's FFN inputs, and one
/// layer's FFN. `interrupted` may be raised to stop with [`Error::Interrupted`].
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
    let sequences = spread(text.sequences, options.calibration_tokens);
    let mut stream = Stream::start(&encoder, &sequences)?;
    let num_layers = encoder.num_layers();
    let mut layers = Vec::with_capacity(num_layers);
    for layer in 0..num_layers {
        let what = |part: &str| format!("layer {} of {num_layers}: {part}", layer + 1);
        let inputs = stream.attention(&encoder, layer, &|done, total| {
            watch.step(&what("attention"), done, total)
        })?;
        let dense = dense_ffn(folder, layer)?;
        let (moe, training) = make_experts(&dense, &inputs, options, layer, &mut |done, total| {
            watch.step(&what("router"), done, total)
        })?;
        drop(inputs);
        let training = Some(training);
        layers
            .push(ConvertedLayer { router_training: training, ..ConvertedLayer::new(layer, &moe) });
        encoder.replace_ffn(layer, &Ffn::Moe(moe))?;
        stream.ffn(&encoder, layer, FfnRun::Dense, &|done, total| {
            watch.step(&what("FFN"), done, total)
        })?;
    }
    drop(stream);

    let sample = spread(&sequences, STATISTICS_TOKENS);
    set_thresholds(&encoder, &sample, options, &watch, &mut layers)?;
    let num_tokens = sequences.iter().map(|sequence| sequence.len()).sum();
    let calibration = Calibration { file_name: text.name.into(), num_tokens };
    Ok(Conversion { method: options.method(calibration), layers })
}

fn dense_ffn(folder: &Folder, layer: usize) -> Result<DenseFfn> {
    match folder.ffn(layer)? {
        Ffn::Dense(ffn) => Ok(ffn),
        Ffn::Moe(_) => Err(Error::file(
            folder.path(),
            "is converted already: change it with `retune`, or `restore` it first",
        )),
    }
}

/// Gives every layer its selection and statistics, on a sample of the text.
fn set_thresholds<B: Backend>(
    encoder: &Encoder<B>,
    sample: &[&[u32]],
    options: &ConvertOptions,
    watch: &Watch<'_>,
    layers: &mut [ConvertedLayer],
) -> Result<()> {
    let mean_k = options.mean_k(layers[0].partition.d_ff());
    let mut routed = Routed::run(encoder, sample, layers, mean_k, None)?;
    if options.rel_threshold_scope == ThresholdScope::Global {
        // The scores of one round tell the τ of the next: what earlier layers skip moves the
        // scores of later ones only a little.
        for round in 1..=MAX_ROUNDS {
            watch.step("threshold", round, MAX_ROUNDS)?;
            let shared = calibrate::rel_threshold(&routed.scores, options.num_experts, mean_k);
            routed = Routed::run(encoder, sample, layers, mean_k, Some(shared))?;
            if (routed.mean_k() - mean_k).abs() <= TOLERANCE * options.num_experts as f64 {
                break;
            }
        }
    }
    for (layer, (selection, mask)) in layers.iter_mut().zip(routed.layers) {
        layer.selection = selection;
        layer.statistics = Some(routing_statistics(&layer.partition, &mask));
    }
    Ok(())
}

/// What the converted model did with a sample.
struct Routed {
    /// By layer.
    layers: Vec<(Selection, ExpertMask)>,
    /// Of all layers, one after another, \[layers · T, E\].
    scores: Vec<f32>,
}

impl Routed {
    /// With the threshold that is `shared`, or else with one per layer that lets `mean_k` experts
    /// run.
    fn run<B: Backend>(
        encoder: &Encoder<B>,
        sample: &[&[u32]],
        layers: &[ConvertedLayer],
        mean_k: f64,
        shared: Option<f32>,
    ) -> Result<Self> {
        let mut routed = Self { layers: Vec::new(), scores: Vec::new() };
        let mut stream = Stream::start(encoder, sample)?;
        for (layer, converted) in layers.iter().enumerate() {
            let num_experts = converted.partition.num_experts();
            let inputs = stream.attention(encoder, layer, &|_, _| Ok(()))?;
            let scores = cpu::router_scores(&converted.router, &inputs, encoder.d_model())?;
            let threshold =
                shared.unwrap_or_else(|| calibrate::rel_threshold(&scores, num_experts, mean_k));
            let selection = Selection::dynamic_k(threshold);
            let run = FfnRun::Selection(selection);
            let words = stream.ffn(encoder, layer, run, &|_, _| Ok(()))?;
            let mask = ExpertMask::from_words(scores.len() / num_experts, num_experts, words)?;
            routed.layers.push((selection, mask));
            routed.scores.extend(scores);
        }
        Ok(routed)
    }

    fn mean_k(&self) -> f64 {
        let pairs: usize = self.layers.iter().map(|(_, mask)| mask.num_pairs()).sum();
        let tokens: usize = self.layers.iter().map(|(_, mask)| mask.num_tokens()).sum();
        pairs as f64 / tokens as f64
    }
}
