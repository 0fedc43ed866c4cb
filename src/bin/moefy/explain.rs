//! What a conversion chose, in words.

use moefy::ffn::SelectionRule;
use moefy::model::Folder;
use moefy::model::format::{CompensationConfig, LayerConfig, Method, MoefyConfig, RouterConfig};

use crate::output::percent;

/// A line for the model and one for each of its layers; nothing for a dense model.
pub fn explain(folder: &Folder) -> Vec<String> {
    let Some(moefy) = folder.moefy() else { return Vec::new() };
    let d_ff = folder.config().intermediate_size;
    let mut lines = vec![of_model(moefy, d_ff)];
    lines.extend(moefy.layers.iter().map(|layer| of_layer(layer, &moefy.method, d_ff)));
    lines
}

fn of_model(moefy: &MoefyConfig, d_ff: usize) -> String {
    let method = &moefy.method;
    let width = (d_ff - method.shared) / method.num_experts;
    let together = match method.partition.as_str() {
        "kmeans" => {
            "neurons whose input weights point the same way, so that a token that needs one needs the others"
        }
        "joint" => {
            "neurons whose input weights point the same way and that fire together on the text"
        }
        "graph" => "neurons that fire together on the text, where cutting their graph costs least",
        _ => "drawn at random: a baseline",
    };
    let router = match method.router.as_str() {
        "d2dmoe" => "learned how long every expert's output is",
        "moefication" => "learned how much every expert's neurons fire",
        _ => "compares a token with every expert's mean input weights, and learned nothing",
    };
    let mut text = format!(
        "Every FFN became {} experts of {width} of its {d_ff} neurons: {together}. The router {router}",
        method.num_experts
    );
    if let Some(calibration) = &method.calibration {
        text += &format!(", on {} tokens of {}", calibration.num_tokens, calibration.file_name);
    }
    text += ".";
    if method.shared > 0 {
        text += &format!(" {} neurons run for every token.", method.shared);
    }
    text
}

fn of_layer(layer: &LayerConfig, method: &Method, d_ff: usize) -> String {
    let rule = match layer.selection.rule {
        SelectionRule::TopK { k } => format!("every token runs its best {k}"),
        SelectionRule::DynamicK { rel_threshold } => {
            format!("a token runs every expert that scores at least {rel_threshold:.3} of its best")
        }
        SelectionRule::CumulativeShare { share } => {
            format!(
                "a token runs its best experts until they hold {} of its score",
                percent(share.into())
            )
        }
    };
    let mut text = format!("Layer {}: {rule}", layer.layer);
    match (method.rel_threshold_scope.as_str(), method.density_target) {
        ("layer", Some(density)) => {
            text += &format!(", which runs {} of the neurons, as in every layer", percent(density));
        }
        ("global", Some(density)) => {
            text += &format!(
                ", as in every layer; layers whose experts score alike run more, and all together {}",
                percent(density)
            );
        }
        _ => {}
    }
    text += ".";
    if let Some(statistics) = &layer.statistics {
        let most = statistics.hotness.iter().copied().fold(0.0, f64::max);
        let least = statistics.hotness.iter().copied().fold(1.0, f64::min);
        text += &format!(
            " On the text that is {:.1} experts on average and {} at most, {} of the neurons; the \
             expert in most demand runs for {} of the tokens, the one in least for {}.",
            statistics.mean_k,
            statistics.max_k,
            percent(statistics.density),
            percent(most),
            percent(least)
        );
    }
    if let Some(training) = &layer.router_training {
        text += &format!(
            " On tokens that the router did not learn from it finds {} of the experts that matter \
             most; its best epoch was {} of {}.",
            percent(training.held_out_recall),
            training.best_epoch,
            training.epochs
        );
    }
    match &layer.compensation {
        None => {}
        Some(CompensationConfig::Mean) => text += " Skipped neurons count with their mean.",
        Some(CompensationConfig::Linear { rank }) => {
            let share = *rank as f64 / d_ff as f64;
            text += &format!(
                " A linear map of rank {rank}, which costs as much as {} of the neurons, stands in for \
                 what is skipped here and was lost before.",
                percent(share)
            );
        }
    }
    if layer.refined {
        // A router that learned along has no training of its own any more.
        let is_network = matches!(layer.router, RouterConfig::Mlp { .. });
        text += match is_network && layer.router_training.is_none() {
            true => " Neurons and router were trained further, so that this selection loses least.",
            false => " The neurons were trained further.",
        };
    }
    text
}
