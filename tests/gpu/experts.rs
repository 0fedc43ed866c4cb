//! The experts of a layer, on both paths, against the f64 reference.

use moefy::cuda::{
    ExpertLists, ExpertsInputs, Format, MoeFfn, View, Workspace, experts, experts_workspace_bytes,
    gates, route_index, route_index_workspace_bytes, token_tiles, token_tiles_workspace_bytes,
};
use moefy::ffn::{self, Activation, Compensation, ExpertMask, Gate};
use moefy::{DType, Tensor};
use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::emulation;
use crate::harness::{Gpu, Output, is_small, random_mask, relative_error, sizes, thin, uniform};
use crate::random_layers::{Shape, biased_layer, expected, random_layer, tokens, tolerance};
use crate::route_index::Lists;
use crate::token_tiles::Tiles;

pub fn tests() -> crate::Tests {
    vec![
        ("experts::few_tokens", few_tokens),
        ("experts::one_token_of_a_wide_layer", one_token_of_a_wide_layer),
        ("experts::many_tokens", many_tokens),
        ("experts::tiles_of_tokens", tiles_of_tokens),
        ("experts::skewed_routing", skewed_routing),
        ("experts::short_lists", short_lists),
        ("experts::long_lists", long_lists),
        ("experts::most_pairs", most_pairs),
        ("experts::blocks_of_many_tokens", blocks_of_many_tokens),
        ("experts::lone_pairs", lone_pairs),
        ("experts::gates", every_gate),
        ("experts::padding", padding),
    ]
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Which {
    Few,
    Many,
    Tiled,
}

/// One case for one path, what should come out, and how far off it may be.
struct Case {
    which: Which,
    layer: ffn::MoeFfn,
    x: Tensor,
    mask: ExpertMask,
    scores: Option<Vec<f32>>,
    expected: Vec<f64>,
    bar: f64,
    /// Whether sums as anybody would write them keep within half of the bar.
    can_be_met: bool,
    /// Pairs that the lists have room for.
    capacity: usize,
}

impl Case {
    fn new(
        which: Which,
        layer: ffn::MoeFfn,
        x: Tensor,
        mask: ExpertMask,
        scores: Option<Vec<f32>>,
    ) -> Self {
        let expected = expected(&layer, &x, &mask, scores.as_deref());
        let executed = (0..mask.num_tokens()).map(|t| mask.count(t) * layer.expert_width()).max();
        let executed = executed.unwrap_or(0) + layer.shared();
        let gates = scores.as_ref().and_then(|s| emulation::gates(layer.gate(), s, &mask));
        let emulated = emulation::emulate(&layer, &x, &mask, gates.as_deref());
        let bar = match x.dtype() {
            DType::F32 => 1e-6 * (layer.d_model().max(executed).max(64) as f64 / 64.0).sqrt(),
            dtype => tolerance(&layer, dtype),
        };
        let error = relative_error(&emulated, &expected);
        let can_be_met = x.dtype() != DType::F32 || emulation::bar(error) <= bar;
        let bar = bar.min(emulation::bar(error));
        let capacity = mask.num_tokens() * layer.num_experts();
        Self { which, layer, x, mask, scores, expected, bar, can_be_met, capacity }
    }
}

/// Runs one case and compares.
fn check(gpu: &Gpu, case: &Case) {
    let layer = &case.layer;
    check_for(gpu, case, 0, case.capacity);
    // Narrow experts go another way where more pairs are expected than outputs have room for. Without room in the lists for all
    // that could be, nothing goes under masks instead.
    if case.which == Which::Many
        && case.x.dtype() != DType::F32
        && !layer.neurons().is_glu()
        && !matches!(layer.compensation(), Some(Compensation::Linear { .. }))
    {
        check_for(gpu, case, 1 << 40, case.capacity.min(case.mask.num_pairs() + 1));
    }
}

fn check_for(gpu: &Gpu, case: &Case, expected_pairs: usize, capacity: usize) {
    let Case { which, layer, x, mask, expected, bar, .. } = case;
    let scores = case.scores.as_deref();
    let [num_tokens, d_model] = x.shape();
    let (num_experts, dtype) = (layer.num_experts(), x.dtype());
    let on_device = MoeFfn::new(&gpu.device, layer).expect("memory");
    let neurons = on_device.neurons();
    let float = Format::Float(dtype);
    let x_device = gpu.input(x.as_bytes());
    let x_view = View::matrix(x_device.address(), float, [num_tokens, d_model]);
    let mask_device = gpu.input(mask.words());
    let row_words = num_experts.div_ceil(32);
    let mask_view = View::matrix(mask_device.address(), Format::Word, [num_tokens, row_words]);
    let scores_device = scores.map(|scores| gpu.input(scores));
    let scores_view = scores_device
        .as_ref()
        .map(|scores| View::matrix(scores.address(), Format::F32, [num_tokens, num_experts]));
    let lists = Lists::new(gpu, num_tokens, num_experts, capacity);
    let views = lists.views(None);
    let expert_lists = (*which == Which::Many).then_some(ExpertLists {
        offsets: views.offsets,
        token_ids: views.token_ids,
        word_offsets: views.word_offsets,
        expected_pairs: Some(expected_pairs),
    });
    let all_tiles = Tiles::new(gpu, num_tokens, num_experts);
    let tiles = (*which == Which::Tiled).then(|| all_tiles.views());
    let bytes = experts_workspace_bytes(&gpu.device, neurons, num_tokens, expert_lists, tiles);
    let bytes = bytes.unwrap().max(route_index_workspace_bytes(num_tokens, num_experts));
    let bytes = bytes.max(token_tiles_workspace_bytes(num_tokens, num_experts).unwrap());
    let scratch = Output::new(gpu, bytes);
    let workspace = Workspace { address: scratch.address(), bytes };
    let softmax = Output::words(gpu, num_tokens * num_experts);
    let softmax_view = View::matrix(softmax.address(), Format::F32, [num_tokens, num_experts]);
    let gates_view = match layer.gate() {
        Gate::One => None,
        Gate::Score => scores_view,
        Gate::Softmax | Gate::Renormalised => Some(softmax_view),
    };
    let inputs = ExpertsInputs {
        x: x_view,
        mask: mask_view,
        gates: gates_view,
        num_valid_tokens: None,
        lists: expert_lists,
        tiles,
    };
    let mut y = Output::new(gpu, num_tokens * d_model * dtype.bytes());
    let y_view = View::matrix(y.address(), float, [num_tokens, d_model]);
    gpu.run(&mut [&mut y], |stream| unsafe {
        let device = &gpu.device;
        match &tiles {
            Some(tiles) => {
                token_tiles(device, stream, tiles, mask_view, num_experts, None, workspace)?;
            }
            None => route_index(device, stream, &views, mask_view, num_experts, None, workspace)?,
        }
        if matches!(layer.gate(), Gate::Softmax | Gate::Renormalised) {
            let renormalise = layer.gate() == Gate::Renormalised;
            let scores = scores_view.expect("a softmax has scores");
            gates(device, stream, softmax_view, scores, mask_view, renormalise)?;
        }
        experts(device, stream, y_view, neurons, &inputs, workspace)
    });
    scratch.check_guards();
    let actual =
        moefy::TensorRef::from_bytes(dtype, &y.read::<u8>(), x.shape()).unwrap().to_owned();
    let error = relative_error(&actual.to_f32(), expected);
    assert!(
        error <= *bar,
        "{which:?} {dtype}: error {error:.3e} > {bar:.3e}; T {num_tokens}, d {d_model}, E \
         {num_experts}, s {}, shared {}, glu {}, {:?}, gate {:?}, compensation {}, {expected_pairs} \
         pairs expected",
        layer.expert_width(),
        layer.shared(),
        layer.neurons().is_glu(),
        layer.neurons().activation(),
        layer.gate(),
        layer.compensation().is_some(),
    );
}

/// A shape whose product with the tokens the reference can do in reasonable time.
fn draw_shape(rng: &mut ChaCha8Rng, num_tokens: usize) -> Shape {
    draw_shape_of(rng, &[64, 384, 768, 1000, 4096], num_tokens)
}

fn draw_shape_of(rng: &mut ChaCha8Rng, d_models: &[usize], num_tokens: usize) -> Shape {
    let budget = if is_small() { 2e6 } else { 1e8 };
    loop {
        let mut pick = |values: &[usize]| *values.choose(rng).expect("some");
        let shape = Shape {
            d_model: pick(d_models),
            num_experts: pick(&[1, 12, 48, 112, 129, 448]),
            expert_width: pick(&[1, 4, 6, 24, 32, 48, 64, 100, 128, 300]),
            shared: pick(&[0, 0, 5, 64]),
            rank: pick(&[0, 0, 3, 16]),
            glu: pick(&[0, 1]) == 1,
        };
        let d_ff = shape.num_experts * shape.expert_width + shape.shared;
        if (num_tokens.max(8) * d_ff * shape.d_model) as f64 <= budget {
            return shape;
        }
    }
}

/// One that goes through both products in one launch, where the device can do that.
fn narrow(shape: Shape) -> Shape {
    Shape { d_model: shape.d_model.min(1000), glu: false, ..shape }
}

fn any_shape(gpu: &Gpu, which: Which, token_counts: &[usize]) {
    let mut cases = Vec::new();
    for num_tokens in sizes(token_counts, 19) {
        for dtype in dtypes(gpu, which) {
            cases.extend([0.0, 0.1, 0.4, 1.0].map(|density| (num_tokens, dtype, density)));
        }
    }
    let draw_once = |&(num_tokens, dtype, density): &(usize, DType, f64), rng: &mut ChaCha8Rng| {
        let shape = draw_shape(rng, num_tokens);
        let layer = random_layer(rng, shape, dtype);
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = random_mask(rng, num_tokens, shape.num_experts, density);
        Case::new(which, layer, x, mask, None)
    };
    // All that few tokens run may be one neuron whose sum nearly cancels: f32 then has few digits of it, however it is summed.
    let draw = |case: &_, rng: &mut ChaCha8Rng| {
        let mut draws = (0..9).map(|_| draw_once(case, rng));
        draws.find(|case| case.can_be_met).expect("one of nine draws that f32 can do")
    };
    gpu.check_all(&thin(cases, 5), draw, |gpu, case| check(gpu, &case));
}

fn few_tokens(gpu: &Gpu) {
    any_shape(gpu, Which::Few, &[0, 1, 2, 7, 8, 9, 19, 32, 64]);
}

/// One token goes through both products in one launch, where the device can do that.
fn one_token_of_a_wide_layer(gpu: &Gpu) {
    let mut cases = Vec::new();
    for d_model in [1032, 2048, 2056, 4096] {
        for dtype in [DType::F16, DType::BF16] {
            for gate in [Gate::One, Gate::Renormalised] {
                cases.extend([0.0, 0.1, 1.0].map(|density| (d_model, dtype, gate, density)));
            }
        }
    }
    let draw = |&(d_model, dtype, gate, density): &_, rng: &mut ChaCha8Rng| {
        let shape = draw_shape_of(rng, &[d_model], 1);
        let layer = random_layer(rng, shape, dtype).with_gate(gate);
        let x = tokens(rng, 1, d_model, dtype);
        let mask = random_mask(rng, 1, shape.num_experts, density);
        let scores = (gate != Gate::One).then(|| uniform(rng, shape.num_experts));
        let scores = scores.map(|scores| scores.into_iter().map(f32::abs).collect());
        Case::new(Which::Few, layer, x, mask, scores)
    };
    gpu.check_all(&thin(cases, 11), draw, |gpu, case| check(gpu, &case));
    if is_small() {
        return;
    }
    // So many neurons that a block has several batches of them.
    let rng = &mut gpu.rng();
    for (d_model, glu, dtype) in [(1032, false, DType::BF16), (2056, true, DType::F16)] {
        let shape = Shape { d_model, num_experts: 190, expert_width: 100, shared: 5, rank: 3, glu };
        let layer = random_layer(rng, shape, dtype);
        let x = tokens(rng, 1, d_model, dtype);
        let mask = random_mask(rng, 1, shape.num_experts, 1.0);
        check(gpu, &Case::new(Which::Few, layer, x, mask, None));
    }
}

fn many_tokens(gpu: &Gpu) {
    any_shape(gpu, Which::Many, &[0, 1, 2, 7, 19, 64, 99, 512, 989, 4096]);
}

fn tiles_of_tokens(gpu: &Gpu) {
    any_shape(gpu, Which::Tiled, &[0, 1, 2, 7, 19, 64, 99, 128, 129, 512, 989, 4096]);
}

/// What a kernel is for.
fn dtypes(gpu: &Gpu, which: Which) -> Vec<DType> {
    let hopper = gpu.device.properties().compute_capability == (9, 0);
    let can = |dtype: &DType| which != Which::Tiled || hopper && *dtype != DType::F32;
    DTYPES.into_iter().filter(can).collect()
}

/// One expert gets every token, another every other one, the rest nothing.
fn skewed_routing(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let many = if is_small() { 19 } else { 989 };
    let any: fn(Shape) -> Shape = |shape| shape;
    for (which, num_tokens, of) in [
        (Which::Few, 19, any),
        (Which::Many, many, any),
        (Which::Many, many, narrow),
        (Which::Tiled, many, any),
    ] {
        for dtype in dtypes(gpu, which) {
            let shape = of(draw_shape(rng, num_tokens));
            let layer = random_layer(rng, shape, dtype);
            let mut mask = ExpertMask::none(num_tokens, shape.num_experts);
            let (hot, warm) = (shape.num_experts - 1, shape.num_experts / 2);
            (0..num_tokens).for_each(|token| mask.insert(token, hot));
            (0..num_tokens).step_by(2).for_each(|token| mask.insert(token, warm));
            let x = tokens(rng, num_tokens, shape.d_model, dtype);
            check(gpu, &Case::new(which, layer, x, mask, None));
        }
    }
}

/// Pairs that the lists have no room for do not run.
fn short_lists(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let num_tokens = 150;
    for (dtype, expert_width, num_experts, glu) in [
        (DType::F32, 8, 12, false),
        (DType::F16, 6, 12, false),
        (DType::F16, 6, 12, true),
        (DType::BF16, 8, 12, true),
        (DType::BF16, 128, 64, false),
        (DType::BF16, 128, 64, true),
    ] {
        let shape = Shape { d_model: 64, num_experts, expert_width, shared: 0, rank: 0, glu };
        let layer = random_layer(rng, shape, dtype);
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = random_mask(rng, num_tokens, num_experts, 0.5);
        let pairs = (0..num_experts)
            .flat_map(|expert| (0..num_tokens).map(move |token| (token, expert)))
            .filter(|&(token, expert)| mask.contains(token, expert));
        let capacity = pairs.clone().count() / 2;
        let mut listed = ExpertMask::none(num_tokens, num_experts);
        pairs.take(capacity).for_each(|(token, expert)| listed.insert(token, expert));
        let expected = expected(&layer, &x, &listed, None);
        let case = Case::new(Which::Many, layer, x, mask, None);
        check(gpu, &Case { expected, capacity, ..case });
    }
}

/// The second product keeps sums of most tokens that a block can have only where tokens and columns are many, and has fewer
/// stages under way then.
fn blocks_of_many_tokens(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let num_tokens = 1024;
    for (dtype, glu) in [(DType::F16, true), (DType::BF16, false)] {
        let shape =
            Shape { d_model: 4096, num_experts: 5, expert_width: 24, shared: 8, rank: 0, glu };
        let layer = random_layer(rng, shape, dtype);
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = random_mask(rng, num_tokens, shape.num_experts, 0.3);
        check(gpu, &Case::new(Which::Many, layer, x, mask, None));
    }
}

/// Lists with room for more pairs than their outputs have: few pairs go in one launch, all of them by tiles of tokens, and
/// where experts are not whole groups of eight neurons all go in two launches, as where they are wide.
fn long_lists(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let aligned =
        Shape { d_model: 1000, num_experts: 100, expert_width: 8, shared: 16, rank: 3, glu: false };
    let odd = Shape { expert_width: 6, ..aligned };
    let wide =
        Shape { expert_width: 300, num_experts: 5, shared: 200, rank: 70, glu: true, ..aligned };
    for (shape, density, dtype) in [
        (wide, 0.1, DType::F16),
        (wide, 0.4, DType::BF16),
        (aligned, 0.1, DType::F16),
        (aligned, 1.0, DType::F16),
        (aligned, 0.1, DType::BF16),
        (aligned, 1.0, DType::BF16),
        (odd, 0.1, DType::BF16),
    ] {
        let num_tokens = 700;
        let layer = random_layer(rng, shape, dtype);
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = random_mask(rng, num_tokens, shape.num_experts, density);
        let case = Case::new(Which::Many, layer, x, mask, None);
        check(gpu, &Case { capacity: 1 << 18, ..case });
    }
}

/// So many of narrow experts that all of them run under masks, where the device can do that, and some that do not.
fn most_pairs(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for (num_experts, expert_width, shared) in [(448, 8, 0), (100, 24, 16), (70, 32, 104)] {
            for density in [0.01, 0.6, 1.0] {
                for gate in [Gate::One, Gate::Score] {
                    cases.push((dtype, num_experts, expert_width, shared, density, gate));
                }
            }
        }
    }
    for (dtype, num_experts, expert_width, shared, density, gate) in thin(cases, 5) {
        let d_model = 904;
        let shape = Shape { d_model, num_experts, expert_width, shared, rank: 0, glu: false };
        let num_tokens = if is_small() { 300 } else { 700 };
        let layer = random_layer(rng, shape, dtype).with_gate(gate);
        let x = tokens(rng, num_tokens, d_model, dtype);
        let mask = random_mask(rng, num_tokens, num_experts, density);
        let scores = (gate != Gate::One).then(|| uniform(rng, num_tokens * num_experts));
        let scores = scores.map(|scores| scores.into_iter().map(f32::abs).collect());
        check(gpu, &Case::new(Which::Many, layer, x, mask, scores));
    }
}

