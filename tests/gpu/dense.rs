//! A whole layer where cuBLASLt's products run or may run, which racecheck cannot do.

use std::sync::Arc;

use moefy::DType;
use moefy::cuda::{
    Device, Fallback, LayerShape, MoeFfn, Path, PlanOptions, TunedLayer, TunedTime, Tuning,
    build_info,
};
use moefy::ffn::{Activation, Selection};

use crate::ffn_few::with_router;
use crate::harness::{Gpu, is_small, relative_error, thin};
use crate::plan::{
    Case, PLAIN, chunks, counts_of, every_gate, every_shape, forced, in_a_row, one_path,
    reference_of, replays, routing,
};
use crate::random_layers::{Shape, biased_layer, random_layer, tokens, tolerance};

pub fn tests() -> crate::Tests {
    vec![
        ("dense::paths", paths),
        ("dense::masked_activations", masked_activations),
        ("dense::masked_in_a_row", masked_in_a_row),
        ("dense::chunks", |gpu| chunks(gpu, &[(Path::DenseMasked, DType::BF16)])),
        ("dense::gates", |gpu| every_gate(gpu, &[Path::DenseMasked])),
        ("dense::automatic", automatic),
        ("dense::follows_a_tuning", follows_a_tuning),
        ("dense::replays_with_other_inputs", replays_with_other_inputs),
        ("dense::streams_in_turn", streams_in_turn),
    ]
}

fn paths(gpu: &Gpu) {
    every_shape(gpu, &[Path::DenseExact, Path::DenseMasked]);
}

/// Activations that the first product of a masked layer can apply itself, and one that it cannot, with experts of whole
/// 16 bytes and others, which it must leave to a kernel of their own.
fn masked_activations(gpu: &Gpu) {
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for activation in
            [Activation::Relu, Activation::GeluTanh, Activation::Identity, Activation::Gelu]
        {
            for expert_width in [24, 20] {
                cases.extend([true, false].map(|biased| (dtype, activation, expert_width, biased)));
            }
        }
    }
    let rng = &mut gpu.rng();
    for (dtype, activation, expert_width, biased) in thin(cases, 6) {
        let shape = Shape { expert_width, ..PLAIN };
        let layer = biased_layer(rng, shape, dtype, activation, biased);
        one_path(gpu, rng, &layer, shape, Path::DenseMasked);
    }
}

/// Masked layers with a router whose kernel lets the first product multiply beside it, for as many tokens as that is for: alone,
/// with padding, and behind layers whose last kernel lets others begin before it has written what these read, under other masks
/// each time; some count what they select.
fn masked_in_a_row(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let even =
        Shape { d_model: 768, num_experts: 24, expert_width: 128, shared: 0, rank: 0, glu: false };
    let uneven = Shape { d_model: 392, num_experts: 48, expert_width: 24, shared: 8, ..even };
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for shape in [even, uneven] {
            cases.extend([120, 512, 700, 2048].map(|num_tokens| (dtype, shape, num_tokens)));
        }
    }
    for (dtype, shape, num_tokens) in thin(cases, 5) {
        let layer = random_layer(rng, shape, dtype);
        let layer = with_router(rng, &layer, 128, 1, Selection::dynamic_k(0.5));
        let name = format!("{dtype} d {} T {num_tokens}", shape.d_model);
        let statistics = dtype == DType::BF16;
        let [mut before, mut case] = [Path::ExpertMajor, Path::DenseMasked].map(|path| {
            let options = PlanOptions { statistics, ..forced(path) };
            Case::new(gpu, &layer, shape, num_tokens, options)
        });
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = routing(rng, num_tokens, shape.num_experts, 0.3);
        case.write(&x, &mask);
        case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
        let all = case.read(num_tokens);
        let counts = case.plan.statistics().expect("a copy");
        let counts = counts.map(|counts| (counts.k_histogram, counts.expert_counts));
        assert_eq!(counts, statistics.then(|| counts_of(&mask, num_tokens, 1)), "{name}");
        let error = relative_error(&all, &reference_of(Path::DenseMasked, &layer, &x, &mask));
        assert!(error <= 2.0 * tolerance(&layer, dtype), "{name}: {error:.3e}");
        let valid = num_tokens - 70;
        case.valid.write(&[valid as u32]);
        case.y.poison();
        case.launch(gpu.raw_stream(), num_tokens, true).expect("a run");
        let (padded, end) = (case.read(num_tokens), valid * shape.d_model);
        assert!(padded[..end] == all[..end], "{name}: padding changes others");
        assert!(padded[end..].iter().all(|&v| v == 0.0), "{name}: padding is not zero");

        before.write(&x, &routing(rng, num_tokens, shape.num_experts, 0.3));
        in_a_row(gpu, &name, &before, &case, num_tokens);
    }
}

fn automatic(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let dtype = DType::F16;
    let layer = random_layer(rng, PLAIN, dtype);
    for fallback in [Fallback::Exact, Fallback::Masked] {
        let options = PlanOptions { fallback, ..PlanOptions::default() };
        let mut case = Case::new(gpu, &layer, PLAIN, 40, options);
        for num_tokens in [1, 3, 8, 9, 40] {
            let x = tokens(rng, num_tokens, PLAIN.d_model, dtype);
            let mask = routing(rng, num_tokens, PLAIN.num_experts, 0.3);
            case.write(&x, &mask);
            case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
            let path = case.plan.path(num_tokens);
            let expected = reference_of(path, &layer, &x, &mask);
            let error = relative_error(&case.read(num_tokens), &expected);
            assert!(error <= 2e-3, "{} T {num_tokens}: {error:.3e}", path.name());
        }
    }
}

