//! `moefy inspect`

use std::path::{Path, PathBuf};

use moefy::convert::routing_statistics;
use moefy::cpu::Cpu;
use moefy::ffn::{ExpertMask, SelectionRule};
use moefy::model::format::{LayerConfig, MoefyConfig};
use moefy::model::{
    BATCH_TOKENS, Backend, Batch, Encoder, Ffn, FfnRun, Folder, Tokenizer, batches_in_order,
};
use moefy::{Error, Result};
use serde_json::json;

use crate::chart::{self, Axis, Panel, Series};
use crate::text::read_lines;
use crate::{Common, Device, Place, output};

#[derive(clap::Args)]
pub struct Inspect {
    /// A model folder, converted or not
    model: PathBuf,
    /// Draw how many tokens run each expert, a line for each layer
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Run this text, one text per line, and count which experts run, instead of what was counted when the
    /// model was converted
    #[arg(long, value_name = "TEXT")]
    text: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

impl Inspect {
    pub fn run(self, common: &Common) -> Result<()> {
        self.place.check()?;
        let folder = Folder::open(&self.model)?;
        let mut moefy = folder.moefy().cloned();
        self.svg.as_deref().map_or(Ok(()), chart::check)?;
        if moefy.is_none() && self.text.is_some() {
            return Err(Error::file(folder.path(), "is dense: no expert runs with --text"));
        }
        match (&self.text, &mut moefy, self.place.device) {
            (Some(text), Some(moefy), Device::Cpu) => count(Cpu, &folder, text, moefy)?,
            (Some(text), Some(moefy), Device::Cuda) => {
                count(self.place.gpu(common)?, &folder, text, moefy)?;
            }
            (None, _, Device::Cuda) => {
                let expected = "given together with --text, because nothing runs without it";
                return Err(Error::argument("inspect", "--device", expected, "cuda alone"));
            }
            _ => {}
        }
        let layers = moefy.as_ref().map_or(&[][..], |moefy| &moefy.layers);
        if self.svg.is_some() && layers.iter().all(|layer| layer.statistics.is_none()) {
            let problem = "has no counts to draw with --svg: give a converted model a --text";
            return Err(Error::file(folder.path(), problem));
        }
        show_with(&folder, moefy.as_ref(), common);
        match &self.svg {
            Some(file) => chart::write(file, &expert_use(layers)),
            None => Ok(()),
        }
    }
}

/// Runs a text, in its order, and replaces the statistics of every layer by what was selected.
fn count(
    backend: impl Backend,
    folder: &Folder,
    text: &Path,
    moefy: &mut MoefyConfig,
) -> Result<()> {
    let sequences = Tokenizer::open(folder, None)?.encode(&read_lines(text)?)?;
    let encoder = Encoder::load(backend, folder)?;
    let max_tokens = sequences.iter().map(Vec::len).max().unwrap_or(0).max(BATCH_TOKENS);
    let mut workspace = encoder.workspace(max_tokens)?;
    let mut x = encoder.activations(max_tokens)?;
    let mut words = vec![Vec::new(); folder.num_layers()];
    for together in batches_in_order(&sequences, max_tokens) {
        let batch = encoder.batch(&Batch::pack(together)?)?;
        let mut observe =
            |layer: usize, mask: &ExpertMask| words[layer].extend_from_slice(mask.words());
        encoder.forward(FfnRun::Stored, &mut x, &batch, &mut workspace, Some(&mut observe))?;
    }
    let num_tokens = sequences.iter().map(Vec::len).sum();
    for record in &mut moefy.layers {
        let Ffn::Moe(ffn) = folder.ffn(record.layer)? else { continue };
        let words = std::mem::take(&mut words[record.layer]);
        let mask = ExpertMask::from_words(num_tokens, ffn.num_experts(), words)?;
        record.statistics = Some(routing_statistics(ffn.partition(), &mask));
    }
    Ok(())
}

/// The share of the tokens that run an expert, experts in descending order.
fn expert_use(layers: &[LayerConfig]) -> String {
    let line = |layer: &LayerConfig| {
        let statistics = layer.statistics.as_ref()?;
        let mut shares = statistics.hotness.clone();
        shares.sort_by(|a, b| b.total_cmp(a));
        let name = format!("layer {}: {}", layer.layer, output::percent(statistics.density));
        let points = shares.iter().enumerate().map(|(i, share)| ((i + 1) as f64, 100.0 * share));
        Some(Series { name, points: points.collect() })
    };
    let series: Vec<Series> = layers.iter().filter_map(line).collect();
    let most = series.iter().map(|series| series.points.len()).max().unwrap_or(1).max(2);
    let number = |value: f64| format!("{value:.0}");
    chart::svg(&[Panel {
        x: Axis {
            name: "experts, most used first".into(),
            range: 1.0..most as f64,
            labels: 12,
            label: number,
        },
        y: Axis {
            name: "tokens that run it, %".into(),
            range: 0.0..100.0,
            labels: 10,
            label: number,
        },
        level: None,
        series,
    }])
}

/// Prints what a folder holds.
pub fn show(folder: &Folder, common: &Common) {
    show_with(folder, folder.moefy(), common);
}

/// The same with another `moefy` object than the folder's.
fn show_with(folder: &Folder, moefy: Option<&MoefyConfig>, common: &Common) {
    let config = folder.config();
    if common.json {
        output::json(&json!({
            "model": output::path(folder.path()),
            "num_layers": folder.num_layers(),
            "d_model": config.hidden_size,
            "d_ff": config.intermediate_size,
            "activation": config.activation,
            "moefy": moefy,
        }));
        return;
    }
    output::line(&format!(
        "{}: {} layers, d_model {}, d_ff {}, {:?}",
        folder.path().display(),
        folder.num_layers(),
        config.hidden_size,
        config.intermediate_size,
        config.activation,
    ));
    let Some(moefy) = moefy else {
        output::line("dense: no layer is MoEfied");
        return;
    };
    let method = &moefy.method;
    output::line(&format!(
        "partition {}, router {}, seed {}, threshold {}",
        method.partition, method.router, method.seed, method.rel_threshold_scope
    ));
    let rows = (0..folder.num_layers()).map(|layer| {
        let Some(record) = moefy.layer(layer) else {
            let mut row = [const { String::new() }; 11];
            row[0] = layer.to_string();
            row[1] = "dense".into();
            return row;
        };
        let routing = |show: fn(&moefy::ffn::RoutingStatistics) -> String| {
            record.statistics.as_ref().map_or("-".into(), show)
        };
        [
            layer.to_string(),
            record.num_experts.to_string(),
            record.shared.to_string(),
            selection(record.selection.rule),
            routing(|s| output::percent(s.density)),
            routing(|s| format!("{:.1}", s.mean_k)),
            routing(|s| s.max_k.to_string()),
            routing(|s| output::percent(s.hotness.iter().copied().fold(0.0, f64::max))),
            routing(|s| output::percent(s.union_text_order.u8)),
            routing(|s| output::percent(s.union_text_order.u128)),
            routing(|s| output::percent(s.union_rarest_first.u128)),
        ]
    });
    let header = [
        "layer",
        "experts",
        "shared",
        "selection",
        "density",
        "mean k",
        "max k",
        "hottest",
        "U_8",
        "U_128",
        "U_128 sorted",
    ];
    output::line(&output::table(header, rows));
}

fn selection(rule: SelectionRule) -> String {
    match rule {
        SelectionRule::TopK { k } => format!("top {k}"),
        SelectionRule::DynamicK { rel_threshold } => format!(">= {rel_threshold:.3} max"),
        SelectionRule::CumulativeShare { share } => format!("share {share:.3}"),
    }
}
