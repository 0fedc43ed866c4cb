//! `moefy inspect`

use std::path::PathBuf;

use moefy::Result;
use moefy::ffn::SelectionRule;
use moefy::model::Folder;
use serde_json::json;

use crate::{Common, output};

#[derive(clap::Args)]
pub struct Inspect {
    /// A model folder, converted or not
    model: PathBuf,
}

impl Inspect {
    pub fn run(self, common: &Common) -> Result<()> {
        show(&Folder::open(&self.model)?, common);
        Ok(())
    }
}

/// Prints what a folder holds.
pub fn show(folder: &Folder, common: &Common) {
    let config = folder.config();
    let moefy = folder.moefy();
    if common.json {
        output::json(&json!({
            "model": folder.path(),
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
