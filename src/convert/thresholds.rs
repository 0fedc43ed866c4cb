//! τ of a converted model, found on text that runs through the converted model itself.

use std::sync::atomic::AtomicBool;

use super::model::{CalibrationText, Progress, Watch};
use super::options::check_density;
use super::stream::{Stream, spread};
use super::{STATISTICS_TOKENS, SelectionMethod, ThresholdScope, routing_statistics};
use crate::cpu;
use crate::error::{Error, Result};
use crate::ffn::{ExpertMask, Selection, SelectionRule};
use crate::model::format::Calibration;
use crate::model::{Backend, ConvertedLayer, Encoder, Ffn, FfnRun, Folder, MoefyConfig};

/// Share of the experts that a global τ may run too many or too few.
const TOLERANCE: f64 = 1e-3;
/// Rounds of search for a global τ; two or three are usual.
const MAX_ROUNDS: usize = 8;

/// What the thresholds of a converted model should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ThresholdTarget {
    /// This τ, in every layer.
    RelThreshold(f32),
    /// Those that execute a share of the neurons, whatever the kind of a layer's rule.
    Density {
        /// ρ: executed neurons / d_ff, the mean over all MoEfied layers.
        density: f64,
        /// What shares one τ.
        scope: ThresholdScope,
    },
}

/// Gives a converted model other thresholds: the `moefy` object to write with
/// [`model::retune`](crate::model::retune). Statistics are those of `text`, about
/// [`STATISTICS_TOKENS`] of it, through the model with its new thresholds; without a text there are
/// none, and the target cannot be a density.
///
/// # Errors
/// When the folder is not converted, the target is out of range or needs a text, one τ is asked for
/// layers with different experts or kinds of rules, the text has no token or does not fit the model,
/// or the device refuses.
pub fn retune_model<B: Backend>(
    encoder: &Encoder<B>,
    folder: &Folder,
    text: Option<CalibrationText<'_>>,
    target: ThresholdTarget,
    progress: &dyn Progress,
    interrupted: &AtomicBool,
) -> Result<MoefyConfig> {
    let (mut moefy, mut layers) = converted_layers(folder)?;
    let mut calibration = None;
    match (text, target) {
        (Some(text), _) => {
            text.check("retune")?;
            let sample = spread(text.sequences, STATISTICS_TOKENS);
            let num_tokens = sample.iter().map(|sequence| sequence.len()).sum();
            calibration = Some(Calibration { file_name: text.name.into(), num_tokens });
            let watch = Watch { progress, interrupted };
            set_thresholds(encoder, &sample, Some(target), &watch, &mut layers)?;
        }
        (None, ThresholdTarget::RelThreshold(rel_threshold)) => {
            for layer in &mut layers {
                let rule = SelectionRule::DynamicK { rel_threshold };
                layer.selection = Selection { rule, ..layer.selection };
                layer.selection.check(layer.partition.num_experts())?;
            }
        }
        (None, ThresholdTarget::Density { .. }) => {
            return Err(Error::argument("retune", "text", "given for a density", "none"));
        }
    }

    for (record, layer) in moefy.layers.iter_mut().zip(layers) {
        record.selection = layer.selection;
        record.statistics = layer.statistics;
    }
    let method = &mut moefy.method;
    (method.rel_threshold_scope, method.density_target) = match target {
        ThresholdTarget::RelThreshold(_) => ("given".into(), None),
        ThresholdTarget::Density { density, scope } => (scope.name().into(), Some(density)),
    };
    method.calibration = calibration.or(method.calibration.take());
    Ok(moefy)
}

/// What a converted folder says about itself, and its layers.
pub(super) fn converted_layers(folder: &Folder) -> Result<(MoefyConfig, Vec<ConvertedLayer>)> {
    let Some(moefy) = folder.moefy() else {
        return Err(Error::file(folder.path(), "is not a converted model"));
    };
    if moefy.layers.is_empty() {
        return Err(Error::file(folder.path(), "has no converted layer"));
    }
    let mut layers = Vec::new();
    for record in &moefy.layers {
        if let Ffn::Moe(ffn) = folder.ffn(record.layer)? {
            layers.push(ConvertedLayer::new(record.layer, &ffn));
        }
    }
    Ok((moefy.clone(), layers))
}

