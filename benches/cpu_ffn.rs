//! Times one FFN on the CPU: dense against MoEfied, at density 0.2, with random routing.
//!
//! `cargo bench --bench cpu_ffn` takes less than two minutes. Every row interleaves the three ways
//! to run the layer and prints the median over the rounds of dense/MoE, where dense is the faster of
//! the `gemm` crate and our own path. Everything that a model would pay is inside: the router (an
//! MLP of width 128), selection, the index of tokens. A random router would select at any density,
//! so after it has run its scores are replaced by ones that select floor or ceil of 0.2 E random
//! experts per token. Layers of a model alternate, so the small shape alternates over 6 of them.

use std::hint::black_box;
use std::time::{Duration, Instant};

use moefy::Tensor;
use moefy::cpu::{self, Matrix, MatrixMut, Workspace, activate};
use moefy::ffn::{self, Activation, MlpKind, Partition, Router, Selection};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

const THREADS: usize = 2;
const DENSITY: f64 = 0.2;
const ROUTER_WIDTH: usize = 128;

struct Case {
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    num_experts: usize,
    glu: bool,
    activation: Activation,
    layers: usize,
}

const CASES: [Case; 2] = [
    Case {
        name: "MiniLM",
        d_model: 384,
        d_ff: 1536,
        num_experts: 48,
        glu: false,
        activation: Activation::Gelu,
        layers: 6,
    },
    Case {
        name: "LLM-GLU",
        d_model: 4096,
        d_ff: 14336,
        num_experts: 112,
        glu: true,
        activation: Activation::Silu,
        layers: 1,
    },
];

/// One layer in the three forms, each with its own copy of the weights.
struct Layer {
    w_in: Vec<f32>,
    w_out: Vec<f32>,
    dense: cpu::DenseFfn,
    moe: cpu::MoeFfn,
}

