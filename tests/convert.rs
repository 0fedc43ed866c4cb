//! Conversion of one FFN.

mod support;

use moefy::convert::partition::PartitionMethod;
use moefy::convert::{ConvertOptions, MIN_TOKENS, RouterMethod, convert_ffn};
use moefy::ffn::{Activation, DenseFfn, SelectionRule};
use moefy::{DType, cpu, reference};
use support::{DTYPES, Random, Shape, relative_error, widened};

fn dense(random: &mut Random, d_model: usize, d_ff: usize, glu: bool, dtype: DType) -> DenseFfn {
    random.dense(&Shape {
        d_model,
        num_experts: d_ff,
        expert_width: 1,
        shared: 0,
        activation: if glu { Activation::Silu } else { Activation::Gelu },
        glu,
        biases: true,
        dtype,
    })
}

fn options(num_experts: usize, shared: usize, density: f64) -> ConvertOptions {
    ConvertOptions {
        num_experts,
        shared,
        density,
        router: RouterMethod::D2dMoe { hidden: 33, epochs: 1 },
        ..ConvertOptions::default()
    }
}

#[test]
fn a_converted_layer_meets_its_density_and_holds_the_dense_one() {
    let mut random = Random::new(0);
    for dtype in DTYPES {
        for (glu, num_experts, width, shared) in
            [(false, 7, 5, 0), (true, 4, 6, 3), (false, 1, 5, 1), (true, 40, 1, 0)]
        {
            let (d_model, d_ff) = (19, num_experts * width + shared);
            let ffn = dense(&mut random, d_model, d_ff, glu, dtype);
            let inputs = random.values(MIN_TOKENS * d_model);
            let least = (width + shared) as f64 / d_ff as f64;
            for density in [least, least + 0.4 * (1.0 - least), 1.0] {
                let options = options(num_experts, shared, density);
                let (moe, report) = convert_ffn(&ffn, &inputs, &options).unwrap();
                assert_eq!(moe.to_dense(), ffn);
                assert_eq!(moe.shared(), shared);
                let statistics = report.statistics;
                assert_eq!(statistics.num_tokens, MIN_TOKENS);
                assert!((statistics.density - density).abs() < 2e-3, "{density} {statistics:?}");

                // What the report says is what running it does.
                let mut y = vec![f32::NAN; inputs.len()];
                let mut workspace = cpu::Workspace::default();
                let routed = cpu::MoeFfn::new(&moe).run(&inputs, &mut y, &mut workspace).unwrap();
                let mean_k = routed.mask.num_pairs() as f64 / MIN_TOKENS as f64;
                assert_eq!(moe.density(mean_k), statistics.density);
                if density == 1.0 {
                    let expected = reference::dense_ffn(&ffn, &widened(&inputs));
                    assert!(relative_error(&y, &expected) < 1e-5);
                }
            }
        }
    }
}

/// The shared neurons are those that add most to the output.
#[test]
fn loud_neurons_are_shared() {
    let mut random = Random::new(1);
    let ffn = dense(&mut random, 8, 22, false, DType::F32);
    let mut w_out = ffn.w_out().to_f32().into_owned();
    for neuron in [3, 20] {
        w_out[neuron * 8..][..8].iter_mut().for_each(|w| *w *= 30.0);
    }
    let loud = DenseFfn::from_neuron_major(
        ffn.activation(),
        false,
        ffn.w_in().clone(),
        ffn.b_in().cloned(),
        moefy::Tensor::matrix(w_out, [22, 8]).unwrap(),
        ffn.b_out().cloned(),
    )
    .unwrap();
    let inputs = random.values(MIN_TOKENS * 8);
    let (moe, _) = convert_ffn(&loud, &inputs, &options(5, 2, 0.5)).unwrap();
    let labels = moe.partition().labels();
    let shared: Vec<usize> = (0..22).filter(|&neuron| labels[neuron] == 5).collect();
    assert_eq!(shared, [3, 20]);
}

#[test]
fn inputs_that_are_all_zero_convert() {
    let ffn = dense(&mut Random::new(2), 4, 12, false, DType::F32);
    let (moe, _) = convert_ffn(&ffn, &[0.0; MIN_TOKENS * 4], &options(3, 0, 0.5)).unwrap();
    assert!(matches!(moe.selection().rule, SelectionRule::DynamicK { .. }));
}

#[test]
fn what_cannot_work_is_refused_in_one_sentence() {
    let mut random = Random::new(3);
    let ffn = dense(&mut random, 4, 12, false, DType::F32);
    let inputs = random.values(MIN_TOKENS * 4);
    let mut with_nan = inputs.clone();
    with_nan[4 * 7 + 1] = f32::NAN;
    let good = options(3, 0, 0.5);
    let router = |hidden, epochs| RouterMethod::D2dMoe { hidden, epochs };
    let refusals = [
        (&inputs[..], ConvertOptions { num_experts: 0, ..good.clone() }, "num_experts must be"),
        (&inputs, ConvertOptions { num_experts: 5, ..good.clone() }, "num_experts must be"),
        (&inputs, ConvertOptions { shared: 12, ..good.clone() }, "shared must be less than"),
        (&inputs, ConvertOptions { ranks: vec![4], ..good.clone() }, "ranks must be none where"),
        (
            &inputs,
            ConvertOptions { density: 0.0, ..good.clone() },
            "density must be between 0.3333",
        ),
        (&inputs, ConvertOptions { density: 0.3, ..good.clone() }, "(one expert per token) and 1"),
        (&inputs, ConvertOptions { density: 1.1, ..good.clone() }, "and 1, got 1.1"),
        (&inputs, ConvertOptions { density: f64::NAN, ..good.clone() }, "and 1, got NaN"),
        (
            &inputs,
            ConvertOptions { router: router(0, 1), ..good.clone() },
            "hidden units of the router must be between 1 and 65536, got 0",
        ),
        (
            &inputs,
            ConvertOptions { router: router(1, 0), ..good.clone() },
            "epochs must be at least",
        ),
        (&[], good.clone(), "must be at least 320 tokens, got 0"),
        (&inputs[..319 * 4], good.clone(), "must be at least 320 tokens, got 319"),
        (&inputs[1..], good.clone(), "must be whole tokens of 4 values, got 1279 values"),
        (&with_nan, good.clone(), "must be finite everywhere, got NaN in token 7"),
    ];
    for (inputs, options, expected) in refusals {
        let error = convert_ffn(&ffn, inputs, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn huge_inputs_are_refused_or_survived() {
    let ffn = dense(&mut Random::new(4), 4, 12, false, DType::F32);
    let inputs = vec![3e38; MIN_TOKENS * 4];
    for partition in [PartitionMethod::Kmeans, PartitionMethod::Joint] {
        let options = ConvertOptions { partition, ..options(3, 0, 0.5) };
        if let Err(error) = convert_ffn(&ffn, &inputs, &options) {
            assert!(error.to_string().contains("calibration inputs"), "{error}");
        }
    }
}
