//! Writing of converted, retuned and restored models.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::format::{FORMAT_VERSION, KEY, LayerConfig, Method, MoefyConfig, RouterTraining};
use super::output::{Output, Staging};
use super::shards::INDEX;
use super::weights_out::write_weights;
use super::{Ffn, Folder, ffn_tensors, replacements};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ffn::{
    Compensation, DenseFfn, Gate, MoeFfn, Partition, Router, RoutingStatistics, Selection,
};

/// What a conversion decided: everything but the neurons, which stay in the source.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversion {
    /// How it was done.
    pub method: Method,
    /// The layers to convert, any subset, by ascending index.
    pub layers: Vec<ConvertedLayer>,
}

/// What a conversion decided about one FFN.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertedLayer {
    /// Index of the layer.
    pub layer: usize,
    /// The split.
    pub partition: Partition,
    /// The router.
    pub router: Router,
    /// Which experts run.
    pub selection: Selection,
    /// Factor of an expert's output.
    pub gate: Gate,
    /// The compensation.
    pub compensation: Option<Compensation>,
    /// Neurons in expert order that take the place of the source's: those of a refined layer.
    pub neurons: Option<DenseFfn>,
    /// How the router's training went.
    pub router_training: Option<RouterTraining>,
    /// What routing did over the calibration text.
    pub statistics: Option<RoutingStatistics>,
}

impl ConvertedLayer {
    /// What `ffn` adds to the dense FFN of `layer`.
    pub fn new(layer: usize, ffn: &MoeFfn) -> Self {
        Self {
            layer,
            partition: ffn.partition().clone(),
            router: ffn.router().clone(),
            selection: ffn.selection(),
            gate: ffn.gate(),
            compensation: ffn.compensation().cloned(),
            neurons: None,
            router_training: None,
            statistics: None,
        }
    }

    /// The layer that this makes of the dense FFN.
    ///
    /// # Errors
    /// When it does not fit the FFN.
    pub fn moe_ffn(&self, dense: &DenseFfn) -> Result<MoeFfn> {
        let neurons = match &self.neurons {
            Some(refined) => refined.clone(),
            None => dense.reordered(&self.partition.order()),
        };
        let (partition, router) = (self.partition.clone(), self.router.clone());
        let moe = MoeFfn::from_expert_order(neurons, partition, router, self.selection)?;
        let moe = moe.with_gate(self.gate);
        match &self.compensation {
            Some(compensation) => moe.with_compensation(compensation.clone()),
            None => Ok(moe),
        }
    }

    fn record(&self) -> LayerConfig {
        LayerConfig {
            layer: self.layer,
            num_experts: self.partition.num_experts(),
            shared: self.partition.shared(),
            router: (&self.router).into(),
            selection: self.selection,
            gate: self.gate,
            compensation: self.compensation.as_ref().map(Into::into),
            refined: self.neurons.is_some(),
            router_training: self.router_training.clone(),
            statistics: self.statistics.clone(),
        }
    }
}

/// Writes the MoEfied form of a dense model. At most two copies of one layer's FFN are in memory.
///
/// # Errors
/// When the source is converted already, the conversion doesn't fit it, the output is refused, or
/// writing fails or is interrupted.
pub fn write_moefied(source: &Folder, conversion: &Conversion, output: Output<'_>) -> Result<()> {
    if source.moefy().is_some() {
        let problem = "is converted already: change it with `retune`, or `restore` it first";
        return Err(Error::file(source.path(), problem));
    }
    let moefy = MoefyConfig {
        format_version: FORMAT_VERSION,
        method: conversion.method.clone(),
        layers: conversion.layers.iter().map(ConvertedLayer::record).collect(),
    };
    let config = with_moefy(source, &moefy)?;
    let mut replaced = HashMap::new();
    for (layer, record) in conversion.layers.iter().zip(&moefy.layers) {
        replaced.extend(replacements::moefied(source, layer, record)?);
    }
    let neurons = |layer| {
        let converted = conversion.layers.iter().find(|converted| converted.layer == layer);
        let converted = converted.expect("only these are replaced");
        match &converted.neurons {
            Some(refined) => Ok(refined.clone()),
            None => {
                Ok(ffn_tensors::read_dense(source, layer)?.reordered(&converted.partition.order()))
            }
        }
    };
    let staging = Staging::new(source.path(), output)?;
    write_weights(source.weights(), replaced, &neurons, &staging)?;
    finish(source, staging, &config)
}