/// Gives every layer its selection and statistics, on a sample of a text; without a target selections
/// stay as they are. Returns the sample's final hidden states \[T, d_model\].
pub(super) fn set_thresholds<B: Backend>(
    encoder: &Encoder<B>,
    sample: &[&[u32]],
    target: Option<ThresholdTarget>,
    watch: &Watch<'_>,
    layers: &mut [ConvertedLayer],
) -> Result<Vec<f32>> {
    watch.step("threshold", 0, MAX_ROUNDS)?;
    let routed = match target {
        None => Routed::run(encoder, sample, layers, |layer, _| layer.selection.rule)?,
        Some(ThresholdTarget::RelThreshold(rel_threshold)) => {
            let rule = SelectionRule::DynamicK { rel_threshold };
            Routed::run(encoder, sample, layers, |_, _| rule)?
        }
        Some(ThresholdTarget::Density { density, scope }) => {
            for ConvertedLayer { partition, .. } in layers.iter() {
                let least = partition.shared() + partition.expert_width();
                check_density(density, partition.d_ff(), least)?;
            }
            let per_layer = Routed::run(encoder, sample, layers, |layer, scores| {
                let partition = &layer.partition;
                let mean_k = partition.mean_k(density);
                let method = SelectionMethod::from(layer.selection.rule);
                method.rule(scores, partition.num_experts(), mean_k)
            })?;
            match scope {
                ThresholdScope::Layer => per_layer,
                ThresholdScope::Global => {
                    one_for_all(encoder, sample, density, watch, layers, per_layer)?
                }
            }
        }
    };
    for (layer, (selection, mask)) in layers.iter_mut().zip(routed.layers) {
        layer.selection = selection;
        layer.statistics = Some(routing_statistics(&layer.partition, &mask));
    }
    Ok(routed.hidden)
}

/// Searches for one τ. The scores of one round tell the τ of the next: what earlier layers skip
/// moves the scores of later ones only a little.
fn one_for_all<B: Backend>(
    encoder: &Encoder<B>,
    sample: &[&[u32]],
    density: f64,
    watch: &Watch<'_>,
    layers: &[ConvertedLayer],
    mut routed: Routed,
) -> Result<Routed> {
    // Scores of all layers are compared, and experts of all count the same.
    let kind_of = |layer: &ConvertedLayer| {
        let experts = [layer.partition.num_experts(), layer.partition.expert_width()];
        (experts, SelectionMethod::from(layer.selection.rule))
    };
    let first = kind_of(&layers[0]);
    let ([num_experts, width], method) = first;
    if let Some(other) = layers.iter().map(kind_of).find(|&other| other != first) {
        let expected = "`layer` where layers differ in their experts or in the kind of their rule";
        let ([experts, of_width], other) = other;
        let got = format!(
            "`global` for {num_experts} experts of {width} neurons by {} and {experts} of {of_width} by {}",
            method.name(),
            other.name()
        );
        return Err(Error::argument("convert", "scope of the threshold", expected, got));
    }
    let mean_k = layers[0].partition.mean_k(density);
    for round in 1..=MAX_ROUNDS {
        watch.step("threshold", round, MAX_ROUNDS)?;
        let shared = method.rule(&routed.scores, num_experts, mean_k);
        routed = Routed::run(encoder, sample, layers, |_, _| shared)?;
        if (routed.mean_k() - mean_k).abs() <= TOLERANCE * num_experts as f64 {
            break;
        }
    }
    Ok(routed)
}

/// What the converted model did with a sample.
struct Routed {
    /// By MoEfied layer.
    layers: Vec<(Selection, ExpertMask)>,
    /// Of all MoEfied layers, one after another, \[layers · T, E\].
    scores: Vec<f32>,
    /// The final hidden states \[T, d_model\].
    hidden: Vec<f32>,
}

impl Routed {
    /// With the rule that `rule` gives each layer for its scores.
    fn run<B: Backend>(
        encoder: &Encoder<B>,
        sample: &[&[u32]],
        layers: &[ConvertedLayer],
        rule: impl Fn(&ConvertedLayer, &[f32]) -> SelectionRule,
    ) -> Result<Self> {
        let mut routed = Self { layers: Vec::new(), scores: Vec::new(), hidden: Vec::new() };
        let mut stream = Stream::start(encoder, sample)?;
        for index in 0..encoder.num_layers() {
            let inputs = stream.attention(encoder, index, &|_, _| Ok(()))?;
            let Some(layer) = layers.iter().find(|layer| layer.layer == index) else {
                stream.ffn(encoder, index, FfnRun::Stored, &|_, _| Ok(()))?;
                continue;
            };
            let num_experts = layer.partition.num_experts();
            let scores = cpu::router_scores(&layer.router, &inputs, encoder.d_model())?;
            let selection = Selection { rule: rule(layer, &scores), ..layer.selection };
            let run = FfnRun::Selection(selection);
            let words = stream.ffn(encoder, index, run, &|_, _| Ok(()))?;
            let mask = ExpertMask::from_words(scores.len() / num_experts, num_experts, words)?;
            routed.layers.push((selection, mask));
            routed.scores.extend(scores);
        }
        routed.hidden = stream.to_host(encoder)?;
        Ok(routed)
    }

    fn mean_k(&self) -> f64 {
        let pairs: usize = self.layers.iter().map(|(_, mask)| mask.num_pairs()).sum();
        let tokens: usize = self.layers.iter().map(|(_, mask)| mask.num_tokens()).sum();
        pairs as f64 / tokens as f64
    }
}