/// Tokens that run one expert and nothing else, among others that run none or several; of few experts and of many, with shared
/// neurons, and where lists end before all pairs.
fn lone_pairs(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for (num_experts, expert_width, shared) in
            [(24, 128, 0), (48, 64, 0), (64, 32, 0), (64, 32, 24), (70, 20, 0), (1, 64, 0)]
        {
            cases
                .extend([0, 40].map(|missing| (dtype, num_experts, expert_width, shared, missing)));
        }
    }
    for (dtype, num_experts, expert_width, shared, missing) in thin(cases, 5) {
        let d_model = 392;
        let shape = Shape { d_model, num_experts, expert_width, shared, rank: 0, glu: false };
        let num_tokens = if is_small() { 60 } else { 700 };
        let biased = rng.random_bool(0.7);
        let layer = biased_layer(rng, shape, dtype, Activation::GeluTanh, biased);
        let x = tokens(rng, num_tokens, d_model, dtype);
        let mut mask = ExpertMask::none(num_tokens, num_experts);
        let hot = num_experts / 2;
        for token in 0..num_tokens {
            let other = rng.random_range(0..num_experts);
            match rng.random_range(0..10) {
                0 => {}
                1..=4 => mask.insert(token, hot),
                5..=6 => mask.insert(token, other),
                _ => [hot, other].into_iter().for_each(|expert| mask.insert(token, expert)),
            }
        }
        let pairs = (0..num_experts)
            .flat_map(|expert| (0..num_tokens).map(move |token| (token, expert)))
            .filter(|&(token, expert)| mask.contains(token, expert));
        let capacity = pairs.clone().count() + 1 - missing;
        let mut listed = ExpertMask::none(num_tokens, num_experts);
        pairs.take(capacity).for_each(|(token, expert)| listed.insert(token, expert));
        let expected = expected(&layer, &x, &listed, None);
        let case = Case::new(Which::Many, layer, x, mask, None);
        check(gpu, &Case { expected, capacity, ..case });
    }
}

