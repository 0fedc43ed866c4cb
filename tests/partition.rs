//! Partitions of neurons into experts.

mod support;

use moefy::DType;
use moefy::convert::partition::{PartitionMethod, partition};
use moefy::ffn::{Activation, DenseFfn, FfnTensors, Partition};
use moefy::tensor::TensorRef;
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use support::{Random, Shape};

const METHODS: [PartitionMethod; 2] = [PartitionMethod::Random, PartitionMethod::Kmeans];

fn dense(d_model: usize, d_ff: usize, glu: bool, dtype: DType, seed: u64) -> DenseFfn {
    Random::new(seed).dense(&Shape {
        d_model,
        num_experts: d_ff,
        expert_width: 1,
        shared: 0,
        activation: Activation::Gelu,
        glu,
        biases: true,
        dtype,
    })
}

fn split(
    ffn: &DenseFfn,
    method: PartitionMethod,
    num_experts: usize,
    shared: &[u32],
    seed: u64,
) -> moefy::Result<Partition> {
    partition(ffn, method, num_experts, shared, &mut ChaCha8Rng::seed_from_u64(seed))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn experts_are_equal_and_shared_neurons_are_those_named(
        num_experts in 1usize..20,
        width in 1usize..12,
        num_shared in 0usize..9,
        d_model in 1usize..20,
        glu: bool,
        seed: u64,
    ) {
        let d_ff = num_experts * width + num_shared;
        let ffn = dense(d_model, d_ff, glu, DType::BF16, seed);
        // Any distinct neurons: multiples of an odd number modulo d_ff may repeat, these do not.
        let shared: Vec<u32> = (0..num_shared as u32).map(|i| d_ff as u32 - 1 - i).rev().collect();
        for method in METHODS {
            // `Partition::new` refuses experts that differ in width.
            let split_once = split(&ffn, method, num_experts, &shared, seed).unwrap();
            prop_assert_eq!(split_once.expert_width(), width);
            for (neuron, &label) in split_once.labels().iter().enumerate() {
                prop_assert_eq!(label == num_experts as u32, shared.contains(&(neuron as u32)));
            }
            prop_assert_eq!(&split_once, &split(&ffn, method, num_experts, &shared, seed).unwrap());
        }
    }
}

#[test]
fn random_depends_on_the_seed_and_is_not_in_blocks() {
    let ffn = dense(3, 96, false, DType::F32, 0);
    let labels = |seed| split(&ffn, PartitionMethod::Random, 8, &[], seed).unwrap();
    assert_ne!(labels(0), labels(1));
    let neighbours = labels(0).labels().windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert!(neighbours < 30, "{neighbours} of 95 neighbours share an expert");
}

/// 5 groups of 7 neurons whose input rows point the same way, at any length.
#[test]
fn kmeans_looks_at_directions_of_gate_rows_only() {
    let (groups, per_group, d_model) = (5, 7, 11);
    let d_ff = groups * per_group;
    let mut random = Random::new(3);
    let directions = random.values(groups * d_model);
    let mut gate = Vec::new();
    for neuron in 0..d_ff {
        let length = 10f32.powi(neuron as i32 % 5 - 2);
        let direction = &directions[neuron % groups * d_model..][..d_model];
        gate.extend(
            direction
                .iter()
                .zip(random.values(d_model))
                .map(|(x, noise)| length * (x + 0.01 * noise)),
        );
    }
    let (up, down) = (random.values(d_ff * d_model), random.values(d_ff * d_model));
    let matrix = |data| TensorRef::matrix(data, [d_ff, d_model]).unwrap();
    let tensors = FfnTensors::glu(matrix(&gate), matrix(&up), matrix(&down).transposed());
    let ffn = DenseFfn::new(Activation::Silu, tensors).unwrap();
    let split = split(&ffn, PartitionMethod::Kmeans, groups, &[], 0).unwrap();
    for (neuron, &label) in split.labels().iter().enumerate() {
        assert_eq!(label, split.labels()[neuron % groups], "neuron {neuron}");
    }
}

#[test]
fn bad_arguments_are_refused() {
    let ffn = dense(4, 12, false, DType::F32, 0);
    for (num_experts, shared, expected) in [
        (0, vec![], "num_experts must be a divisor of the 12 routed neurons, got 0"),
        (5, vec![], "num_experts must be a divisor of the 12 routed neurons, got 5"),
        (3, vec![0], "num_experts must be a divisor of the 11 routed neurons, got 3"),
        (2, vec![3, 3], "shared must be different neurons below d_ff = 12, got 3"),
        (2, vec![0, 12], "shared must be different neurons below d_ff = 12, got 12"),
        (1, (0..12).collect(), "shared must be less than d_ff = 12, got 12"),
    ] {
        let error = split(&ffn, PartitionMethod::Kmeans, num_experts, &shared, 0).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}
