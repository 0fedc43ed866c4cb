//! `moefy retune`

use std::path::PathBuf;

use moefy::convert::{
    CalibrationText, ErrorBudget, ThresholdTarget, density_for_error, retune_model,
};
use moefy::cpu::Cpu;
use moefy::model::{Encoder, Folder, Output, retune, round};
use moefy::{DType, Result};

use crate::convert::Scope;
use crate::eval::open_reference;
use crate::progress::{Bar, interrupted};
use crate::text::{file_name_of, tokenise_calibration};
use crate::{Common, dtype, inspect};

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("target").required(true))]
pub struct Retune {
    /// A converted model folder
    model: PathBuf,
    /// Where the retuned model goes; may be MODEL itself with --overwrite
    out: PathBuf,
    /// The threshold of every layer, between 0 (every expert runs) and 1
    #[arg(long, value_name = "T", group = "target")]
    rel_threshold: Option<f32>,
    /// Share of the FFN neurons that a token should run on average
    #[arg(long, value_name = "SHARE", group = "target", requires = "calibration")]
    density: Option<f64>,
    /// The largest hidden error on the calibration text, which should be new to the model: the smallest
    /// density that keeps within it is found
    #[arg(long, value_name = "E", group = "target", requires = "calibration")]
    max_error: Option<f64>,
    /// Leave the thresholds, and store the weights in this type: f16, bf16, f32; of a dense MODEL too
    #[arg(long, value_name = "TYPE", group = "target", value_parser = dtype)]
    dtype: Option<DType>,
    /// The dense original to measure that error against [default: the dense FFNs that MODEL
    /// holds, unless it was refined]
    #[arg(long, value_name = "DENSE", requires = "max_error")]
    reference: Option<PathBuf>,
    /// What shares one threshold [default: global]
    #[arg(long, value_enum, conflicts_with_all = ["rel_threshold", "dtype"])]
    threshold_scope: Option<Scope>,
    /// Text to calibrate on and to take statistics of, one text per line
    #[arg(long, value_name = "TEXT", conflicts_with = "dtype")]
    calibration: Option<PathBuf>,
    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
}

impl Retune {
    pub fn run(self, common: &Common) -> Result<()> {
        let folder = Folder::open(&self.model)?;
        let output =
            Output { path: &self.out, overwrite: self.overwrite, interrupted: interrupted() };
        output.check(folder.path())?;
        if let Some(dtype) = self.dtype {
            round(&folder, dtype, output)?;
            inspect::show(&Folder::open(&self.out)?, common);
            return Ok(());
        }
        let file = self.calibration.as_deref();
        let sequences = file.map(|file| tokenise_calibration(&folder, file)).transpose()?;
        let name = file.map(file_name_of);
        let text = name.as_deref().zip(sequences.as_deref());
        let text = text.map(|(name, sequences)| CalibrationText { name, sequences });

        let bar = Bar::new(common.quiet);
        let encoder = Encoder::load(Cpu, &folder)?;
        let scope = self.threshold_scope.unwrap_or_default().into();
        let density = match (self.max_error, text) {
            (Some(max_error), Some(text)) => {
                let reference = self.reference.as_deref().map(open_reference).transpose()?;
                let reference = reference.map(|folder| Encoder::load(Cpu, &folder)).transpose()?;
                let budget = ErrorBudget { max_error, scope, reference: reference.as_ref() };
                Some(density_for_error(&encoder, &folder, text, budget, &bar, interrupted())?)
            }
            _ => self.density,
        };
        let target = match (self.rel_threshold, density) {
            (Some(rel_threshold), _) => ThresholdTarget::RelThreshold(rel_threshold),
            (None, density) => ThresholdTarget::Density {
                density: density.expect("clap asks for one of the three"),
                scope,
            },
        };
        let moefy = retune_model(&encoder, &folder, text, target, &bar, interrupted())?;
        drop(bar);
        retune(&folder, &moefy, output)?;
        inspect::show(&Folder::open(&self.out)?, common);
        Ok(())
    }
}
