//! Which neurons form an expert.

mod activations;
mod assignment;
mod graph;
mod kmeans;
mod random;

use rand::Rng;

use crate::error::{Error, Result};
use crate::ffn::{DenseFfn, Partition};

pub use kmeans::{Clusters, balanced_kmeans};

/// How neurons are grouped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PartitionMethod {
    /// Balanced k-means on the unit-length input rows of the neurons, gate rows for a GLU
    /// ("parameter clustering": MoEfication, arXiv 2110.01786, section 3.2).
    #[default]
    Kmeans,
    /// Balanced k-means on two unit vectors per neuron, one after another: its input row, and its
    /// activations over a sample of tokens, centred and randomly projected. Neurons that look alike
    /// *and* fire together form an expert.
    Joint,
    /// The co-activation graph, cut by METIS and balanced exactly (MoEfication, arXiv 2110.01786,
    /// section 3.2). Needs the crate's feature `metis`.
    Graph,
    /// A random split into equal parts.
    Random,
}

impl PartitionMethod {
    /// Every method.
    pub const ALL: [Self; 4] = [Self::Kmeans, Self::Joint, Self::Graph, Self::Random];

    /// Its name in options and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kmeans => "kmeans",
            Self::Joint => "joint",
            Self::Graph => "graph",
            Self::Random => "random",
        }
    }
}

/// Splits the neurons of `ffn`, except the `shared` ones, into `num_experts` experts of equal width.
/// `inputs` \[T, d_model\] are inputs of this FFN; only methods that look at activations need them. The
/// result depends on the weights, the arguments and the state of `rng` alone.
///
/// # Errors
/// When the method needs inputs and there are none, or such large ones that sums over activations overflow, or a feature that is
/// not built in, when `shared` names a neuron that does not exist or names one twice, or when `num_experts` is 0 or does not
/// divide the number of the other neurons.
pub fn partition(
    ffn: &DenseFfn,
    method: PartitionMethod,
    num_experts: usize,
    shared: &[u32],
    inputs: &[f32],
    rng: &mut impl Rng,
) -> Result<Partition> {
    let d_ff = ffn.d_ff();
    Partition::width_of_experts(d_ff, num_experts, shared.len())?;
    // A shared neuron carries the label `num_experts`.
    let mut labels = vec![0; d_ff];
    for &neuron in shared {
        match labels.get_mut(neuron as usize) {
            Some(label) if *label == 0 => *label = num_experts as u32,
            _ => {
                let expected = format!("different neurons below d_ff = {d_ff}");
                return Err(Error::argument("partition", "shared", expected, neuron));
            }
        }
    }
    let routed: Vec<u32> = (0..d_ff as u32).filter(|&n| labels[n as usize] == 0).collect();
    let of_routed = match method {
        PartitionMethod::Random => random::random(routed.len(), num_experts, rng),
        PartitionMethod::Kmeans => {
            let rows = unit_input_rows(ffn, &routed);
            balanced_kmeans(&rows, ffn.d_model(), num_experts, rng)?.labels
        }
        PartitionMethod::Joint => {
            check_sample(method, inputs)?;
            let (d_model, width) = (ffn.d_model(), activations::PROJECTED);
            let weights = unit_input_rows(ffn, &routed);
            let mut projected = activations::projected(ffn, inputs, &routed, rng);
            check_sums(&projected)?;
            projected.chunks_exact_mut(width).for_each(normalise);
            let pairs = weights.chunks_exact(d_model).zip(projected.chunks_exact(width));
            let rows: Vec<f32> = pairs.flat_map(|(w, a)| [w, a].concat()).collect();
            balanced_kmeans(&rows, d_model + width, num_experts, rng)?.labels
        }
        PartitionMethod::Graph => {
            check_sample(method, inputs)?;
            let weights = activations::coactivation(ffn, inputs, &routed);
            check_sums(&weights)?;
            graph::cut(&weights, num_experts, rng)?
        }
    };
    for (neuron, label) in routed.into_iter().zip(of_routed) {
        labels[neuron as usize] = label;
    }
    Partition::new(num_experts, labels)
}

fn check_sample(method: PartitionMethod, inputs: &[f32]) -> Result<()> {
    if !inputs.is_empty() {
        return Ok(());
    }
    let expected = format!("given for the method `{}`", method.name());
    Err(Error::argument("partition", "inputs", expected, "none"))
}

/// Sums over a sample's activations.
fn check_sums(sums: &[f32]) -> Result<()> {
    let Some(sum) = sums.iter().find(|sum| !sum.is_finite()) else { return Ok(()) };
    let expected = "such that sums over the activations are finite";
    Err(Error::argument("partition", "calibration inputs", expected, sum))
}

/// \[neurons, d_model\]; those of the gate for a GLU, whose rows come first in w_in.
fn unit_input_rows(ffn: &DenseFfn, neurons: &[u32]) -> Vec<f32> {
    let mut rows = ffn.w_in().gather_rows(neurons).to_f32().into_owned();
    rows.chunks_exact_mut(ffn.d_model()).for_each(normalise);
    rows
}

/// Scales a vector to length 1; zero stays zero.
fn normalise(row: &mut [f32]) {
    let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
}
