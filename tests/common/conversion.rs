//! Random conversions of the tiny BERT.

use moefy::DType;
use moefy::Tensor;
use moefy::ffn::{
    Compensation, Gate, MlpKind, Partition, Router, RoutingStatistics, Selection, SelectionRule,
    UnionShares,
};
use moefy::model::format::{Calibration, Method, RouterTraining};
use moefy::model::{Conversion, ConvertedLayer};
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::{HIDDEN, INTERMEDIATE, LAYERS};

/// A conversion of some layers, at least one, with everything drawn anew.
pub fn random(rng: &mut ChaCha8Rng) -> Conversion {
    let some: Vec<usize> = (0..LAYERS).filter(|_| rng.random()).collect();
    let layers = if some.is_empty() { vec![LAYERS - 1] } else { some };
    let layers: Vec<_> = layers.into_iter().map(|layer| random_layer(rng, layer)).collect();
    let partition = &layers[0].partition;
    let method = Method {
        partition: "random".into(),
        router: "d2dmoe".into(),
        num_experts: partition.num_experts(),
        shared: partition.shared(),
        router_hidden: rng.random::<bool>().then_some(7),
        seed: rng.random(),
        rel_threshold_scope: "layer".into(),
        density_target: rng.random::<bool>().then(|| rng.random()),
        compensation: rng.random::<bool>().then(|| "linear".into()),
        calibration: rng
            .random::<bool>()
            .then(|| Calibration { file_name: "text.txt".into(), num_tokens: 8192 }),
    };
    Conversion { method, layers }
}

pub fn random_layer(rng: &mut ChaCha8Rng, layer: usize) -> ConvertedLayer {
    let sizes = [(1, 0), (48, 0), (6, 0), (5, 3), (3, 24), (1, 47)];
    let (num_experts, shared) = sizes[rng.random_range(0..sizes.len())];
    let dtype = [DType::F32, DType::F16, DType::BF16][rng.random_range(0..3)];
    let mut tensor = |shape: [usize; 2]| {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.random()).collect();
        Tensor::matrix(values, shape).unwrap().to_dtype(dtype)
    };
    let (linear, w1, w2) =
        (tensor([num_experts, HIDDEN]), tensor([7, HIDDEN]), tensor([num_experts, 7]));
    let mean = Compensation::Mean { mean: tensor([1, INTERMEDIATE]) };
    let low_rank = Compensation::Linear {
        u: tensor([3, HIDDEN]),
        v: tensor([3, HIDDEN]),
        c: tensor([1, HIDDEN]),
    };
    let router = match rng.random_range(0..4) {
        0 => Router::Linear { w: linear },
        1 => Router::Centroid { centroids: linear },
        2 => Router::Mlp { kind: MlpKind::D2dMoe, w1, w2 },
        _ => Router::Mlp { kind: MlpKind::Moefication, w1, w2 },
    };
    let rule = match rng.random_range(0..3) {
        0 => SelectionRule::TopK { k: rng.random_range(1..=num_experts) },
        1 => SelectionRule::DynamicK { rel_threshold: rng.random() },
        _ => SelectionRule::CumulativeShare { share: rng.random() },
    };
    let gates = [Gate::One, Gate::Score, Gate::Softmax, Gate::Renormalised];
    ConvertedLayer {
        layer,
        partition: random_partition(rng, INTERMEDIATE, num_experts, shared),
        router,
        selection: Selection { rule, max_experts: rng.random::<bool>().then_some(num_experts) },
        gate: gates[rng.random_range(0..4)],
        compensation: [None, Some(mean), Some(low_rank)][rng.random_range(0..3)].clone(),
        neurons: None,
        router_training: rng.random::<bool>().then(|| RouterTraining {
            epochs: 9,
            best_epoch: rng.random_range(0..9),
            train_loss: rng.random(),
            held_out_loss: rng.random(),
            held_out_recall: rng.random(),
        }),
        statistics: rng.random::<bool>().then(|| random_statistics(rng, num_experts)),
    }
}

pub fn random_partition(
    rng: &mut ChaCha8Rng,
    d_ff: usize,
    num_experts: usize,
    shared: usize,
) -> Partition {
    let width = Partition::width_of_experts(d_ff, num_experts, shared).unwrap();
    let mut labels: Vec<u32> = (0..d_ff).map(|n| (n / width).min(num_experts) as u32).collect();
    labels.shuffle(rng);
    Partition::new(num_experts, labels).unwrap()
}

pub fn random_statistics(rng: &mut ChaCha8Rng, num_experts: usize) -> RoutingStatistics {
    let mut union = || UnionShares {
        u8: rng.random(),
        u16: rng.random(),
        u64: rng.random(),
        u128: rng.random(),
    };
    let (union_text_order, union_rarest_first) = (union(), union());
    RoutingStatistics {
        num_tokens: 8192,
        density: rng.random(),
        mean_k: rng.random(),
        max_k: num_experts,
        hotness: (0..num_experts).map(|_| rng.random()).collect(),
        union_text_order,
        union_rarest_first,
    }
}