/// Writes a converted model with another `moefy` object, whose selections, gates, statistics and
/// provenance may differ. The weight files are copied byte by byte.
///
/// # Errors
/// When the source is not a converted model, the new object has other layers, experts, routers or
/// compensations, the output is refused, or writing fails or is interrupted.
pub fn retune(source: &Folder, moefy: &MoefyConfig, output: Output<'_>) -> Result<()> {
    let old = converted(source)?;
    let config = with_moefy(source, moefy)?;
    let fixed = |record: &LayerConfig| {
        let (router, compensation) = (record.router.clone(), record.compensation.clone());
        (record.layer, record.num_experts, record.shared, router, compensation)
    };
    if !old.layers.iter().map(fixed).eq(moefy.layers.iter().map(fixed)) {
        let expected = "of the same layers, experts, routers and compensations";
        return Err(Error::argument("retune", "moefy", expected, "others"));
    }
    let staging = Staging::new(source.path(), output)?;
    for shard in &source.weights().shards {
        let mut writer = staging.create(&shard.name)?;
        writer.write(shard.file_bytes())?;
        writer.finish()?;
    }
    if source.weights().index_metadata.is_some() {
        staging.copy(source.path(), Path::new(INDEX))?;
    }
    finish(source, staging, &config)
}

/// Writes the dense model that a converted one came from: every tensor bit-identical and in the
/// shard it was in, `config.json` without the `moefy` object.
///
/// # Errors
/// When the source is not a converted model or one whose neurons were refined, the output is refused,
/// or writing fails or is interrupted.
pub fn restore(source: &Folder, output: Output<'_>) -> Result<()> {
    let moefy = converted(source)?;
    if let Some(record) = moefy.layers.iter().find(|record| record.refined) {
        let problem = format!(
            "layer {} was refined, so its neurons are no longer those of the dense model: take the \
             model that this one was converted from",
            record.layer
        );
        return Err(Error::file(source.path(), problem));
    }
    let layers = moefy.layers.iter();
    let replaced = layers.flat_map(|record| replacements::restored(source, record)).collect();
    let neurons = |layer| match source.ffn(layer)? {
        Ffn::Moe(ffn) => Ok(ffn.to_dense()),
        Ffn::Dense(ffn) => Ok(ffn),
    };
    let mut config = source.config().raw().clone();
    config.shift_remove(KEY);
    let staging = Staging::new(source.path(), output)?;
    write_weights(source.weights(), replaced, &neurons, &staging)?;
    finish(source, staging, &config)
}

/// Writes a model, converted or not, with every floating-point tensor rounded to one element type: f16 and
/// bf16 take half the space of f32. `config.json` and all other files are carried over; what `restore` makes
/// of a rounded model is the rounded dense one.
///
/// # Errors
/// When a value is too large for the type, the output is refused, or writing fails or is interrupted.
pub fn round(source: &Folder, dtype: DType, output: Output<'_>) -> Result<()> {
    let neurons = |layer| {
        let got = format!("layer {layer}");
        Err(Error::argument("round", "neurons", "left as they are", got))
    };
    let staging = Staging::new(source.path(), output)?;
    write_weights(source.weights(), replacements::rounded(source, dtype)?, &neurons, &staging)?;
    finish(source, staging, source.config().raw())
}

fn converted(source: &Folder) -> Result<&MoefyConfig> {
    source.moefy().ok_or_else(|| Error::file(source.path(), "is not a converted model"))
}

/// The source's config with a `moefy` object that is sure to be read again as it is.
fn with_moefy(source: &Folder, moefy: &MoefyConfig) -> Result<Map<String, Value>> {
    let file = source.path().join("config.json");
    moefy.check(&file, source.num_layers(), source.config().intermediate_size)?;
    let mut config = source.config().raw().clone();
    config.insert(KEY.to_string(), moefy.to_value());
    match MoefyConfig::parse(&file, &config) {
        Ok(Some(read)) if read == *moefy => Ok(config),
        _ => {
            let expected = format!("of format_version {FORMAT_VERSION} and of finite numbers");
            Err(Error::argument("write", "the moefy object", expected, "another"))
        }
    }
}

fn finish(source: &Folder, staging: Staging<'_>, config: &Map<String, Value>) -> Result<()> {
    staging.create("config.json")?.write_json(config)?;
    staging.carry_over(source.path())?;
    staging.commit()
}
