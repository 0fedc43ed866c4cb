//! A whole layer on the fused path for few tokens, routed by its own router.

use std::sync::Arc;

use moefy::cuda::{FfnInputs, Format, MoeFfn, Path, PlanOptions, View, Workspace};
use moefy::ffn::{self, ExpertMask, Gate, Selection, SelectionRule};
use moefy::{DType, TensorRef, reference};
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::emulation;
use crate::harness::{Gpu, Output, is_small, relative_error, sizes, thin};
use crate::random_layers::{Shape, expected, random_layer, tokens, tolerance};
use crate::router_select::{assert_outside_band, routers};

pub fn tests() -> crate::Tests {
    vec![
        ("ffn_few::any_shape", any_shape),
        ("ffn_few::rules_and_routers", rules_and_routers),
        ("ffn_few::gates", every_gate),
        ("ffn_few::padding", padding),
    ]
}

/// Runs a layer for the first `valid` of some tokens and compares. `false`: not for this path.
fn check(
    gpu: &Gpu,
    rng: &mut ChaCha8Rng,
    layer: &ffn::MoeFfn,
    num_tokens: usize,
    valid: usize,
) -> bool {
    let (d_model, num_experts) = (layer.d_model(), layer.num_experts());
    let dtype = layer.neurons().dtype();
    let on_device = Arc::new(MoeFfn::new(&gpu.device, layer).expect("memory"));
    // By the density a plan expects, the rows of all neurons are asked for or those of the experts that run.
    let density = Some([0.02, 1.0][rng.random_range(0..2)]);
    let options = PlanOptions { path: Some(Path::FewFused), density, ..PlanOptions::default() };
    let Ok(plan) = on_device.plan(num_tokens, options) else { return false };

    let x = tokens(rng, num_tokens, d_model, dtype);
    let x_device = gpu.input(x.as_bytes());
    let float = Format::Float(dtype);
    let x_view = View::matrix(x_device.address(), float, [num_tokens, d_model]);
    let valid_device = gpu.input(&[valid as u32]);
    let num_valid_tokens = Some(View::words(valid_device.address(), 1));

    let row_words = num_experts.div_ceil(32);
    let mut mask = Output::words(gpu, num_tokens * row_words);
    let mut y = Output::new(gpu, num_tokens * d_model * dtype.bytes());
    let y_view = View::matrix(y.address(), float, [num_tokens, d_model]);
    let bytes = plan.workspace_bytes();
    let scratch = Output::new(gpu, bytes);
    let workspace = Workspace { address: scratch.address(), bytes };
    let mask_view = View::matrix(mask.address(), Format::Word, [num_tokens, row_words]);
    let inputs = FfnInputs { num_valid_tokens, mask: Some(mask_view), ..FfnInputs::new(x_view) };
    gpu.run(&mut [&mut y, &mut mask], |stream| unsafe {
        plan.run(stream, y_view, &inputs, workspace)
    });
    scratch.check_guards();
    // `from_words` refuses bits beyond the experts.
    let mask = ExpertMask::from_words(num_tokens, num_experts, mask.read()).expect("a mask");
    let valid_x = &x.to_f64()[..valid.min(num_tokens) * d_model];
    let scores = reference::router_scores(layer.router(), valid_x, d_model);
    let case = format!("T {num_tokens} ({valid} valid), d {d_model}, E {num_experts}, {dtype}");
    if let SelectionRule::DynamicK { rel_threshold } = layer.selection().rule
        && layer.selection().max_experts.is_none()
    {
        assert_outside_band(&scores, &mask, f64::from(rel_threshold), &case);
    }
    let mut scores: Vec<f32> = scores.into_iter().map(|score| score as f32).collect();
    scores.resize(num_tokens * num_experts, 0.0);

    let bytes = y.read::<u8>();
    let y = TensorRef::from_bytes(dtype, &bytes, [num_tokens, d_model]).unwrap();
    let y = y.to_owned().to_f32().into_owned();
    let all = expected(layer, &x, &mask, Some(&scores));
    let end = valid.min(num_tokens) * d_model;
    let error = relative_error(&y[..end], &all[..end]);
    let gates = emulation::gates(layer.gate(), &scores, &mask);
    let emulated = emulation::emulate(layer, &x, &mask, gates.as_deref());
    let emulated = relative_error(&emulated[..end], &all[..end]);
    let bar = tolerance(layer, dtype).min(emulation::bar(emulated));
    assert!(
        error <= bar,
        "error {error:.3e} > {bar:.3e}; {case}, s {}, shared {}, glu {}, {:?}, {:?}, {:?}, \
         compensation {}",
        layer.expert_width(),
        layer.shared(),
        layer.neurons().is_glu(),
        layer.neurons().activation(),
        layer.selection(),
        layer.gate(),
        layer.compensation().is_some(),
    );
    assert!(y[end..].iter().all(|&v| v == 0.0), "padding is not zero");
    true
}

