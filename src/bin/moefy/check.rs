//! `moefy check`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moefy::cuda::Device;
use moefy::cuda::check::{Checked, ModelTexts, Verdict, check, check_model};
use moefy::model::{Folder, Tokenizer};
use moefy::{DType, Error, Result};
use serde_json::json;

use crate::text::SentencePairs;
use crate::{Common, dtype, output};

/// Sentences of a file to compare embeddings of.
const SENTENCES: usize = 64;
/// The same where there is no file.
const OWN_SENTENCES: [&str; 12] = [
    "A cat sleeps on the warm stones of the old wall.",
    "The committee will publish its report on water quality in October.",
    "Rain.",
    "How many moons does the planet Mars have?",
    "She tuned the violin twice before the second movement, and nobody in the hall noticed.",
    "Bread is baked from flour, water, salt and yeast.",
    "The train to the coast leaves from platform nine at a quarter past six.",
    "An operating system decides which process runs next.",
    "In 1903 two brothers flew a machine that was heavier than air for twelve seconds.",
    "Nobody answered the door",
    "The enzyme binds to its substrate, lowers the energy that the reaction needs, and is free again afterwards.",
    "He paid 14.50 for two tickets, three coffees and a map of the harbour!",
];

#[derive(clap::Args)]
pub struct Check {
    /// Instead of the kernels, a model folder, converted or not: as a whole against the reference and the CPU
    model: Option<PathBuf>,
    /// Sentence pairs with similarity scores (CSV: sentence, sentence, score): the model ranks them all, and
    /// the first sentences are compared one by one [default: no ranking, a few sentences of our own]
    #[arg(long, value_name = "CSV", requires = "model")]
    sts: Option<PathBuf>,
    /// Types of the model's weights and activations: f16, bf16, f32
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = dtype, requires = "model")]
    #[arg(default_value = "f16,bf16")]
    dtype: Vec<DType>,
}

impl Check {
    pub fn run(self, common: &Common) -> Result<()> {
        let device = Arc::new(Device::open(0)?);
        let mut all = Vec::new();
        match &self.model {
            Some(model) => self.check_model(&device, model, &mut all)?,
            None => check(&device, |checked| all.push(checked))?,
        }
        let count = |verdict| all.iter().filter(|checked| checked.verdict == verdict).count();
        let [passed, failed, refused] =
            [Verdict::Passed, Verdict::Failed, Verdict::Refused].map(count);
        let name = &device.properties().name;
        if common.json {
            let model = self.model.as_deref().map(output::path);
            output::json(&json!({ "device": name, "model": model, "passed": passed,
                                  "failed": failed, "refused": refused, "checks": all }));
        } else {
            output::line(&table(&all));
            output::line(&format!("{name}: {passed} passed, {failed} failed, {refused} refused"));
        }
        match failed {
            0 => Ok(()),
            _ => Err(Error::argument(
                "check",
                "errors",
                "at most the bars",
                format!("{failed} above"),
            )),
        }
    }

    fn check_model(
        &self,
        device: &Arc<Device>,
        model: &Path,
        all: &mut Vec<Checked>,
    ) -> Result<()> {
        let folder = Folder::open(model)?;
        let tokenizer = Tokenizer::open(&folder, None)?;
        let pairs = self.sts.as_deref().map(SentencePairs::read).transpose()?;
        let (sequences, scores) = match &pairs {
            Some(pairs) => {
                let sentences: Vec<_> = pairs.first.iter().chain(&pairs.second).collect();
                (tokenizer.encode(&sentences)?, &pairs.scores[..])
            }
            None => (tokenizer.encode(&OWN_SENTENCES)?, &[][..]),
        };
        let texts = ModelTexts {
            sentences: &sequences[..sequences.len().min(SENTENCES)],
            pairs: pairs.as_ref().map(|_| (&sequences[..], scores)),
        };
        check_model(device, &folder, &self.dtype, &texts, |checked| all.push(checked))
    }
}

fn table(all: &[Checked]) -> String {
    let header = ["what", "shape", "type", "error", "bar", "verdict"];
    output::table(
        header,
        all.iter().map(|checked| {
            let number = |value: f64| match value {
                0.0 => "0".into(),
                value if value.is_nan() => "-".into(),
                value => format!("{value:.1e}"),
            };
            [
                checked.name.clone(),
                checked.shape.clone(),
                checked.dtype.map_or("-".into(), |dtype| dtype.to_string()),
                number(checked.error),
                number(checked.bar),
                match checked.verdict {
                    Verdict::Passed => "passed",
                    Verdict::Failed => "FAILED",
                    Verdict::Refused => "refused",
                }
                .into(),
            ]
        }),
    )
}
