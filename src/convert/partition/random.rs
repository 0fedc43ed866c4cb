//! Random partition.

use rand::Rng;
use rand::seq::SliceRandom;

/// Equally many labels of each of `num_experts` experts in random order, for `num_neurons` neurons.
pub(super) fn random(num_neurons: usize, num_experts: usize, rng: &mut impl Rng) -> Vec<u32> {
    let mut labels: Vec<u32> = (0..num_neurons).map(|i| (i % num_experts) as u32).collect();
    labels.shuffle(rng);
    labels
}
