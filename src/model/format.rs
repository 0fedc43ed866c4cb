//! The `moefy` object of `config.json`: what a converted folder says about its MoEfied FFNs.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::ffn::{Compensation, Gate, MlpKind, Partition, Router, RoutingStatistics, Selection};

/// The key of `config.json` that holds a [`MoefyConfig`].
pub const KEY: &str = "moefy";
/// The format that this version reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// The `moefy` object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoefyConfig {
    /// [`FORMAT_VERSION`]; a newer one is refused.
    pub format_version: u32,
    /// How the layers came about.
    pub method: Method,
    /// One record per MoEfied FFN, by ascending layer; the other FFNs are dense.
    pub layers: Vec<LayerConfig>,
}

/// How a model was converted: provenance, which nothing computes with. Names are those of the
/// options of `moefy convert`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// How neurons became experts: "kmeans", "joint", "graph", "random".
    pub partition: String,
    /// How the router was made: "d2dmoe", "moefication", "centroid".
    pub router: String,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Width of a two-layer router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_hidden: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// How τ was chosen: "layer" or "global" for a calibrated one, "given" otherwise.
    pub rel_threshold_scope: String,
    /// The density that τ was calibrated to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density_target: Option<f64>,
    /// What stands in for skipped experts: "none", "mean", "linear".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compensation: Option<String>,
    /// The text that routers and τ were fitted on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
}

/// The calibration text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Name of the file, without its folder.
    pub file_name: String,
    /// Tokens used.
    pub num_tokens: usize,
}

/// One MoEfied FFN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Index of the layer.
    pub layer: usize,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Form of the router.
    pub router: RouterConfig,
    /// Which experts run.
    pub selection: Selection,
    /// Factor of an expert's output.
    #[serde(default)]
    pub gate: Gate,
    /// Form of the compensation.
    #[serde(default)]
    pub compensation: Option<CompensationConfig>,
    /// Whether the neurons were trained further, and so are not the dense model's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub refined: bool,
    /// How the router's training went.
    #[serde(default)]
    pub router_training: Option<RouterTraining>,
    /// What routing did over the calibration text.
    #[serde(default)]
    pub statistics: Option<RoutingStatistics>,
}

/// The form of a [`Router`]; its weights are tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RouterConfig {
    /// [`Router::Linear`]: `router.weight`.
    Linear,
    /// [`Router::Mlp`]: `router.w1`, `router.w2`.
    Mlp {
        /// Which of the published activations.
        activation: MlpKind,
        /// Width.
        hidden: usize,
    },
    /// [`Router::Centroid`]: `router.centroids`.
    Centroid,
}

impl From<&Router> for RouterConfig {
    fn from(router: &Router) -> Self {
        match router {
            Router::Linear { .. } => Self::Linear,
            Router::Mlp { kind, w1, .. } => Self::Mlp { activation: *kind, hidden: w1.shape()[0] },
            Router::Centroid { .. } => Self::Centroid,
        }
    }
}

/// The form of a [`Compensation`]; its values are tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum CompensationConfig {
    /// [`Compensation::Mean`]: `compensation.mean`.
    Mean,
    /// [`Compensation::Linear`]: `compensation.u`, `compensation.v`, `compensation.c`.
    Linear {
        /// Rows of u and v.
        rank: usize,
    },
}

impl From<&Compensation> for CompensationConfig {
    fn from(compensation: &Compensation) -> Self {
        match compensation {
            Compensation::Mean { .. } => Self::Mean,
            Compensation::Linear { v, .. } => Self::Linear { rank: v.shape()[0] },
        }
    }
}

/// How the training of a router went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterTraining {
    /// Epochs trained.
    pub epochs: usize,
    /// The epoch whose weights were kept: the one with the least held-out loss.
    pub best_epoch: usize,
    /// Mean loss over the training tokens, at the kept epoch.
    pub train_loss: f64,
    /// Mean loss over the held-out tokens, at the kept epoch.
    pub held_out_loss: f64,
    /// Share of the true top experts that the router's own top experts hold, over the held-out
    /// tokens.
    pub held_out_recall: f64,
}

impl MoefyConfig {
    /// Whether neurons were trained further, so that the dense model is not in the folder any more.
    pub fn is_refined(&self) -> bool {
        self.layers.iter().any(|layer| layer.refined)
    }

    /// Reads the `moefy` object of a `config.json`, if there is one; `file` is for errors.
    ///
    /// # Errors
    /// When the format version is newer than [`FORMAT_VERSION`], or a key is missing, unknown or of
    /// the wrong type.
    pub fn parse(file: &Path, config: &Map<String, Value>) -> Result<Option<Self>> {
        let Some(value) = config.get(KEY) else { return Ok(None) };
        let version = value.get("format_version").and_then(Value::as_u64);
        let supported = u64::from(FORMAT_VERSION);
        let problem = match version {
            Some(version) if version == supported => None,
            Some(version) if version > supported => Some(format!(
                "`moefy` object of format_version {version}, but this moefy reads up to \
                 {supported}: update moefy"
            )),
            _ => Some(format!("`moefy` object without format_version {supported}")),
        };
        if let Some(problem) = problem {
            return Err(Error::file(file, problem));
        }
        let moefy =
            Self::deserialize(value).map_err(|e| Error::file(file, format!("`moefy`: {e}")))?;
        Ok(Some(moefy))
    }

    /// Checks the records against a model of `num_layers` layers with FFNs of `d_ff` neurons.
    ///
    /// # Errors
    /// When a layer does not exist, comes twice or out of order, or a value of its record cannot
    /// work.
    pub fn check(&self, file: &Path, num_layers: usize, d_ff: usize) -> Result<()> {
        let mut next = 0;
        for record in &self.layers {
            let context = |problem: String| {
                Error::file(file, format!("`moefy`: layer {}: {problem}", record.layer))
            };
            if record.layer < next || record.layer >= num_layers {
                let expected = format!("layers in ascending order, below {num_layers}");
                return Err(context(format!("expected {expected}")));
            }
            next = record.layer + 1;
            record.check(d_ff).map_err(|e| context(e.to_string()))?;
        }
        Ok(())
    }

    /// The record of a layer, if its FFN is MoEfied.
    pub fn layer(&self, layer: usize) -> Option<&LayerConfig> {
        self.layers.iter().find(|record| record.layer == layer)
    }

    /// Through text, in which an f32 such as 0.3 is short.
    pub(super) fn to_value(&self) -> Value {
        let text = serde_json::to_string(self).expect("plain data with text keys");
        serde_json::from_str(&text).expect("just written")
    }
}

impl LayerConfig {
    fn check(&self, d_ff: usize) -> Result<()> {
        Partition::width_of_experts(d_ff, self.num_experts, self.shared)?;
        self.selection.check(self.num_experts)?;
        if matches!(self.router, RouterConfig::Mlp { hidden: 0, .. }) {
            return Err(Error::argument("router", "hidden", "at least 1", 0));
        }
        if matches!(self.compensation, Some(CompensationConfig::Linear { rank: 0 })) {
            return Err(Error::argument("compensation", "rank", "at least 1", 0));
        }
        match &self.statistics {
            Some(statistics) if statistics.hotness.len() != self.num_experts => {
                let expected = format!("one for each of the {} experts", self.num_experts);
                let got = statistics.hotness.len();
                Err(Error::argument("statistics", "hotness", expected, got))
            }
            Some(statistics) if !(0.0..=1.0).contains(&statistics.density) => {
                Err(Error::argument("statistics", "density", "between 0 and 1", statistics.density))
            }
            _ => Ok(()),
        }
    }
}
