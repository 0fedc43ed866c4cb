//! `moefy convert`

use std::path::PathBuf;

use moefy::convert::{
    CalibrationText, CompensationMethod, ConvertOptions, PartitionMethod, RouterMethod,
    SelectionMethod, ThresholdScope, convert_model, refine_model,
};
use moefy::cpu::Cpu;
use moefy::model::{Encoder, Folder, Output, write_moefied};
use moefy::{Error, Result};

use crate::explain::explain;
use crate::progress::{Bar, interrupted};
use crate::text::{file_name_of, tokenise_calibration};
use crate::{Common, inspect, output};

#[derive(clap::Args)]
pub struct Convert {
    /// A dense model in a Hugging Face folder
    model: PathBuf,
    /// Where the converted model goes
    out: PathBuf,
    /// Experts per FFN; must divide its neurons
    #[arg(long, value_name = "E")]
    experts: usize,
    /// Neurons per FFN that every token runs
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared: usize,
    /// Which neurons those are [default: strength]
    #[arg(long, value_enum, requires = "shared")]
    shared_by: Option<SharedBy>,
    /// How neurons become experts
    #[arg(long, value_enum, default_value_t)]
    partition: Partition,
    /// How experts are predicted
    #[arg(long, value_enum, default_value_t)]
    router: Router,
    /// Width of a d2dmoe router [default: 128]
    #[arg(long, value_name = "N")]
    router_hidden: Option<usize>,
    /// Which experts run, given their predicted importance
    #[arg(long, value_enum, default_value_t)]
    selection: Selection,
    /// Share of the FFN neurons that a token should run on average
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    density: f64,
    /// What shares one threshold
    #[arg(long, value_enum, default_value_t)]
    threshold_scope: Scope,
    /// What stands in for skipped experts
    #[arg(long, value_enum, default_value_t)]
    compensation: Compensation,
    /// Rank of a linear compensation; or ranks, one for each layer [default: 32]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    rank: Vec<usize>,
    /// Text to train and calibrate on, one text per line
    #[arg(long, value_name = "TEXT")]
    calibration: PathBuf,
    /// Tokens of the calibration text to use at most
    #[arg(long, value_name = "N", default_value_t = ConvertOptions::default().calibration_tokens)]
    calibration_tokens: usize,
    /// Tokens to train experts, routers (d2dmoe with dynamic-k) and compensation on, until the model is
    /// close to the dense one; the text is gone through again and again [default: none]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    refine: usize,
    /// Passes over the calibration tokens
    #[arg(long, value_name = "N", default_value_t = 10)]
    epochs: usize,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Say in words what was chosen for every layer, and why
    #[arg(long)]
    explain: bool,
    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Partition {
    /// Neurons with similar input weights together, in experts of equal size
    #[default]
    Kmeans,
    /// Neurons with similar input weights that also fire together
    Joint,
    /// The graph of neurons that fire together, cut by METIS (in builds with the feature `metis`)
    Graph,
    /// At random
    Random,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Router {
    /// Two layers that predict the norm of every expert's output
    #[default]
    D2dmoe,
    /// Two layers that predict the sum of every expert's activations
    Moefication,
    /// The mean input weights of every expert
    Centroid,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Selection {
    /// Every expert whose score is at least a share of the token's largest
    #[default]
    DynamicK,
    /// The same number for every token
    TopK,
    /// The best experts that together hold a share of the token's scores
    CumulativeShare,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum SharedBy {
    /// Those that add most to the output
    #[default]
    Strength,
    /// Those that fire most often
    Frequency,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Compensation {
    /// Nothing
    #[default]
    None,
    /// The mean of every neuron
    Mean,
    /// A low-rank linear map of the token
    Linear,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
pub enum Scope {
    /// All layers: those that need more experts get more
    #[default]
    Global,
    /// Every layer has its own
    Layer,
}

impl From<Scope> for ThresholdScope {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Global => Self::Global,
            Scope::Layer => Self::Layer,
        }
    }
}

impl Convert {
    pub fn run(self, common: &Common) -> Result<()> {
        self.check(common)?;
        let folder = Folder::open(&self.model)?;
        let output =
            Output { path: &self.out, overwrite: self.overwrite, interrupted: interrupted() };
        // Better now than after minutes of work.
        output.check(folder.path())?;
        let options = self.options();
        let sequences = tokenise_calibration(&folder, &self.calibration)?;
        let name = file_name_of(&self.calibration);
        let text = CalibrationText { name: &name, sequences: &sequences };

        let bar = Bar::new(common.quiet);
        let encoder = Encoder::load(Cpu, &folder)?;
        let mut conversion = convert_model(encoder, &folder, text, &options, &bar, interrupted())?;
        if options.refine_tokens > 0 {
            let dense = Encoder::load(Cpu, &folder)?;
            refine_model(dense, &folder, &mut conversion, text, &options, &bar, interrupted())?;
        }
        drop(bar);
        write_moefied(&folder, &conversion, output)?;
        let converted = Folder::open(&self.out)?;
        inspect::show(&converted, common);
        if self.explain {
            explain(&converted).iter().for_each(|line| output::line(&format!("\n{line}")));
        }
        Ok(())
    }

    /// Options that another one leaves without effect.
    fn check(&self, common: &Common) -> Result<()> {
        let unless = |option, given: bool, expected| match given {
            true => Err(Error::argument("convert", option, expected, "it without")),
            false => Ok(()),
        };
        let is_d2dmoe = matches!(self.router, Router::D2dmoe);
        let is_linear = matches!(self.compensation, Compensation::Linear);
        let has_width = self.router_hidden.is_some();
        unless("--router-hidden", has_width && !is_d2dmoe, "given with --router d2dmoe")?;
        unless("--rank", !self.rank.is_empty() && !is_linear, "given with --compensation linear")?;
        unless("--explain", self.explain && common.json, "given without --json")
    }

    fn options(&self) -> ConvertOptions {
        ConvertOptions {
            num_experts: self.experts,
            shared: self.shared,
            shared_by: match self.shared_by.unwrap_or_default() {
                SharedBy::Strength => moefy::convert::SharedBy::Strength,
                SharedBy::Frequency => moefy::convert::SharedBy::Frequency,
            },
            partition: match self.partition {
                Partition::Kmeans => PartitionMethod::Kmeans,
                Partition::Joint => PartitionMethod::Joint,
                Partition::Graph => PartitionMethod::Graph,
                Partition::Random => PartitionMethod::Random,
            },
            router: match self.router {
                Router::D2dmoe => {
                    let hidden = self.router_hidden.unwrap_or(128);
                    RouterMethod::D2dMoe { hidden, epochs: self.epochs }
                }
                Router::Moefication => RouterMethod::Moefication { epochs: self.epochs },
                Router::Centroid => RouterMethod::Centroid,
            },
            selection: match self.selection {
                Selection::DynamicK => SelectionMethod::DynamicK,
                Selection::TopK => SelectionMethod::TopK,
                Selection::CumulativeShare => SelectionMethod::CumulativeShare,
            },
            density: self.density,
            rel_threshold_scope: self.threshold_scope.into(),
            compensation: match self.compensation {
                Compensation::None => CompensationMethod::None,
                Compensation::Mean => CompensationMethod::Mean,
                Compensation::Linear => {
                    CompensationMethod::Linear { rank: self.rank.first().copied().unwrap_or(32) }
                }
            },
            ranks: if self.rank.len() > 1 { self.rank.clone() } else { Vec::new() },
            calibration_tokens: self.calibration_tokens,
            refine_tokens: self.refine,
            seed: self.seed,
        }
    }
}
