//! Training of routers, as `convert_ffn` does it.

mod support;

use moefy::DType;
use moefy::convert::{
    CompensationMethod, ConvertOptions, PartitionMethod, RouterMethod, convert_ffn,
};
use moefy::ffn::{Activation, DenseFfn, MoeFfn};
use moefy::reference;
use support::{Random, Shape, on_threads, widened};

const D_MODEL: usize = 24;
const NUM_EXPERTS: usize = 12;

/// Its neurons, unlike random ones, come in groups that fire together.
fn grouped(random: &mut Random, expert_width: usize, glu: bool) -> DenseFfn {
    let shape = Shape {
        d_model: D_MODEL,
        num_experts: NUM_EXPERTS,
        expert_width,
        shared: 0,
        activation: if glu { Activation::Silu } else { Activation::Relu },
        glu,
        biases: true,
        dtype: DType::F32,
    };
    let dense = random.dense(&shape);
    let mut w_in = dense.w_in().to_f32().into_owned();
    for neuron in 0..shape.d_ff() {
        let group = neuron % NUM_EXPERTS;
        for i in 0..D_MODEL {
            w_in[neuron * D_MODEL + i] =
                0.2 * w_in[neuron * D_MODEL + i] + if i % NUM_EXPERTS == group { 1.0 } else { 0.0 };
        }
    }
    DenseFfn::from_neuron_major(
        dense.activation(),
        glu,
        moefy::Tensor::matrix(w_in, dense.w_in().shape()).unwrap(),
        dense.b_in().cloned(),
        dense.w_out().clone(),
        dense.b_out().cloned(),
    )
    .unwrap()
}

fn options(epochs: usize) -> ConvertOptions {
    ConvertOptions {
        num_experts: NUM_EXPERTS,
        density: 0.25,
        router: RouterMethod::D2dMoe { hidden: 32, epochs },
        compensation: CompensationMethod::None,
        ..ConvertOptions::default()
    }
}

/// Output norm of every expert, from the reference: what it adds to a token that runs nothing.
fn norms(moe: &MoeFfn, x: &[f64]) -> Vec<f64> {
    let num_tokens = x.len() / D_MODEL;
    let nothing = moefy::ffn::ExpertMask::none(num_tokens, NUM_EXPERTS);
    let base = reference::experts(moe, x, &nothing, None);
    let mut norms = vec![0.0; num_tokens * NUM_EXPERTS];
    for expert in 0..NUM_EXPERTS {
        let mut mask = nothing.clone();
        (0..num_tokens).for_each(|token| mask.insert(token, expert));
        let y = reference::experts(moe, x, &mask, None);
        for (token, (y, base)) in y.chunks(D_MODEL).zip(base.chunks(D_MODEL)).enumerate() {
            let square: f64 = y.iter().zip(base).map(|(y, base)| (y - base).powi(2)).sum();
            norms[token * NUM_EXPERTS + expert] = square.sqrt();
        }
    }
    norms
}

#[test]
fn scores_approach_the_norms_of_the_experts_outputs_on_new_tokens() {
    // Experts narrower and wider than d_model, whose norms are computed in different ways.
    for (expert_width, glu) in [(5, false), (30, false), (5, true)] {
        let mut random = Random::new(4);
        let dense = grouped(&mut random, expert_width, glu);
        let inputs = random.values(4000 * D_MODEL);
        let (moe, report) = convert_ffn(&dense, &inputs, &options(30)).unwrap();

        let x = widened(&random.values(200 * D_MODEL));
        let norms = norms(&moe, &x);
        let scores = reference::router_scores(moe.router(), &x, D_MODEL);
        let mean = norms.iter().sum::<f64>() / norms.len() as f64;
        let mse = |guess: &dyn Fn(usize) -> f64| {
            let squares = norms.iter().enumerate().map(|(i, norm)| (norm - guess(i)).powi(2));
            squares.sum::<f64>() / norms.len() as f64
        };
        let (loss, baseline) = (mse(&|i| scores[i]), mse(&|_| mean));
        assert!(loss < 0.35 * baseline, "{loss} against {baseline}");

        // The report is in units of the squared mean norm.
        let training = report.router_training.expect("it was trained");
        let reported = training.held_out_loss * mean * mean;
        assert!((0.6..1.6).contains(&(reported / loss)), "{reported} against {loss}");
        // Guessing finds k of E experts: a quarter.
        assert!(training.held_out_recall > 0.6, "{training:?}");
        assert!(training.train_loss < 2.0 * training.held_out_loss, "{training:?}");
    }
}

#[test]
fn threads_do_not_change_a_bit_and_seeds_do() {
    let mut random = Random::new(5);
    let dense = grouped(&mut random, 16, false);
    let inputs = random.values(1000 * D_MODEL);
    let run = |threads, seed| {
        let options = ConvertOptions { seed, ..options(2) };
        on_threads(threads, || convert_ffn(&dense, &inputs, &options).unwrap())
    };
    let one = run(1, 0);
    assert_eq!(one, run(2, 0));
    assert_eq!(one, run(5, 0));
    assert_ne!(one.0.router(), run(1, 1).0.router());
}

#[test]
fn the_best_epoch_is_kept() {
    let mut random = Random::new(6);
    let dense = grouped(&mut random, 3, false);
    // So few tokens that training overfits.
    let inputs = random.values(400 * D_MODEL);
    let training = |epochs| {
        let options = ConvertOptions { partition: PartitionMethod::Random, ..options(epochs) };
        let (_, report) = convert_ffn(&dense, &inputs, &options).unwrap();
        report.router_training.expect("it was trained")
    };
    let long = training(200);
    assert_eq!(long.epochs, 200);
    assert!(long.best_epoch < 200, "{long:?}");
    assert!(long.train_loss < long.held_out_loss, "{long:?}");
}