fn every_gate(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for gate in [Gate::Score, Gate::Softmax, Gate::Renormalised] {
        let any: fn(Shape) -> Shape = |shape| shape;
        for (which, num_tokens, of) in [
            (Which::Few, 7, any),
            (Which::Many, 99, any),
            (Which::Many, 99, narrow),
            (Which::Tiled, 200, any),
        ] {
            let dtypes = dtypes(gpu, which).into_iter();
            cases.extend(dtypes.map(|dtype| (gate, which, num_tokens, of, dtype)));
        }
    }
    for (gate, which, num_tokens, of, dtype) in thin(cases, 5) {
        let shape = of(draw_shape(rng, num_tokens));
        let layer = random_layer(rng, shape, dtype).with_gate(gate);
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = random_mask(rng, num_tokens, shape.num_experts, 0.3);
        let scores: Vec<f32> = uniform(rng, num_tokens * shape.num_experts);
        let scores: Vec<f32> = scores.into_iter().map(f32::abs).collect();
        check(gpu, &Case::new(which, layer, x, mask, Some(scores)));
    }
}

/// Rows beyond the device-side number of tokens are zeros, even with shared neurons and a bias; bits beyond the experts
/// count for nothing.
fn padding(gpu: &Gpu) {
    let odd = Shape { d_model: 64, num_experts: 5, expert_width: 6, shared: 3, rank: 2, glu: true };
    let aligned = Shape { expert_width: 8, shared: 16, ..odd };
    for (shape, dtype) in [
        (odd, DType::F32),
        (odd, DType::F16),
        (aligned, DType::BF16),
        (Shape { rank: 0, ..aligned }, DType::F16),
        (narrow(odd), DType::F16),
        (narrow(aligned), DType::BF16),
        (Shape { d_model: 24, ..narrow(odd) }, DType::BF16),
    ] {
        padding_of(gpu, shape, dtype, 40);
    }
    for dtype in [DType::F16, DType::BF16] {
        padding_of(gpu, Shape { d_model: 1032, ..odd }, dtype, 1);
    }
}