/// A tuning decides where it has every time that matters, and nothing else does.
fn follows_a_tuning(gpu: &Gpu) {
    let layer = random_layer(&mut gpu.rng(), PLAIN, DType::F16);
    let name = gpu.device.properties().name.clone();
    let kernels = build_info().expect("kernels").source_digest;
    let few = [(1, 1.0), (2, 1.0), (4, 20.0), (8, 20.0)];
    let many = [(1024, 5.0), (8192, 5.0)];
    let dense = few.into_iter().chain(many).map(|(tokens, _)| (tokens, 10.0));
    let mut times = Vec::new();
    let mut add = |path, density, (tokens, us)| times.push(TunedTime { path, tokens, density, us });
    for density in [Some(0.1), Some(0.3)] {
        few.into_iter().for_each(|point| add(Path::Few, density, point));
        few.into_iter().for_each(|(tokens, _)| add(Path::FewFused, density, (tokens, 15.0)));
        many.into_iter().for_each(|point| add(Path::ExpertMajor, density, point));
    }
    dense.for_each(|point| add(Path::DenseExact, None, point));
    let mut tuning = Tuning::new(name, kernels);
    tuning.insert(TunedLayer { shape: LayerShape::of(&layer), times });

    let mut device = Device::open(0).expect("the device of the other tests");
    let mut refused = |wrong: fn(&mut Tuning), words: &[&str]| {
        let mut tuning = tuning.clone();
        wrong(&mut tuning);
        let message = device.set_tuning(tuning).expect_err("a refusal").to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{message:?} lacks {word:?}"));
        assert_eq!(device.tuning(), None);
    };
    refused(|tuning| tuning.device = "another".into(), &["this device", "another"]);
    refused(|tuning| tuning.kernels = "others".into(), &["kernels", "moefy tune"]);
    refused(|tuning| tuning.layers[0].times[0].us = f64::NAN, &["few at T 1", "NaN"]);
    device.set_tuning(tuning).expect("a tuning of this device");
    let max_tokens = if is_small() { 40 } else { 9000 };
    let plan = |device, fallback, density, max_tokens| {
        let options = PlanOptions { fallback, density, ..PlanOptions::default() };
        let layer = Arc::new(MoeFfn::new(device, &layer).expect("memory"));
        layer.plan(max_tokens, options).expect("a plan")
    };
    let device = Arc::new(device);
    let tuned = plan(&device, Fallback::Exact, Some(0.2), max_tokens);
    let default = plan(&gpu.device, Fallback::Exact, Some(0.2), max_tokens);
    for tokens in 1..=max_tokens {
        let expected = match tokens {
            1..=3 => Path::Few,
            4..=8 => Path::DenseExact,
            // Nothing was measured for some of the paths.
            9..1024 => default.path(tokens),
            _ => Path::ExpertMajor,
        };
        assert_eq!(tuned.path(tokens), expected, "T {tokens}");
    }
    for (fallback, density) in [(Fallback::Masked, Some(0.2)), (Fallback::Exact, Some(0.05))] {
        // Few, because every plan times dense products.
        let few_tokens = 40;
        let [tuned, default] =
            [&device, &gpu.device].map(|device| plan(device, fallback, density, few_tokens));
        let same = (1..=few_tokens).all(|tokens| tuned.path(tokens) == default.path(tokens));
        assert!(same, "{fallback:?} at {density:?} was not measured");
    }
}

fn replays_with_other_inputs(gpu: &Gpu) {
    replays(gpu, &[(Path::DenseExact, 40), (Path::DenseMasked, 40)]);
}

/// A plan with a second stream of its own: on two streams one after the other, and on one of them while the other is
/// captured.
fn streams_in_turn(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let layer = random_layer(rng, PLAIN, DType::F16);
    let mut case = Case::new(gpu, &layer, PLAIN, 40, forced(Path::DenseMasked));
    case.write(&tokens(rng, 40, PLAIN.d_model, DType::F16), &routing(rng, 40, 48, 0.2));
    let other = gpu.device.cudarc_context().new_stream().expect("a stream");
    let run = |stream: moefy::cuda::RawStream| case.launch(stream, 40, false);
    let results = std::cell::RefCell::new(Vec::new());
    let note = || results.borrow_mut().push(case.read(40));
    for stream in [gpu.raw_stream(), other.as_ref().into(), gpu.raw_stream()] {
        run(stream).expect("a run");
        gpu.device.cudarc_context().synchronize().expect("no failure");
        note();
    }
    let graph = gpu.capture(|stream| {
        run(stream)?;
        run(other.as_ref().into())?;
        run(stream)
    });
    other.synchronize().expect("no failure");
    note();
    graph.expect("kernels").launch().expect("a launch");
    gpu.stream.synchronize().expect("no failure");
    note();
    let results = results.into_inner();
    assert!(results.iter().all(|y| *y == results[0]), "a stream differs");
}
