//! How to convert.

use super::partition::PartitionMethod;
use super::{CompensationMethod, calibrate};
use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, Gate, Partition, SelectionRule};
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
    /// MoEfication (arXiv 2110.01786, section 3.3): a two-layer router that begins as the experts'
    /// centroids and learns their sums of activations.
    Moefication {
        /// Passes over the calibration tokens.
        epochs: usize,
    },
    /// The cosine with the mean of an expert's unit-length input rows ("parameter centre":
    /// MoEfication, section 3.3); nothing is trained.
    Centroid,
}

impl RouterMethod {
    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::D2dMoe { .. } => "d2dmoe",
            Self::Moefication { .. } => "moefication",
            Self::Centroid => "centroid",
        }
    }
}

/// Which experts run, given their scores. The parameter of the rule is calibrated to a density.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SelectionMethod {
    /// [`SelectionRule::DynamicK`].
    #[default]
    DynamicK,
    /// [`SelectionRule::TopK`], with the density rounded to whole experts.
    TopK,
    /// [`SelectionRule::CumulativeShare`].
    CumulativeShare,
}

impl SelectionMethod {
    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::DynamicK => "dynamic-k",
            Self::TopK => "top-k",
            Self::CumulativeShare => "cumulative-share",
        }
    }

    /// The rule with which the tokens of `scores` \[T, E\] run `mean_k` experts on average.
    pub fn rule(self, scores: &[f32], num_experts: usize, mean_k: f64) -> SelectionRule {
        match self {
            Self::DynamicK => SelectionRule::DynamicK {
                rel_threshold: calibrate::rel_threshold(scores, num_experts, mean_k),
            },
            Self::TopK => calibrate::top_k(num_experts, mean_k).rule,
            Self::CumulativeShare => SelectionRule::CumulativeShare {
                share: calibrate::share(scores, num_experts, mean_k),
            },
        }
    }
}

impl From<SelectionRule> for SelectionMethod {
    fn from(rule: SelectionRule) -> Self {
        match rule {
            SelectionRule::DynamicK { .. } => Self::DynamicK,
            SelectionRule::TopK { .. } => Self::TopK,
            SelectionRule::CumulativeShare { .. } => Self::CumulativeShare,
        }
    }
}

/// Which neurons are shared: those with the largest mean over the calibration tokens of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SharedBy {
    /// |h_n| · ‖row n of W2ᵀ‖: the length of what a neuron adds to the output.
    #[default]
    Strength,
    /// 1 where h_n > 0: how often it fires.
    Frequency,
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

/// Hidden units of a router: many times what the published ones have, and still in memory.
const MAX_ROUTER_HIDDEN: usize = 1 << 16;

/// How to turn dense FFNs into mixtures of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvertOptions {
    /// E; must divide d_ff − `shared`.
    pub num_experts: usize,
    /// Number of neurons that every token runs.
    pub shared: usize,
    /// Which those are.
    pub shared_by: SharedBy,
    /// How the other neurons become experts.
    pub partition: PartitionMethod,
    /// How routers are made.
    pub router: RouterMethod,
    /// Which experts run.
    pub selection: SelectionMethod,
    /// ρ that the selection is calibrated to: executed neurons / d_ff, in (0, 1]. The least is one expert per
    /// token.
    pub density: f64,
    /// What shares one τ. A single FFN is a layer of its own.
    pub rel_threshold_scope: ThresholdScope,
    /// What stands in for skipped experts.
    pub compensation: CompensationMethod,
    /// Ranks of linear compensations, one for each layer of a model, instead of the method's own; empty: all
    /// have that.
    pub ranks: Vec<usize>,
    /// About how many tokens of a calibration text to train on; a shorter text is used as a whole.
    pub calibration_tokens: usize,
    /// About how many tokens [`refine_model`](super::refine_model) trains on.
    pub refine_tokens: usize,
    /// Seed of everything random. The same seed gives the same bits on the same machine and
    /// binary, on any number of threads.
    pub seed: u64,
}

impl Default for ConvertOptions {
    /// 48 experts by k-means, a D2DMoE router, density 0.27 with one τ for all layers, and no
    /// compensation, so that all experts together are the dense FFN.
    fn default() -> Self {
        Self {
            num_experts: 48,
            shared: 0,
            shared_by: SharedBy::default(),
            partition: PartitionMethod::default(),
            router: RouterMethod::D2dMoe { hidden: 128, epochs: 10 },
            selection: SelectionMethod::default(),
            density: 0.27,
            rel_threshold_scope: ThresholdScope::default(),
            compensation: CompensationMethod::None,
            ranks: Vec::new(),
            calibration_tokens: 120_000,
            refine_tokens: 0,
            seed: 0,
        }
    }
}

