//! The MoEfied FFN on the CPU against the reference.

mod support;

use moefy::cpu::{self, Workspace};
use moefy::ffn::{Activation, ExpertMask, Gate, MoeFfn, Selection};
use moefy::{DType, reference};
use support::{DTYPES, Random, Shape, on_threads, relative_error, widened};

const GATES: [Gate; 4] = [Gate::One, Gate::Score, Gate::Softmax, Gate::Renormalised];

fn shape(random: &mut Random, activation: Activation, glu: bool) -> Shape {
    Shape {
        d_model: random.pick(&[1, 5, 64, 130, 384]),
        num_experts: random.pick(&[1, 3, 12, 33, 70]),
        expert_width: random.pick(&[1, 3, 13, 32, 100]),
        shared: random.pick(&[0, 0, 1, 19, 70]),
        activation,
        glu,
        biases: random.below(2) == 1,
        dtype: random.pick(&DTYPES),
    }
}

fn layer(random: &mut Random, shape: &Shape, gate: Gate, compensation: usize) -> MoeFfn {
    let router = random.below(4);
    let ffn = random.moe(shape, router, Selection::top_k(1)).with_gate(gate);
    match random.compensation(shape, compensation) {
        Some(compensation) => ffn.with_compensation(compensation).unwrap(),
        None => ffn,
    }
}

/// Random masks of any density, with tokens that run nothing and experts that nobody runs.
fn mask(random: &mut Random, tokens: usize, num_experts: usize) -> ExpertMask {
    let mut mask = ExpertMask::none(tokens, num_experts);
    let percent = random.pick(&[0, 5, 20, 60, 100]);
    for token in 0..tokens {
        for expert in 0..num_experts {
            if percent == 100 || expert % 7 != 3 && token % 5 != 2 && random.below(100) < percent {
                mask.insert(token, expert);
            }
        }
    }
    mask
}

#[test]
fn every_layer_is_the_reference_on_any_number_of_threads() {
    let mut random = Random::new(7);
    let mut ws = Workspace::default();
    for activation in Activation::ALL {
        for gate in GATES {
            for compensation in 0..3 {
                for glu in [false, true] {
                    let shape = shape(&mut random, activation, glu);
                    let ffn = layer(&mut random, &shape, gate, compensation);
                    let cpu = cpu::MoeFfn::new(&ffn);
                    let tokens = random.pick(&[0, 1, 2, 19, 99]);
                    let x = random.values(tokens * shape.d_model);
                    let scores: Vec<f32> =
                        random.values(tokens * shape.num_experts).iter().map(|r| r.abs()).collect();
                    let mask = mask(&mut random, tokens, shape.num_experts);
                    let run = |ws: &mut Workspace| {
                        let mut y = vec![f32::NAN; x.len()];
                        cpu.experts(&x, &mask, Some(&scores), &mut y, ws).unwrap();
                        y
                    };
                    let y = run(&mut ws);
                    let expected =
                        reference::experts(&ffn, &widened(&x), &mask, Some(&widened(&scores)));
                    let error = relative_error(&y, &expected);
                    assert!(error < 1e-5, "{shape:?} {gate:?} {compensation} {tokens}: {error:e}");
                    for threads in [1, 2, 5] {
                        assert_eq!(on_threads(threads, || run(&mut Workspace::default())), y);
                    }
                }
            }
        }
    }
}

/// Scores, selection and experts together, on shapes large enough for several threads.
#[test]
fn run_routes_and_computes() {
    let mut random = Random::new(8);
    let mut ws = Workspace::default();
    for (router, selection) in [
        (0, Selection::dynamic_k(0.5)),
        (1, Selection { max_experts: Some(4), ..Selection::dynamic_k(0.3) }),
        (2, Selection::top_k(5)),
        (3, Selection::cumulative_share(0.4)),
    ] {
        for tokens in [0, 1, 2, 19, 99] {
            let mut shape = shape(&mut random, Activation::Gelu, router % 2 == 1);
            (shape.d_model, shape.num_experts, shape.expert_width) = (384, 24, 70);
            let ffn = random.moe(&shape, router, selection);
            let cpu = cpu::MoeFfn::new(&ffn);
            let x = random.values(tokens * shape.d_model);
            let mut y = vec![f32::NAN; x.len()];
            let routed = cpu.run(&x, &mut y, &mut ws).unwrap();
            assert_eq!(routed.rows_without_score, 0);
            // The same scores decide in the reference: f32 ones may differ where two nearly tie.
            let mask = routed.mask.clone();
            let expected = reference::experts(&ffn, &widened(&x), &mask, None);
            assert!(relative_error(&y, &expected) < 1e-5);
            let scores = cpu.scores(&x, &mut ws).unwrap().to_vec();
            assert_eq!(mask, reference::select(&selection, &scores, shape.num_experts).mask);
            for threads in [1, 2, 5] {
                let mut again = vec![f32::NAN; x.len()];
                on_threads(threads, || {
                    cpu.run(&x, &mut again, &mut Workspace::default()).unwrap();
                });
                assert_eq!(again, y);
            }
        }
    }
}

