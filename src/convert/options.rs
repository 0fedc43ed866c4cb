//! How to convert.

use super::partition::PartitionMethod;
use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, Partition};
use crate::model::format::{Calibration, Method};

/// How routers are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RouterMethod {
    /// D2DMoE (arXiv 2310.04361, section 3.2): a two-layer router, trained to predict the norm of
    /// every expert's output.
    D2dMoe {
        /// Width between the two layers; 128 in the paper for BERT-sized models.
        hidden: usize,
        /// Passes over the calibration tokens.
        epochs: usize,
    },
}

impl RouterMethod {
    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::D2dMoe { .. } => "d2dmoe",
        }
    }
}

/// What shares one τ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ThresholdScope {
    /// All layers: those that need more experts get more. The density target is the mean's.
    #[default]
    Global,
    /// Every layer has its own, and each meets the density target.
    Layer,
}

impl ThresholdScope {
    /// Every scope.
    pub const ALL: [Self; 2] = [Self::Global, Self::Layer];

    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Layer => "layer",
        }
    }
}

/// How to turn dense FFNs into mixtures of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertOptions {
    /// E; must divide d_ff − `shared`.
    pub num_experts: usize,
    /// Neurons that every token runs: those that contribute most, on average over the calibration
    /// tokens.
    pub shared: usize,
    /// How the other neurons become experts.
    pub partition: PartitionMethod,
    /// How routers are made.
    pub router: RouterMethod,
    /// ρ that τ is calibrated to: executed neurons / d_ff, in (0, 1]. The least is one expert per
    /// token.
    pub density: f64,
    /// What shares one τ. A single FFN is a layer of its own.
    pub rel_threshold_scope: ThresholdScope,
    /// About how many tokens of a calibration text to train on; a shorter text is used as a whole.
    pub calibration_tokens: usize,
    /// Seed of everything random. The same seed gives the same bits on the same machine and
    /// binary, on any number of threads.
    pub seed: u64,
}

impl Default for ConvertOptions {
    /// 48 experts by k-means, a D2DMoE router, density 0.27 with one τ for all layers.
    fn default() -> Self {
        Self {
            num_experts: 48,
            shared: 0,
            partition: PartitionMethod::default(),
            router: RouterMethod::D2dMoe { hidden: 128, epochs: 10 },
            density: 0.27,
            rel_threshold_scope: ThresholdScope::default(),
            calibration_tokens: 120_000,
            seed: 0,
        }
    }
}

impl ConvertOptions {
    /// Checks the options against an FFN.
    ///
    /// # Errors
    /// When `num_experts` is 0 or does not divide d_ff − `shared`, when the density is outside
    /// (0, 1] or below one expert per token, or when the router has no width or no epoch.
    pub fn check(&self, ffn: &DenseFfn) -> Result<()> {
        let width = Partition::width_of_experts(ffn.d_ff(), self.num_experts, self.shared)?;
        check_density(self.density, ffn.d_ff(), self.shared + width)?;
        let RouterMethod::D2dMoe { hidden, epochs } = self.router;
        for (name, value) in [("hidden", hidden), ("epochs", epochs)] {
            if value == 0 {
                return Err(Error::argument("convert", name, "at least 1", value));
            }
        }
        Ok(())
    }

    /// What a converted model says about how it came about.
    pub(super) fn method(&self, calibration: Calibration) -> Method {
        let RouterMethod::D2dMoe { hidden, .. } = self.router;
        Method {
            partition: self.partition.name().into(),
            router: self.router.name().into(),
            num_experts: self.num_experts,
            shared: self.shared,
            router_hidden: Some(hidden),
            seed: self.seed,
            rel_threshold_scope: self.rel_threshold_scope.name().into(),
            density_target: Some(self.density),
            calibration: Some(calibration),
        }
    }
}

/// ρ lies between one expert per token, which with the shared ones is `least` neurons, and 1.
pub(super) fn check_density(density: f64, d_ff: usize, least: usize) -> Result<()> {
    let least = least as f64 / d_ff as f64;
    if (least..=1.0).contains(&density) {
        return Ok(());
    }
    let expected = format!("between {least:.4} (one expert per token) and 1");
    Err(Error::argument("convert", "density", expected, density))
}