impl ConvertOptions {
    /// Checks the options against an FFN.
    ///
    /// # Errors
    /// When `num_experts` is 0 or does not divide d_ff − `shared`, when the density is outside
    /// (0, 1] or below one expert per token, when the router has no epoch, or a width that is not between 1
    /// and 65,536, when the rank of a linear compensation is not between 1 and d_model, or when the layer to be refined
    /// is a GLU or has a mean compensation.
    pub fn check(&self, ffn: &DenseFfn) -> Result<()> {
        let width = Partition::width_of_experts(ffn.d_ff(), self.num_experts, self.shared)?;
        check_density(self.density, ffn.d_ff(), self.shared + width)?;
        let check = |name, most: usize, value: usize| {
            let expected = match most {
                usize::MAX => "at least 1".into(),
                _ => format!("between 1 and {most}"),
            };
            match (1..=most).contains(&value) {
                true => Ok(()),
                false => Err(Error::argument("convert", name, expected, value)),
            }
        };
        match self.router {
            RouterMethod::D2dMoe { hidden, epochs } => {
                check("hidden units of the router", MAX_ROUTER_HIDDEN, hidden)?;
                check("epochs", usize::MAX, epochs)?;
            }
            RouterMethod::Moefication { epochs } => check("epochs", usize::MAX, epochs)?,
            RouterMethod::Centroid => {}
        }
        if let CompensationMethod::Linear { rank } = self.compensation {
            let ranks = if self.ranks.is_empty() { &[rank][..] } else { &self.ranks };
            ranks.iter().try_for_each(|&rank| check("rank", ffn.d_model(), rank))?;
        }
        if self.refine_tokens > 0 {
            let is_mean = self.compensation == CompensationMethod::Mean;
            check_refinable(ffn.is_glu(), is_mean, Gate::One)?;
        }
        Ok(())
    }

    /// The compensation of each layer of a model.
    ///
    /// # Errors
    /// When there are ranks, but not one for each layer, or one is 0, or the compensation has none.
    pub(super) fn compensations(&self, num_layers: usize) -> Result<Vec<CompensationMethod>> {
        if self.ranks.is_empty() {
            return Ok(vec![self.compensation; num_layers]);
        }
        let refuse =
            |expected: String, got: String| Err(Error::argument("convert", "ranks", expected, got));
        if !matches!(self.compensation, CompensationMethod::Linear { .. }) {
            let name = self.compensation.name();
            return refuse("none where the compensation is not `linear`".into(), name.into());
        }
        if self.ranks.len() != num_layers || self.ranks.contains(&0) {
            return refuse(
                format!("one of at least 1 for each of the {num_layers} layers"),
                format!("{:?}", self.ranks),
            );
        }
        Ok(self.ranks.iter().map(|&rank| CompensationMethod::Linear { rank }).collect())
    }

    /// What a converted model says about how it came about.
    pub(super) fn method(&self, calibration: Calibration) -> Method {
        let router_hidden = match self.router {
            RouterMethod::D2dMoe { hidden, .. } => Some(hidden),
            RouterMethod::Moefication { .. } => Some(self.num_experts),
            RouterMethod::Centroid => None,
        };
        Method {
            partition: self.partition.name().into(),
            router: self.router.name().into(),
            num_experts: self.num_experts,
            shared: self.shared,
            router_hidden,
            seed: self.seed,
            rel_threshold_scope: self.rel_threshold_scope.name().into(),
            density_target: Some(self.density),
            compensation: Some(self.compensation.name().into()),
            calibration: Some(calibration),
        }
    }
}

/// The gradients of a GLU and of gates are not written, and means would no longer be those of trained
/// neurons.
pub(super) fn check_refinable(is_glu: bool, has_mean: bool, gate: Gate) -> Result<()> {
    if is_glu {
        return Err(Error::argument("refine", "ffn", "a plain FFN", "a GLU"));
    }
    if has_mean {
        return Err(Error::argument("refine", "compensation", "`linear` or `none`", "`mean`"));
    }
    if gate != Gate::One {
        return Err(Error::argument("refine", "gate", "1 for every expert", format!("{gate:?}")));
    }
    Ok(())
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
