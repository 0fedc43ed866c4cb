//! `moefy convert`

use std::path::PathBuf;

use moefy::Result;
use moefy::convert::{
    CalibrationText, ConvertOptions, PartitionMethod, RouterMethod, ThresholdScope, convert_model,
};
use moefy::cpu::Cpu;
use moefy::model::{Encoder, Folder, Output, write_moefied};

use crate::progress::{Bar, interrupted};
use crate::text::{file_name_of, tokenise};
use crate::{Common, inspect};

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
    /// How neurons become experts
    #[arg(long, value_enum, default_value_t)]
    partition: Partition,
    /// How experts are predicted
    #[arg(long, value_enum, default_value_t)]
    router: Router,
    /// Width of the router
    #[arg(long, value_name = "N", default_value_t = 128)]
    router_hidden: usize,
    /// Share of the FFN neurons that a token should run on average
    #[arg(long, value_name = "SHARE")]
    density: f64,
    /// What shares one threshold
    #[arg(long, value_enum, default_value_t)]
    threshold_scope: Scope,
    /// Text to train and calibrate on, one text per line
    #[arg(long, value_name = "TEXT")]
    calibration: PathBuf,
    /// Tokens of the calibration text to use at most
    #[arg(long, value_name = "N", default_value_t = ConvertOptions::default().calibration_tokens)]
    calibration_tokens: usize,
    /// Passes over the calibration tokens
    #[arg(long, value_name = "N", default_value_t = 10)]
    epochs: usize,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Partition {
    /// Neurons with similar input weights together, in experts of equal size
    #[default]
    Kmeans,
    /// At random
    Random,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Router {
    /// Two layers that predict the norm of every expert's output
    #[default]
    D2dmoe,
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
        let folder = Folder::open(&self.model)?;
        let output =
            Output { path: &self.out, overwrite: self.overwrite, interrupted: interrupted() };
        // Better now than after minutes of work.
        output.check(folder.path())?;
        let options = self.options();
        let sequences = tokenise(&folder, &self.calibration)?;
        let name = file_name_of(&self.calibration);
        let text = CalibrationText { name: &name, sequences: &sequences };

        let bar = Bar::new(common.quiet);
        let encoder = Encoder::load(Cpu, &folder)?;
        let conversion = convert_model(encoder, &folder, text, &options, &bar, interrupted())?;
        drop(bar);
        write_moefied(&folder, &conversion, output)?;
        inspect::show(&Folder::open(&self.out)?, common);
        Ok(())
    }

    fn options(&self) -> ConvertOptions {
        let Router::D2dmoe = self.router;
        ConvertOptions {
            num_experts: self.experts,
            shared: self.shared,
            partition: match self.partition {
                Partition::Kmeans => PartitionMethod::default(),
                Partition::Random => PartitionMethod::Random,
            },
            router: RouterMethod::D2dMoe { hidden: self.router_hidden, epochs: self.epochs },
            density: self.density,
            rel_threshold_scope: self.threshold_scope.into(),
            calibration_tokens: self.calibration_tokens,
            seed: self.seed,
        }
    }
}