fn draw_shape(rng: &mut ChaCha8Rng, num_tokens: usize) -> Shape {
    let budget = if is_small() { 2e6 } else { 2e8 };
    loop {
        let mut pick = |values: &[usize]| *values.choose(rng).expect("some");
        let shape = Shape {
            d_model: pick(&[8, 64, 384, 768, 1000, 1024, 4096]),
            num_experts: pick(&[1, 12, 48, 112, 129, 448]),
            expert_width: pick(&[1, 4, 6, 24, 32, 48, 64, 100, 128]),
            shared: pick(&[0, 0, 5, 64]),
            rank: pick(&[0, 0, 3, 16]),
            glu: pick(&[0, 1]) == 1,
        };
        let d_ff = shape.num_experts * shape.expert_width + shape.shared;
        if (num_tokens.max(1) * d_ff * shape.d_model) as f64 <= budget {
            return shape;
        }
    }
}

/// The layer with a drawn router, of `hidden` units where it has two layers.
pub fn with_router(
    rng: &mut ChaCha8Rng,
    layer: &ffn::MoeFfn,
    hidden: usize,
    which: usize,
    selection: Selection,
) -> ffn::MoeFfn {
    let sizes = [layer.num_experts(), layer.d_model(), hidden];
    let router = routers(rng, sizes, layer.neurons().dtype()).swap_remove(which);
    let (neurons, partition) = (layer.neurons().clone(), layer.partition().clone());
    let routed = ffn::MoeFfn::from_expert_order(neurons, partition, router, selection).unwrap();
    match layer.compensation() {
        Some(compensation) => routed.with_compensation(compensation.clone()).unwrap(),
        None => routed,
    }
}

fn any_shape(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for num_tokens in sizes(&[1, 2, 7, 8, 9, 16, 19, 32], 9) {
        for dtype in [DType::F16, DType::BF16] {
            cases.extend([0.0, 0.1, 0.5, 0.9, 1.0].map(|threshold| (num_tokens, dtype, threshold)));
        }
    }
    let cases = thin(cases, 7);
    let (mut checked, num_cases) = (0, cases.len());
    for (num_tokens, dtype, threshold) in cases {
        let shape = draw_shape(rng, num_tokens);
        let layer = random_layer(rng, shape, dtype);
        let layer = with_router(rng, &layer, 128, 1, Selection::dynamic_k(threshold));
        checked += usize::from(check(gpu, rng, &layer, num_tokens, num_tokens));
    }
    let is_hopper = gpu.device.properties().compute_capability == (9, 0);
    assert!(!is_hopper || checked >= num_cases / 4, "only {checked} of {num_cases} for this path");
}

const SHAPE: Shape =
    Shape { d_model: 384, num_experts: 140, expert_width: 6, shared: 8, rank: 0, glu: false };

fn rules_and_routers(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let rules = [
        Selection::top_k(1),
        Selection::top_k(140),
        Selection::dynamic_k(0.3),
        Selection::cumulative_share(0.4),
        Selection { max_experts: Some(3), ..Selection::dynamic_k(0.2) },
    ];
    let of_rule = |(index, rule)| (0..4).map(move |which| (index, rule, which));
    let cases = rules.into_iter().enumerate().flat_map(of_rule).collect();
    for (index, rule, which) in thin(cases, 3) {
        let layer = random_layer(rng, SHAPE, DType::BF16);
        let layer = with_router(rng, &layer, [128, 40, 200][index % 3], which, rule);
        check(gpu, rng, &layer, [5, 17][index % 2], 17);
    }
}

fn every_gate(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for gate in [Gate::Score, Gate::Softmax, Gate::Renormalised] {
        for glu in [false, true] {
            let layer = random_layer(rng, Shape { glu, ..SHAPE }, DType::F16);
            let layer = with_router(rng, &layer, 64, 2, Selection::dynamic_k(0.9)).with_gate(gate);
            check(gpu, rng, &layer, 7, 7);
        }
    }
}

fn padding(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for valid in [0, 1, 6, 7, 1000] {
        let layer = random_layer(rng, SHAPE, DType::F16);
        let layer = with_router(rng, &layer, 128, 1, Selection::dynamic_k(0.5));
        check(gpu, rng, &layer, 7, valid);
    }
}
