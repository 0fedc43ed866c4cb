//! `moefy embed`

use std::path::PathBuf;

use moefy::cpu::Cpu;
use moefy::model::{Backend, Encoder, FfnRun, Folder, Tokenizer, embed};
use moefy::{Error, Result};
use serde::Serialize;

use crate::text::read_lines;
use crate::{Common, Device, Place, output};

#[derive(clap::Args)]
pub struct Embed {
    /// A model folder, converted or not
    model: PathBuf,
    /// The texts
    #[arg(required_unless_present = "text")]
    texts: Vec<String>,
    /// A file with one text per line, instead of texts on the command line; blank lines are left out
    #[arg(long, value_name = "TEXT", conflicts_with = "texts")]
    text: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

#[derive(Serialize)]
struct Embedded<'a> {
    text: &'a str,
    embedding: &'a [f32],
}

impl Embed {
    pub fn run(self, common: &Common) -> Result<()> {
        self.place.check()?;
        match self.place.device {
            Device::Cpu => self.run_on(Cpu, common),
            Device::Cuda => self.run_on(self.place.gpu(common)?, common),
        }
    }

    fn run_on(&self, backend: impl Backend, common: &Common) -> Result<()> {
        let folder = Folder::open(&self.model)?;
        let encoder = Encoder::load(backend, &folder)?;
        let tokenizer = Tokenizer::open(&folder, None)?;
        let texts = match &self.text {
            Some(file) => read_lines(file)?,
            None => self.texts.clone(),
        };
        let embeddings = embed(&encoder, &tokenizer.encode(&texts)?, FfnRun::Stored, None)?;
        let rows = texts.iter().zip(embeddings.chunks_exact(encoder.d_model()));
        if let Some(row) = rows.clone().position(|(_, row)| !row.iter().all(|v| v.is_finite())) {
            let problem = format!(
                "gives numbers that are not finite for text {}: its weights are too large",
                row + 1
            );
            return Err(Error::file(folder.path(), problem));
        }
        if common.json {
            let rows = rows.map(|(text, embedding)| Embedded { text, embedding });
            output::json(&rows.collect::<Vec<_>>());
        } else {
            for (_, embedding) in rows {
                let numbers: Vec<String> = embedding.iter().map(f32::to_string).collect();
                output::line(&numbers.join(" "));
            }
        }
        Ok(())
    }
}
