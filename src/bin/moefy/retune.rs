//! `moefy retune`

use std::path::PathBuf;

use moefy::Result;
use moefy::convert::{CalibrationText, ThresholdTarget, retune_model};
use moefy::cpu::Cpu;
use moefy::model::{Encoder, Folder, Output, retune};

use crate::convert::Scope;
use crate::progress::{Bar, interrupted};
use crate::text::{file_name_of, tokenise_calibration};
use crate::{Common, inspect};

#[derive(clap::Args)]
pub struct Retune {
    /// A converted model folder
    model: PathBuf,
    /// Where the retuned model goes; may be MODEL itself with --overwrite
    out: PathBuf,
    /// The threshold of every layer, between 0 (every expert runs) and 1
    #[arg(long, value_name = "T", required_unless_present = "density", conflicts_with = "density")]
    rel_threshold: Option<f32>,
    /// Share of the FFN neurons that a token should run on average
    #[arg(long, value_name = "SHARE", requires = "calibration")]
    density: Option<f64>,
    /// What shares one threshold
    #[arg(long, value_enum, default_value_t)]
    threshold_scope: Scope,
    /// Text to calibrate on and to take statistics of, one text per line
    #[arg(long, value_name = "TEXT")]
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
        let target = match (self.rel_threshold, self.density) {
            (Some(rel_threshold), _) => ThresholdTarget::RelThreshold(rel_threshold),
            (None, density) => ThresholdTarget::Density {
                density: density.expect("clap asks for one of the two"),
                scope: self.threshold_scope.into(),
            },
        };
        let file = self.calibration.as_deref();
        let sequences = file.map(|file| tokenise_calibration(&folder, file)).transpose()?;
        let name = file.map(file_name_of);
        let text = name.as_deref().zip(sequences.as_deref());
        let text = text.map(|(name, sequences)| CalibrationText { name, sequences });

        let bar = Bar::new(common.quiet);
        let encoder = Encoder::load(Cpu, &folder)?;
        let moefy = retune_model(&encoder, &folder, text, target, &bar, interrupted())?;
        drop(bar);
        retune(&folder, &moefy, output)?;
        inspect::show(&Folder::open(&self.out)?, common);
        Ok(())
    }
}
