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

fn methods() -> impl Iterator<Item = PartitionMethod> {
    let built =
        |method: &PartitionMethod| cfg!(feature = "metis") || *method != PartitionMethod::Graph;
    PartitionMethod::ALL.into_iter().filter(built)
}

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
    let inputs = Random::new(seed).values(64 * ffn.d_model());
    partition(ffn, method, num_experts, shared, &inputs, &mut ChaCha8Rng::seed_from_u64(seed))
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
        for method in methods() {
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

/// 6 groups of 4 neurons that fire together, with input rows that have nothing in common: half of a
/// group looks at one coordinate, half at another, and the two coordinates are always equal.
#[test]
fn neurons_that_fire_together_form_an_expert() {
    let (groups, per_group) = (6, 4);
    let (d_ff, d_model) = (groups * per_group, 2 * groups);
    let mut random = Random::new(4);
    let mut w_in = vec![0.0; d_ff * d_model];
    for neuron in 0..d_ff {
        let (group, half) = (neuron % groups, neuron / groups % 2);
        w_in[neuron * d_model + 2 * group + half] = 1.0 + 0.1 * random.values(1)[0];
    }
    let inputs: Vec<f32> =
        (0..256).flat_map(|_| random.values(groups)).flat_map(|x| [x, x]).collect();
    let w_out = random.values(d_ff * d_model);
    let matrix = |data| TensorRef::matrix(data, [d_ff, d_model]).unwrap();
    let tensors = FfnTensors::plain(matrix(&w_in), matrix(&w_out).transposed());
    let ffn = DenseFfn::new(Activation::Relu, tensors).unwrap();
    // Pairs of a group that share an expert.
    let pairs = |method| {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let split = partition(&ffn, method, groups, &[], &inputs, &mut rng).unwrap();
        let label = |neuron: usize| split.labels()[neuron];
        let all = (0..d_ff).flat_map(|n| (0..n).map(move |m| (n, m)));
        all.filter(|&(n, m)| n % groups == m % groups && label(n) == label(m)).count()
    };
    let by_weights = pairs(PartitionMethod::Kmeans);
    assert!(pairs(PartitionMethod::Joint) > by_weights);
    if cfg!(feature = "metis") {
        assert_eq!(pairs(PartitionMethod::Graph), groups * per_group * (per_group - 1) / 2);
    }
}

#[test]
fn a_method_that_looks_at_activations_needs_inputs() {
    let ffn = dense(4, 12, false, DType::F32, 0);
    for method in [PartitionMethod::Joint, PartitionMethod::Graph] {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let error = partition(&ffn, method, 3, &[], &[], &mut rng).unwrap_err();
        let expected = format!("inputs must be given for the method `{}`, got none", method.name());
        assert!(error.to_string().contains(&expected), "{error}");
    }
}

#[test]
fn bad_arguments_are_refused() {
    let ffn = dense(4, 12, false, DType::F32, 0);
    for (num_experts, shared, expected) in [
        (0, vec![], "num_experts must be a divisor of the 12 routed neurons, such as 1, got 0"),
        (
            5,
            vec![],
            "num_experts must be a divisor of the 12 routed neurons, such as 4 or 6, got 5",
        ),
        (3, vec![0], "a divisor of the 11 routed neurons, such as 1 or 11, got 3"),
        (usize::MAX, vec![], "such as 12, got"),
        (2, vec![3, 3], "shared must be different neurons below d_ff = 12, got 3"),
        (2, vec![0, 12], "shared must be different neurons below d_ff = 12, got 12"),
        (1, (0..12).collect(), "shared must be less than d_ff = 12, got 12"),
    ] {
        let error = split(&ffn, PartitionMethod::Kmeans, num_experts, &shared, 0).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_number_of_experts_is_refused_in_time_however_many_neurons() {
    // 2^62 - 57 is prime.
    let (routed, shared) = ((1 << 62) - 57, 57);
    for (num_experts, expected) in [
        (6, format!("a divisor of the {routed} routed neurons, such as 1, got 6")),
        (routed - 2, format!("a divisor of the {routed} routed neurons, such as {routed}, got")),
        (1 << 61, format!("a divisor of the {routed} routed neurons, got")),
    ] {
        let error = Partition::width_of_experts(1 << 62, num_experts, shared).unwrap_err();
        assert!(error.to_string().contains(&expected), "{error}");
    }
    let error = Partition::width_of_experts(usize::MAX, 6, 0).unwrap_err();
    assert!(error.to_string().contains("such as 5 or 15, got 6"), "{error}");
}
