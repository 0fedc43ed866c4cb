//! `moefy restore`

use std::path::PathBuf;

use moefy::Result;
use moefy::model::{self, Folder, Output};

use crate::progress::interrupted;
use crate::{Common, output};

#[derive(clap::Args)]
pub struct Restore {
    /// A converted model folder
    model: PathBuf,
    /// Where the dense model goes
    out: PathBuf,
    /// Replace OUT if it exists
    #[arg(long)]
    overwrite: bool,
}

impl Restore {
    pub fn run(self, common: &Common) -> Result<()> {
        let folder = Folder::open(&self.model)?;
        let Self { out, overwrite, .. } = &self;
        let output = Output { path: out, overwrite: *overwrite, interrupted: interrupted() };
        model::restore(&folder, output)?;
        output::written(common, &self.out);
        Ok(())
    }
}