fn padding_of(gpu: &Gpu, shape: Shape, dtype: DType, num_tokens: usize) {
    let rng = &mut gpu.rng();
    let layer = random_layer(rng, shape, dtype);
    let x = tokens(rng, num_tokens, shape.d_model, dtype);
    let mask = random_mask(rng, num_tokens, shape.num_experts, 0.5);
    let all = expected(&layer, &x, &mask, None);
    let on_device = MoeFfn::new(&gpu.device, &layer).expect("memory");
    let x_device = gpu.input(x.as_bytes());
    let words: Vec<u32> = mask.words().iter().map(|word| word | !0 << shape.num_experts).collect();
    let mask_device = gpu.input(&words);
    let lists = Lists::new(gpu, num_tokens, shape.num_experts, num_tokens * shape.num_experts);
    let views = lists.views(None);
    let float = Format::Float(dtype);
    for valid in [0, 1, num_tokens as u32 - 1, num_tokens as u32, 1000] {
        let word = gpu.input(&[valid]);
        let num_valid = Some(View::words(word.address(), 1));
        let mask_view = View::matrix(mask_device.address(), Format::Word, [num_tokens, 1]);
        let tokens = ExpertLists {
            offsets: views.offsets,
            token_ids: views.token_ids,
            word_offsets: views.word_offsets,
            expected_pairs: None,
        };
        let all_tiles = Tiles::new(gpu, num_tokens, shape.num_experts);
        let ways = [(None, None), (Some(tokens), None), (None, Some(all_tiles.views()))];
        let tiled = dtypes(gpu, Which::Tiled).contains(&dtype);
        for (lists, tiles) in ways.into_iter().filter(|(_, tiles)| tiled || tiles.is_none()) {
            let neurons = on_device.neurons();
            let bytes = experts_workspace_bytes(&gpu.device, neurons, num_tokens, lists, tiles);
            let of_lists = route_index_workspace_bytes(num_tokens, shape.num_experts);
            let of_tiles = token_tiles_workspace_bytes(num_tokens, shape.num_experts).unwrap();
            let bytes = bytes.unwrap().max(of_lists).max(of_tiles);
            let scratch = Output::new(gpu, bytes);
            let inputs = ExpertsInputs {
                x: View::matrix(x_device.address(), float, x.shape()),
                mask: mask_view,
                gates: None,
                num_valid_tokens: num_valid,
                lists,
                tiles,
            };
            let mut y = Output::new(gpu, num_tokens * shape.d_model * dtype.bytes());
            let y_view = View::matrix(y.address(), float, x.shape());
            gpu.run(&mut [&mut y], |stream| unsafe {
                let device = &gpu.device;
                let workspace = Workspace { address: scratch.address(), bytes };
                let experts_of = shape.num_experts;
                match &tiles {
                    Some(tiles) => {
                        token_tiles(
                            device, stream, tiles, mask_view, experts_of, num_valid, workspace,
                        )?;
                    }
                    None => {
                        route_index(
                            device, stream, &views, mask_view, experts_of, num_valid, workspace,
                        )?;
                    }
                }
                experts(device, stream, y_view, neurons, &inputs, workspace)
            });
            let bytes = y.read::<u8>();
            let y = moefy::TensorRef::from_bytes(dtype, &bytes, x.shape()).expect("sizes fit");
            let y = y.to_owned();
            let y = y.to_f32();
            let end = (valid as usize).min(num_tokens) * shape.d_model;
            assert!(y[end..].iter().all(|&v| v == 0.0), "padding is not zero");
            let error = relative_error(&y[..end], &all[..end]);
            assert!(error <= tolerance(&layer, dtype), "{error}");
        }
    }
}
