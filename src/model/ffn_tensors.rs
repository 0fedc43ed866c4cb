//! One MoEfied FFN as tensors of a file, and back.

use super::format::{CompensationConfig, LayerConfig, RouterConfig};
use super::{Config, Folder};
use crate::error::{Error, Result};
use crate::ffn::{Compensation, DenseFfn, FfnTensors, MoeFfn, Partition, Router};
use crate::tensor::Tensor;

/// The tensors of the neurons, in expert order: W1, b1, W2ᵀ, b2.
pub(super) const NEURONS: [&str; 4] = ["w_in", "b_in", "w_out", "b_out"];
/// The expert of every neuron, i32.
pub(super) const LABELS: &str = "labels";

/// Name (after `moefy.`) and shape of every tensor of a MoEfied FFN.
pub(super) fn parts(layer: &LayerConfig, config: &Config) -> Vec<(&'static str, Vec<usize>)> {
    let (d, f) = (config.hidden_size, config.intermediate_size);
    let e = layer.num_experts;
    let [w_in, b_in, w_out, b_out] = NEURONS;
    let mut parts = vec![
        (w_in, vec![f, d]),
        (b_in, vec![f]),
        (w_out, vec![f, d]),
        (b_out, vec![d]),
        (LABELS, vec![f]),
    ];
    match layer.router {
        RouterConfig::Linear => parts.push(("router.weight", vec![e, d])),
        RouterConfig::Mlp { hidden, .. } => {
            parts.extend([("router.w1", vec![hidden, d]), ("router.w2", vec![e, hidden])]);
        }
        RouterConfig::Centroid => parts.push(("router.centroids", vec![e, d])),
    }
    match layer.compensation {
        None => {}
        Some(CompensationConfig::Mean) => parts.push(("compensation.mean", vec![f])),
        Some(CompensationConfig::Linear { rank }) => parts.extend([
            ("compensation.u", vec![rank, d]),
            ("compensation.v", vec![rank, d]),
            ("compensation.c", vec![d]),
        ]),
    }
    parts
}

/// The tensors of a router, by the names of [`parts`].
pub(super) fn of_router(router: &Router) -> Vec<(&'static str, &Tensor)> {
    match router {
        Router::Linear { w } => vec![("router.weight", w)],
        Router::Mlp { w1, w2, .. } => vec![("router.w1", w1), ("router.w2", w2)],
        Router::Centroid { centroids } => vec![("router.centroids", centroids)],
    }
}

/// The tensors of a compensation, by the names of [`parts`].
pub(super) fn of_compensation(compensation: &Compensation) -> Vec<(&'static str, &Tensor)> {
    match compensation {
        Compensation::Mean { mean } => vec![("compensation.mean", mean)],
        Compensation::Linear { u, v, c } => {
            vec![("compensation.u", u), ("compensation.v", v), ("compensation.c", c)]
        }
    }
}

/// Reads the dense FFN of a layer.
pub(super) fn read_dense(folder: &Folder, layer: usize) -> Result<DenseFfn> {
    let (d, f) = (folder.config().hidden_size, folder.config().intermediate_size);
    let [input, output] = [folder.names().ffn_input(layer), folder.names().ffn_output(layer)];
    let tensors = FfnTensors {
        input_bias: Some(folder.vector(&input.bias, f)?),
        output_bias: Some(folder.vector(&output.bias, d)?),
        ..FfnTensors::plain(
            folder.matrix(&input.weight, [f, d])?,
            folder.matrix(&output.weight, [d, f])?,
        )
    };
    DenseFfn::new(folder.config().activation, tensors).map_err(|e| {
        in_file(folder, e, |argument| match argument {
            "input bias" => input.bias.clone(),
            "output weight" => output.weight.clone(),
            "output bias" => output.bias.clone(),
            _ => input.weight.clone(),
        })
    })
}

/// Reads the MoEfied FFN of a layer.
pub(super) fn read_moe(folder: &Folder, record: &LayerConfig) -> Result<MoeFfn> {
    let (d, f) = (folder.config().hidden_size, folder.config().intermediate_size);
    let name = |part: &str| folder.names().moefy(record.layer, part);
    let matrix = |part, shape| Ok(folder.matrix(&name(part), shape)?.to_owned());
    let vector = |part, len| Ok(folder.vector(&name(part), len)?.to_owned());

    let [w_in, b_in, w_out, b_out] = NEURONS;
    let neurons = DenseFfn::from_neuron_major(
        folder.config().activation,
        false,
        matrix(w_in, [f, d])?,
        Some(vector(b_in, f)?),
        matrix(w_out, [f, d])?,
        Some(vector(b_out, d)?),
    )
    .map_err(|e| {
        in_file(folder, e, |argument| match argument {
            "input bias" => name(b_in),
            "output weight" => name(w_out),
            "output bias" => name(b_out),
            _ => name(w_in),
        })
    })?;
    let partition = Partition::new(record.num_experts, folder.labels(&name(LABELS), f)?)
        .map_err(|e| in_file(folder, e, |_| name(LABELS)))?;
    if partition.shared() != record.shared {
        let expected = format!("{} shared neurons, as config.json says", record.shared);
        return Err(folder.tensor_error(&name(LABELS), expected, partition.shared()));
    }
    let e = record.num_experts;
    let router = match record.router {
        RouterConfig::Linear => Router::Linear { w: matrix("router.weight", [e, d])? },
        RouterConfig::Mlp { activation, hidden } => Router::Mlp {
            kind: activation,
            w1: matrix("router.w1", [hidden, d])?,
            w2: matrix("router.w2", [e, hidden])?,
        },
        RouterConfig::Centroid => {
            Router::Centroid { centroids: matrix("router.centroids", [e, d])? }
        }
    };
    let moe = MoeFfn::from_expert_order(neurons, partition, router, record.selection)?;
    let moe = moe.with_gate(record.gate);
    let moe = match &record.statistics {
        Some(statistics) => moe.with_calibrated_density(statistics.density),
        None => moe,
    };
    match record.compensation {
        None => Ok(moe),
        Some(CompensationConfig::Mean) => {
            moe.with_compensation(Compensation::Mean { mean: vector("compensation.mean", f)? })
        }
        Some(CompensationConfig::Linear { rank }) => moe.with_compensation(Compensation::Linear {
            u: matrix("compensation.u", [rank, d])?,
            v: matrix("compensation.v", [rank, d])?,
            c: vector("compensation.c", d)?,
        }),
    }
}

/// Says in which file and tensor an argument was wrong.
fn in_file(folder: &Folder, error: Error, tensor: impl Fn(&str) -> String) -> Error {
    match error {
        Error::Argument { argument, expected, got, .. } => {
            folder.tensor_error(&tensor(&argument), expected, got)
        }
        other => other,
    }
}
