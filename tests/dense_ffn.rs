//! The dense FFN on the CPU against the reference.

mod support;

use moefy::cpu::{self, Workspace};
use moefy::ffn::{Activation, DenseFfn};
use moefy::{Tensor, reference};
use support::{DTYPES, Random, Shape, on_threads, relative_error, widened};

#[test]
fn every_dense_ffn_is_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(1);
    let mut ws = Workspace::default();
    for activation in Activation::ALL {
        for (glu, biases) in [(false, false), (false, true), (true, false), (true, true)] {
            let dtype = random.pick(&DTYPES);
            let d_model = random.pick(&[1, 5, 64, 100, 384, 1030]);
            let d_ff = random.pick(&[1, 7, 64, 130, 257]);
            let shape = Shape {
                d_model,
                num_experts: 1,
                expert_width: d_ff,
                shared: 0,
                activation,
                glu,
                biases,
                dtype,
            };
            let ffn = random.dense(&shape);
            let layer = cpu::DenseFfn::new(&ffn);
            for tokens in [0, 1, 2, 19, 99] {
                let x = random.values(tokens * d_model);
                let mut y = vec![f32::NAN; x.len()];
                layer.run(&x, &mut y, &mut ws).unwrap();
                let expected = reference::dense_ffn(&ffn, &widened(&x));
                let error = relative_error(&y, &expected);
                assert!(error < 1e-5, "{shape:?}, {tokens} tokens: {error:e}");
                for threads in [1, 2, 5] {
                    let mut again = vec![f32::NAN; x.len()];
                    on_threads(threads, || {
                        layer.run(&x, &mut again, &mut Workspace::default()).unwrap();
                    });
                    assert_eq!(again, y);
                }
            }
        }
    }
}

/// More tokens than one batch holds, and each token as if it were alone.
#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut random = Random::new(2);
    let shape = Shape {
        d_model: 33,
        num_experts: 1,
        expert_width: 70,
        shared: 0,
        activation: Activation::Gelu,
        glu: true,
        biases: true,
        dtype: moefy::DType::F32,
    };
    let layer = cpu::DenseFfn::new(&random.dense(&shape));
    let mut ws = Workspace::default();
    let x = random.values(1500 * 33);
    let mut y = vec![f32::NAN; x.len()];
    layer.run(&x, &mut y, &mut ws).unwrap();
    for token in [0, 1, 255, 256, 1023, 1024, 1499] {
        let range = token * 33..(token + 1) * 33;
        let mut alone = [f32::NAN; 33];
        layer.run(&x[range.clone()], &mut alone, &mut ws).unwrap();
        assert_eq!(alone, y[range]);
    }
}

#[test]
fn wrong_sizes_are_named() {
    let mut random = Random::new(0);
    let shape = Shape {
        d_model: 4,
        num_experts: 1,
        expert_width: 3,
        shared: 0,
        activation: Activation::Relu,
        glu: false,
        biases: false,
        dtype: moefy::DType::F32,
    };
    let layer = cpu::DenseFfn::new(&random.dense(&shape));
    let mut ws = Workspace::default();
    let error = layer.run(&[0.0; 7], &mut [0.0; 7], &mut ws).unwrap_err().to_string();
    assert_eq!(error, "dense_ffn: x must be a whole number of tokens of 4 values, got 7 values");
    let error = layer.run(&[0.0; 8], &mut [0.0; 4], &mut ws).unwrap_err().to_string();
    assert_eq!(error, "dense_ffn: y must be of 2 x 4 values, got 4 values");
    for shape in [[0, 4], [3, 0]] {
        let empty = || Tensor::matrix(Vec::<f32>::new(), shape).unwrap();
        let made =
            DenseFfn::from_neuron_major(Activation::Relu, false, empty(), None, empty(), None);
        let error = made.unwrap_err().to_string();
        assert!(error.contains("at least one neuron and a token width"), "{error}");
    }
}
