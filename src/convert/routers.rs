//! The routers of a partition: what each method trains on, or makes without training.

use rand::Rng;

use super::expert_norms::expert_norms;
use super::hidden::{for_each_hidden, mean_hidden};
use super::router_training::{TrainingData, train_d2dmoe, train_moefication};
use super::{CompensationMethod, ConvertOptions, RouterMethod, calibrate};
use crate::error::Result;
use crate::ffn::{DenseFfn, Partition, Router};
use crate::model::format::RouterTraining;
use crate::tensor::Tensor;

/// A router for `neurons`, which are in the partition's expert order, and how its training went.
pub(super) fn make_router(
    neurons: &DenseFfn,
    partition: &Partition,
    inputs: &[f32],
    options: &ConvertOptions,
    rng: &mut impl Rng,
    each_epoch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<(Router, Option<RouterTraining>)> {
    let num_experts = partition.num_experts();
    let k = calibrate::top_k(num_experts, partition.mean_k(options.density));
    match options.router {
        RouterMethod::D2dMoe { hidden, epochs } => {
            // A compensation gives every skipped expert's mean, so that only what goes beyond it is
            // lost.
            let mean = (options.compensation != CompensationMethod::None)
                .then(|| mean_hidden(neurons, inputs));
            let targets = expert_norms(neurons, partition, inputs, mean.as_deref());
            let data = TrainingData { inputs, targets: &targets, num_experts, k };
            let (router, training) = train_d2dmoe(&data, hidden, epochs, rng, each_epoch)?;
            Ok((router, Some(training)))
        }
        RouterMethod::Moefication { epochs } => {
            let targets = activation_sums(neurons, partition, inputs);
            let data = TrainingData { inputs, targets: &targets, num_experts, k };
            let centroids = centroids(neurons, partition);
            let (router, training) = train_moefication(&data, centroids, epochs, rng, each_epoch)?;
            Ok((router, Some(training)))
        }
        RouterMethod::Centroid => {
            let shape = [num_experts, neurons.d_model()];
            let centroids = Tensor::matrix(centroids(neurons, partition), shape)?;
            Ok((Router::Centroid { centroids }, None))
        }
    }
}

/// The mean of every expert's unit-length input rows (gate rows for a GLU), \[E, d_model\].
fn centroids(neurons: &DenseFfn, partition: &Partition) -> Vec<f32> {
    let (d, width) = (neurons.d_model(), partition.expert_width());
    let w_in = neurons.w_in().to_f32();
    let mut centroids = vec![0.0f32; partition.num_experts() * d];
    let experts = centroids.chunks_exact_mut(d).zip(w_in.chunks_exact(width * d));
    for (centroid, rows) in experts {
        for row in rows.chunks_exact(d) {
            let norm = row.iter().map(|w| w * w).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            centroid.iter_mut().zip(row).for_each(|(c, w)| *c += w / norm / width as f32);
        }
    }
    centroids
}

/// Σ of the positive parts of every expert's activations, \[T, E\]: for a ReLU the sum of activations
/// that MoEfication uses, and for others what it amounts to.
fn activation_sums(neurons: &DenseFfn, partition: &Partition, inputs: &[f32]) -> Vec<f32> {
    let (width, num_experts) = (partition.expert_width(), partition.num_experts());
    let mut sums = Vec::with_capacity(inputs.len() / neurons.d_model() * num_experts);
    for_each_hidden(neurons, inputs, |hidden| {
        for h in hidden.chunks_exact(neurons.d_ff()) {
            let experts = h.chunks_exact(width).take(num_experts);
            sums.extend(experts.map(|h| h.iter().map(|h| h.max(0.0)).sum::<f32>()));
        }
    });
    sums
}