fn random(rng: &mut ChaCha8Rng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

impl Layer {
    fn new(case: &Case, rng: &mut ChaCha8Rng) -> Self {
        let &Case { d_model, d_ff, num_experts, activation, glu, .. } = case;
        let mut matrix = |rows: usize, cols: usize| {
            let values = random(rng, rows * cols, (3.0 / cols as f32).sqrt());
            Tensor::matrix(values, [rows, cols]).expect("sizes fit")
        };
        let w_in = matrix(if glu { 2 * d_ff } else { d_ff }, d_model);
        let w_out = matrix(d_ff, d_model);
        let router = Router::Mlp {
            kind: MlpKind::D2dMoe,
            w1: matrix(ROUTER_WIDTH, d_model),
            w2: matrix(num_experts, ROUTER_WIDTH),
        };
        let labels = (0..d_ff).map(|n| (n / (d_ff / num_experts)) as u32).collect();
        let partition = Partition::new(num_experts, labels).expect("equal experts");
        let [plain_in, plain_out] = [&w_in, &w_out].map(|w| w.to_f32().into_owned());
        let dense = ffn::DenseFfn::from_neuron_major(activation, glu, w_in, None, w_out, None)
            .expect("shapes fit");
        let cpu_dense = cpu::DenseFfn::new(&dense);
        let selection = Selection::dynamic_k(0.5);
        let moe = ffn::MoeFfn::from_expert_order(dense, partition, router, selection);
        let moe = cpu::MoeFfn::new(&moe.expect("shapes fit"));
        Self { w_in: plain_in, w_out: plain_out, dense: cpu_dense, moe }
    }

    /// The dense layer as two products of the `gemm` crate.
    fn run_gemm(&self, case: &Case, x: &[f32], y: &mut [f32], h: &mut [f32]) {
        let &Case { d_model, d_ff, activation, glu, .. } = case;
        let [tokens, rows] = [x.len() / d_model, self.w_in.len() / d_model];
        let x = Matrix::new(x, [tokens, d_model]);
        let w_in = Matrix::new(&self.w_in, [rows, d_model]);
        cpu::gemm(1.0, x, w_in.transposed(), 0.0, MatrixMut::new(h, [tokens, rows]));
        if glu {
            h.par_chunks_exact_mut(rows).for_each(|h| {
                let (gate, up) = h.split_at_mut(d_ff);
                activate(activation, gate);
                gate.iter_mut().zip(up).for_each(|(gate, up)| *gate *= *up);
            });
        } else {
            h.par_chunks_mut(16 * 1024).for_each(|h| activate(activation, h));
        }
        let h = Matrix::with_strides(h, [tokens, d_ff], [rows, 1]);
        let w_out = Matrix::new(&self.w_out, [d_ff, d_model]);
        cpu::gemm(1.0, h, w_out, 0.0, MatrixMut::new(y, [tokens, d_model]));
    }
}

/// Scores 1 for floor or ceil of ρE random experts of every token, 0 for the others.
fn random_routing(rng: &mut ChaCha8Rng, tokens: usize, num_experts: usize) -> Vec<f32> {
    let k = DENSITY * num_experts as f64;
    let mut scores = vec![0.0; tokens * num_experts];
    for row in scores.chunks_exact_mut(num_experts) {
        let mut left = k as usize + usize::from(rng.random_bool(k.fract()));
        while left > 0 {
            let score = &mut row[rng.random_range(0..num_experts)];
            left -= usize::from(*score == 0.0);
            *score = 1.0;
        }
    }
    scores
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn bench(case: &Case, layers: &[Layer], tokens: usize, budget: Duration, rng: &mut ChaCha8Rng) {
    let mut ws = Workspace::default();
    let x = random(rng, tokens * case.d_model, 1.0);
    let mut y = vec![0.0; x.len()];
    let mut h = vec![0.0; tokens * case.d_ff * if case.glu { 2 } else { 1 }];
    let routings: Vec<Vec<f32>> =
        layers.iter().map(|_| random_routing(rng, tokens, case.num_experts)).collect();
    let mut num_pairs = 0;

    let mut rounds: Vec<[f64; 3]> = Vec::new();
    let begin = Instant::now();
    while rounds.len() < 2 || begin.elapsed() < budget && rounds.len() < 2000 {
        let mut round = [0.0; 3];
        let mut clock = |way: usize, run: &mut dyn FnMut()| {
            let start = Instant::now();
            run();
            round[way] = start.elapsed().as_secs_f64() * 1e6 / layers.len() as f64;
        };
        clock(0, &mut || {
            layers.iter().for_each(|layer| layer.run_gemm(case, black_box(&x), &mut y, &mut h));
        });
        clock(1, &mut || {
            for layer in layers {
                layer.dense.run(black_box(&x), &mut y, &mut ws).expect("sizes fit");
            }
        });
        num_pairs = 0;
        clock(2, &mut || {
            for (layer, routing) in layers.iter().zip(&routings) {
                black_box(layer.moe.scores(black_box(&x), &mut ws).expect("sizes fit"));
                let routed = layer.moe.run_with_scores(&x, routing, &mut y, &mut ws);
                num_pairs += routed.expect("sizes fit").mask.num_pairs();
            }
        });
        rounds.push(round);
    }
    // The first round warms caches and threads.
    let rounds = &rounds[1..];
    let times = [0, 1, 2].map(|way| median(rounds.iter().map(|round| round[way])));
    let dense = usize::from(times[1] < times[0]);
    let speedup = median(rounds.iter().map(|round| round[dense] / round[2]));
    let density = num_pairs as f64 / (layers.len() * tokens * case.num_experts) as f64;
    println!(
        "{:<8} {tokens:>4} {density:>8.3} {:>12.1} {:>12.1} {:>12.1} {speedup:>8.2}x {:>7}",
        case.name,
        times[0],
        times[1],
        times[2],
        rounds.len(),
    );
}

fn main() {
    // `cargo bench` says so; anything else, such as `cargo test --benches`, wants to see it run.
    let full = std::env::args().any(|arg| arg == "--bench");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().expect("threads");
    println!("f32, {THREADS} threads; microseconds per layer");
    println!(
        "{:<8} {:>4} {:>8} {:>12} {:>12} {:>12} {:>9} {:>7}",
        "shape", "T", "density", "dense gemm", "dense ours", "MoE", "speed-up", "rounds"
    );
    pool.install(|| {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for case in &CASES[..if full { 2 } else { 1 }] {
            let layers: Vec<Layer> = (0..case.layers).map(|_| Layer::new(case, &mut rng)).collect();
            for tokens in [1, 16, 512] {
                let budget = Duration::from_secs(if full { 8 } else { 0 });
                bench(case, &layers, tokens, budget, &mut rng);
            }
        }
    });
}