#[test]
fn all_experts_are_the_dense_ffn() {
    let mut random = Random::new(9);
    let mut ws = Workspace::default();
    for activation in Activation::ALL {
        for (glu, compensation) in [(false, 0), (true, 0), (false, 1), (true, 1)] {
            let shape = shape(&mut random, activation, glu);
            let ffn = layer(&mut random, &shape, Gate::One, compensation);
            let ffn = ffn.with_selection(Selection::dynamic_k(0.0)).unwrap();
            let (moe, dense) = (cpu::MoeFfn::new(&ffn), cpu::DenseFfn::new(&ffn.to_dense()));
            for tokens in [1, 19, 99] {
                let x = random.values(tokens * shape.d_model);
                let (mut y, mut expected) = (vec![f32::NAN; x.len()], vec![f32::NAN; x.len()]);
                moe.run(&x, &mut y, &mut ws).unwrap();
                dense.run(&x, &mut expected, &mut ws).unwrap();
                let error = relative_error(&y, &widened(&expected));
                assert!(error < 1e-5, "{shape:?}, {tokens} tokens: {error:e}");
            }
        }
    }
}

#[test]
fn tokens_without_a_score_get_the_bias_and_the_shared_neurons() {
    let mut random = Random::new(10);
    let shape = Shape { shared: 9, biases: true, ..shape(&mut random, Activation::Silu, true) };
    let ffn = layer(&mut random, &shape, Gate::One, 0);
    let cpu = cpu::MoeFfn::new(&ffn);
    let x = random.values(3 * shape.d_model);
    let mut scores = vec![1.0; 3 * shape.num_experts];
    scores[shape.num_experts..2 * shape.num_experts].fill(f32::NAN);
    let mut y = vec![f32::NAN; x.len()];
    let mut ws = Workspace::default();
    let routed = cpu.run_with_scores(&x, &scores, &mut y, &mut ws).unwrap();
    assert_eq!(routed.rows_without_score, 1);
    assert_eq!([0, 1, 2].map(|t| routed.mask.count(t)), [1, 0, 1]);
    let expected = reference::experts(&ffn, &widened(&x), routed.mask, None);
    assert!(relative_error(&y, &expected) < 1e-5);
}

/// More tokens than one batch holds, and each token as if it were alone.
#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut random = Random::new(11);
    let mut shape = shape(&mut random, Activation::GeluTanh, false);
    (shape.d_model, shape.num_experts, shape.expert_width) = (37, 9, 11);
    let ffn = layer(&mut random, &shape, Gate::Softmax, 2);
    let ffn = ffn.with_selection(Selection::top_k(3)).unwrap();
    let cpu = cpu::MoeFfn::new(&ffn);
    let mut ws = Workspace::default();
    let x = random.values(1500 * 37);
    let mut y = vec![f32::NAN; x.len()];
    cpu.run(&x, &mut y, &mut ws).unwrap();
    for token in [0, 1, 1023, 1024, 1499] {
        let range = token * 37..(token + 1) * 37;
        let mut alone = [f32::NAN; 37];
        cpu.run(&x[range.clone()], &mut alone, &mut ws).unwrap();
        assert_eq!(alone, y[range]);
    }
}

#[test]
fn wrong_sizes_are_named() {
    let mut random = Random::new(12);
    let shape = Shape {
        d_model: 4,
        num_experts: 3,
        expert_width: 2,
        shared: 0,
        activation: Activation::Relu,
        glu: false,
        biases: false,
        dtype: DType::F32,
    };
    let ffn = random.moe(&shape, 0, Selection::top_k(1)).with_gate(Gate::Score);
    let mut cpu = cpu::MoeFfn::new(&ffn);
    let mut ws = Workspace::default();
    let (x, mut y) = ([0.0; 8], [0.0; 8]);
    let mask = ExpertMask::none(2, 3);
    let messages = [
        cpu.run(&x[..7], &mut y, &mut ws).map(drop).unwrap_err(),
        cpu.run(&x, &mut y[..4], &mut ws).map(drop).unwrap_err(),
        cpu.run_with_scores(&x, &[0.0; 5], &mut y, &mut ws).map(drop).unwrap_err(),
        cpu.experts(&x, &ExpertMask::none(2, 4), None, &mut y, &mut ws).unwrap_err(),
        cpu.experts(&x, &mask, None, &mut y, &mut ws).unwrap_err(),
        cpu.set_selection(Selection::top_k(4)).unwrap_err(),
    ]
    .map(|error| error.to_string());
    assert_eq!(
        messages,
        [
            "moe_ffn: x must be a whole number of tokens of 4 values, got 7 values",
            "moe_ffn: y must be of 2 x 4 values, got 4 values",
            "moe_ffn: scores must be of 2 x 3 values, got 5 values",
            "moe_ffn: mask must be of 2 tokens and 3 experts, got 2 tokens and 4 experts",
            "moe_ffn: scores must be given, because the gate is Score, got none",
            "select: k must be between 1 and num_experts = 3, got 4",
        ]
    );
    assert!(cpu.run(&x, &mut y, &mut ws).is_ok());
}
