//! A whole layer from tokens to outputs. Dense paths are in `dense.rs`.

use std::sync::Arc;

use moefy::cuda::{FfnInputs, FfnPlan, Format, MoeFfn, Path, PlanOptions, View, Workspace};
use moefy::ffn::{self, Activation, ExpertMask, Gate, Selection};
use moefy::{DType, Tensor, TensorRef, reference};
use rand_chacha::ChaCha8Rng;

use crate::ffn_few::with_router;
use crate::harness::{Gpu, Output, is_small, random_mask, relative_error, sizes, thin};
use crate::random_layers::{Shape, biased_layer, expected, random_layer, tokens, tolerance};

pub fn tests() -> crate::Tests {
    vec![
        ("plan::sparse_paths", sparse_paths),
        ("plan::chunks_and_padding", chunks_and_padding),
        ("plan::gates", gates),
        ("plan::top_k", top_k),
        ("plan::imposed_scores", imposed_scores),
        ("plan::for_a_layer_of_another_density", for_a_layer_of_another_density),
        ("plan::statistics", statistics),
        ("plan::replays_with_other_inputs", replays_with_other_inputs),
        ("plan::few_and_many_pairs_in_turn", few_and_many_pairs_in_turn),
        ("plan::memory_stays_flat", memory_stays_flat),
        ("plan::bad_input", bad_input),
    ]
}

pub const PLAIN: Shape =
    Shape { d_model: 384, num_experts: 48, expert_width: 24, shared: 8, rank: 0, glu: false };
const GLU: Shape =
    Shape { d_model: 1000, num_experts: 12, expert_width: 100, shared: 0, rank: 4, glu: true };

/// A plan with buffers for its largest batch, and routing imposed by scores.
pub struct Case {
    pub plan: FfnPlan,
    pub dtype: DType,
    pub shape: Shape,
    pub x: Output,
    pub y: Output,
    pub scores: Output,
    pub valid: Output,
    pub scratch: Output,
}

impl Case {
    pub fn new(
        gpu: &Gpu,
        layer: &ffn::MoeFfn,
        shape: Shape,
        max_tokens: usize,
        options: PlanOptions,
    ) -> Self {
        let dtype = layer.neurons().dtype();
        let on_device = Arc::new(MoeFfn::new(&gpu.device, layer).expect("memory"));
        let plan = on_device.plan(max_tokens, options).expect("a plan");
        let scratch = Output::new(gpu, plan.workspace_bytes());
        let elements = max_tokens * shape.d_model;
        Self {
            plan,
            dtype,
            shape,
            x: Output::new(gpu, elements * dtype.bytes()),
            y: Output::new(gpu, elements * dtype.bytes()),
            scores: Output::words(gpu, max_tokens * shape.num_experts),
            valid: Output::words(gpu, 1),
            scratch,
        }
    }

    /// Copies inputs to the device; they fill the beginning of the buffers. Returns the scores, which select what the mask has.
    pub fn write(&mut self, x: &Tensor, mask: &ExpertMask) -> Vec<f32> {
        fill(&mut self.x, x.as_bytes());
        let scores: Vec<f32> = (0..mask.num_tokens())
            .flat_map(|t| (0..mask.num_experts()).map(move |e| (t, e)))
            .map(|(t, e)| if mask.contains(t, e) { 1.0 + e as f32 / 8192.0 } else { 0.0 })
            .collect();
        fill(&mut self.scores, bytemuck::cast_slice(&scores));
        scores
    }

    pub fn inputs(&self, num_tokens: usize, padded: bool) -> FfnInputs {
        let float = Format::Float(self.dtype);
        let scores = [num_tokens, self.shape.num_experts];
        FfnInputs {
            x: View::matrix(self.x.address(), float, [num_tokens, self.shape.d_model]),
            num_valid_tokens: padded.then(|| self.valid.view()),
            scores: Some(View::matrix(self.scores.address(), Format::F32, scores)),
            selection: None,
            mask: None,
            status: None,
        }
    }

    pub fn launch(
        &self,
        stream: moefy::cuda::RawStream,
        num_tokens: usize,
        padded: bool,
    ) -> moefy::Result<()> {
        let shape = [num_tokens, self.shape.d_model];
        let y = View::matrix(self.y.address(), Format::Float(self.dtype), shape);
        let bytes = self.plan.workspace_bytes();
        let workspace = Workspace { address: self.scratch.address(), bytes };
        unsafe { self.plan.run(stream, y, &self.inputs(num_tokens, padded), workspace) }
    }

    pub fn read(&self, num_tokens: usize) -> Vec<f32> {
        self.scratch.check_guards();
        let bytes = num_tokens * self.shape.d_model * self.dtype.bytes();
        let y = &self.y.read::<u8>()[..bytes];
        let y = TensorRef::from_bytes(self.dtype, y, [num_tokens, self.shape.d_model]).unwrap();
        y.to_owned().to_f32().into_owned()
    }
}

/// Writes the front of an output; the rest stays poisoned.
fn fill(output: &mut Output, bytes: &[u8]) {
    let mut all = vec![0xff; output.bytes()];
    all[..bytes.len()].copy_from_slice(bytes);
    output.write(&all);
}

/// At least one expert each: with none, the scores would select the first.
pub fn routing(
    rng: &mut ChaCha8Rng,
    num_tokens: usize,
    num_experts: usize,
    density: f64,
) -> ExpertMask {
    let mut mask = random_mask(rng, num_tokens, num_experts, density);
    (0..num_tokens).for_each(|token| mask.insert(token, token % num_experts));
    mask
}

pub fn forced(path: Path) -> PlanOptions {
    PlanOptions { path: Some(path), ..PlanOptions::default() }
}

pub fn reference_of(path: Path, layer: &ffn::MoeFfn, x: &Tensor, mask: &ExpertMask) -> Vec<f64> {
    match path {
        Path::DenseExact => reference::dense_ffn(layer.neurons(), &x.to_f64()),
        _ => expected(layer, x, mask, None),
    }
}

const SPARSE: [Path; 4] = [Path::FewFused, Path::Few, Path::ExpertMajor, Path::TokenTile];

fn sparse_paths(gpu: &Gpu) {
    every_shape(gpu, &SPARSE);
}

pub fn every_shape(gpu: &Gpu, paths: &[Path]) {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for shape in [PLAIN, GLU] {
            cases.extend(paths.iter().map(|&path| (dtype, shape, path)));
        }
    }
    let rng = &mut gpu.rng();
    thin(cases, 5).into_iter().for_each(|(dtype, shape, path)| {
        let layer = random_layer(rng, shape, dtype);
        one_path(gpu, rng, &layer, shape, path);
    });
}

/// With more neurons to expect, more blocks have outputs in the workspace.
fn for_a_layer_of_another_density(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let shape = Shape { d_model: 768, num_experts: 96, expert_width: 8, ..PLAIN };
    let layer = biased_layer(rng, shape, DType::BF16, Activation::GeluTanh, true);
    let [sparse, other] = [0.05, 1.0].map(|density| layer.clone().with_calibrated_density(density));
    let fused = can(gpu, Path::FewFused, DType::BF16);
    let path = if fused { Path::FewFused } else { Path::Few };
    let first = Case::new(gpu, &sparse, shape, 1, forced(path));
    let on_device = Arc::new(MoeFfn::new(&gpu.device, &other).expect("memory"));
    let plan = first.plan.with_ffn(&on_device).expect("a layer like the plan's");
    assert!(!fused || plan.workspace_bytes() > first.plan.workspace_bytes());
    let scratch = Output::new(gpu, plan.workspace_bytes());
    let mut case = Case { plan, scratch, ..first };
    let x = tokens(rng, 1, shape.d_model, DType::BF16);
    let mask = random_mask(rng, 1, shape.num_experts, 0.9);
    case.write(&x, &mask);
    case.y.poison();
    case.launch(gpu.raw_stream(), 1, false).expect("a run");
    let error = relative_error(&case.read(1), &reference_of(path, &other, &x, &mask));
    assert!(error <= tolerance(&other, DType::BF16), "{error:.3e}");
}

pub fn one_path(gpu: &Gpu, rng: &mut ChaCha8Rng, layer: &ffn::MoeFfn, shape: Shape, path: Path) {
    let dtype = layer.neurons().dtype();
    let mut max_tokens = if is_small() { 19 } else { 130 };
    if path == Path::FewFused {
        max_tokens = 32;
    }
    if !can(gpu, path, dtype) {
        return refuses(gpu, layer, path, max_tokens);
    }
    if path == Path::FewFused {
        refuses(gpu, layer, path, 33);
    }
    let mut case = Case::new(gpu, layer, shape, max_tokens, forced(path));
    for num_tokens in sizes(&[0, 1, 2, 7, 19, 32, 33, 130], 19) {
        if num_tokens > max_tokens {
            continue;
        }
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = routing(rng, num_tokens, shape.num_experts, 0.3);
        case.write(&x, &mask);
        case.y.poison();
        case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
        let eager = case.read(num_tokens);
        let error = relative_error(&eager, &reference_of(path, layer, &x, &mask));
        let bar = bar_of(path, layer, dtype);
        assert!(error <= bar, "{} {dtype} T {num_tokens}: {error:.3e}", path.name());
        if num_tokens == 0 {
            continue;
        }
        case.y.poison();
        let graph = gpu.capture(|stream| case.launch(stream, num_tokens, false));
        graph.expect("kernels").launch().expect("a launch");
        assert!(case.read(num_tokens) == eager, "{}: a graph differs", path.name());
    }
}

/// Dense products under masks may round once more: the pre-activations.
fn bar_of(path: Path, layer: &ffn::MoeFfn, dtype: DType) -> f64 {
    tolerance(layer, dtype) * if path == Path::DenseMasked { 2.0 } else { 1.0 }
}

/// Two paths are for 16 bits on Hopper.
fn can(gpu: &Gpu, path: Path, dtype: DType) -> bool {
    !matches!(path, Path::FewFused | Path::TokenTile)
        || dtype != DType::F32 && gpu.device.properties().compute_capability == (9, 0)
}

/// A path that cannot do so many tokens, or this type.
fn refuses(gpu: &Gpu, layer: &ffn::MoeFfn, path: Path, max_tokens: usize) {
    let on_device = Arc::new(MoeFfn::new(&gpu.device, layer).expect("memory"));
    let error = on_device.plan(max_tokens, forced(path)).err().expect("a refusal");
    let message = error.to_string();
    let words = ["plan", path.name(), "f16 and bf16 on Hopper"];
    words.iter().for_each(|word| assert!(message.contains(word), "{message:?} lacks {word:?}"));
}

/// A router of two layers runs, and others decide.
fn imposed_scores(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    // Routers of 16, 32 and 64 tokens a block. With low densities most tokens run one expert alone, with the highest all run
    // under masks.
    for (dtype, num_tokens, d_model, num_experts, expert_width, density) in [
        (DType::F16, 99, 64, 70, 6, 0.3),
        (DType::BF16, 130, 64, 64, 64, 0.01),
        (DType::BF16, 200, 64, 256, 8, 0.1),
        (DType::F16, 300, 64, 33, 16, 0.1),
        (DType::BF16, 700, 392, 48, 24, 1.0),
        (DType::BF16, 1030, 64, 70, 6, 0.3),
        (DType::F16, 3000, 64, 24, 128, 0.03),
        (DType::BF16, 4230, 64, 70, 6, 0.3),
        (DType::BF16, 8192, 64, 48, 32, 0.02),
    ] {
        if is_small() && num_tokens > 300 {
            continue;
        }
        let shared = if num_experts == 70 || density == 1.0 { 8 } else { 0 };
        let shape = Shape { d_model, num_experts, expert_width, shared, ..PLAIN };
        let layer = random_layer(rng, shape, dtype);
        let layer = with_router(rng, &layer, 40, 1, layer.selection());
        let path = Path::ExpertMajor;
        let mut case = Case::new(gpu, &layer, shape, num_tokens, forced(path));
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = routing(rng, num_tokens, shape.num_experts, density);
        case.write(&x, &mask);
        let valid = num_tokens - 3;
        case.valid.write(&[valid as u32]);
        case.y.poison();
        case.launch(gpu.raw_stream(), num_tokens, true).expect("a run");
        let (y, end) = (case.read(num_tokens), valid * shape.d_model);
        assert!(y[end..].iter().all(|&v| v == 0.0), "T {num_tokens}: padding is not zero");
        let all = reference_of(path, &layer, &x, &mask);
        let error = relative_error(&y[..end], &all[..end]);
        assert!(error <= tolerance(&layer, dtype), "{dtype} T {num_tokens}: {error:.3e}");
    }
}

/// More tokens than go through the layer together, and a device-side number of valid ones that ends
/// in each of the turns.
fn chunks_and_padding(gpu: &Gpu) {
    let f32 = [Path::ExpertMajor, Path::DenseExact, Path::DenseMasked].map(|p| (p, DType::F32));
    let bf16 = [Path::ExpertMajor, Path::TokenTile].map(|path| (path, DType::BF16));
    chunks(gpu, &[f32.as_slice(), &bf16].concat());
}

pub fn chunks(gpu: &Gpu, cases: &[(Path, DType)]) {
    let rng = &mut gpu.rng();
    let odd =
        Shape { d_model: 64, num_experts: 5, expert_width: 6, shared: 3, rank: 0, glu: false };
    let even = Shape { expert_width: 16, shared: 8, ..odd };
    // Two whole turns, and one of so many tokens that a first product goes under masks.
    let num_tokens = if is_small() { 40 } else { 17_000 };
    for &(path, dtype) in cases {
        if !can(gpu, path, dtype) {
            continue;
        }
        let shape = if dtype == DType::F32 { odd } else { even };
        let layer = random_layer(rng, shape, dtype);
        let layer = match dtype {
            DType::F32 => layer,
            _ => with_router(rng, &layer, 40, 1, layer.selection()),
        };
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = routing(rng, num_tokens, shape.num_experts, 0.3);
        let mut case = Case::new(gpu, &layer, shape, num_tokens, forced(path));
        case.write(&x, &mask);
        let all = reference_of(path, &layer, &x, &mask);
        for valid in [0, 1, num_tokens / 3, num_tokens - 1, num_tokens] {
            case.valid.write(&[valid as u32]);
            case.y.poison();
            case.launch(gpu.raw_stream(), num_tokens, true).expect("a run");
            let y = case.read(num_tokens);
            let end = valid * shape.d_model;
            assert!(y[end..].iter().all(|&v| v == 0.0), "{}: padding is not zero", path.name());
            let error = relative_error(&y[..end], &all[..end]);
            assert!(error <= 2.0 * tolerance(&layer, dtype), "{}: {error:.3e}", path.name());
        }
    }
}

fn gates(gpu: &Gpu) {
    every_gate(gpu, &[Path::Few, Path::ExpertMajor, Path::TokenTile]);
}

/// Top-k, where a token's experts are as many as its lists have room for, and for k = 1 with the score as the gate.
fn top_k(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for (dtype, k) in [(DType::F16, 5), (DType::BF16, 1)] {
        let shape = Shape { expert_width: 32, shared: 0, ..PLAIN };
        let layer = random_layer(rng, shape, dtype);
        let layer = with_router(rng, &layer, 72, 1, Selection::top_k(k)).with_gate(Gate::Score);
        let num_tokens = if is_small() { 130 } else { 600 };
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mut mask = ExpertMask::none(num_tokens, shape.num_experts);
        for token in 0..num_tokens {
            (0..k).for_each(|i| mask.insert(token, (token * token + 7 * i) % shape.num_experts));
        }
        let mut case = Case::new(gpu, &layer, shape, num_tokens, forced(Path::ExpertMajor));
        let scores = case.write(&x, &mask);
        case.y.poison();
        case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
        let error =
            relative_error(&case.read(num_tokens), &expected(&layer, &x, &mask, Some(&scores)));
        assert!(error <= tolerance(&layer, dtype), "{dtype} top-{k}: {error:.3e}");
    }
}

/// A router of two layers gives scores, and others decide and are the gates, or become them.
pub fn every_gate(gpu: &Gpu, paths: &[Path]) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for gate in [Gate::Score, Gate::Softmax, Gate::Renormalised] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let paths = paths.iter().filter(|path| can(gpu, **path, dtype));
            cases.extend(paths.map(|&path| (gate, dtype, path)));
        }
    }
    for (gate, dtype, path) in thin(cases, 5) {
        let shape = Shape { expert_width: 32, ..PLAIN };
        let layer = random_layer(rng, shape, dtype);
        let layer = with_router(rng, &layer, 72, 1, layer.selection()).with_gate(gate);
        let num_tokens = if is_small() { 19 } else { 600 };
        let x = tokens(rng, num_tokens, shape.d_model, dtype);
        let mask = routing(rng, num_tokens, shape.num_experts, 0.3);
        let mut case = Case::new(gpu, &layer, shape, num_tokens, forced(path));
        let scores = case.write(&x, &mask);
        case.y.poison();
        case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
        let error =
            relative_error(&case.read(num_tokens), &expected(&layer, &x, &mask, Some(&scores)));
        let bar = bar_of(path, &layer, dtype);
        assert!(error <= bar, "{} {dtype} {gate:?}: {error:.3e}", path.name());
    }
}

fn statistics(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let layer = random_layer(rng, PLAIN, DType::F32);
    let options = PlanOptions { statistics: true, ..forced(Path::Few) };
    let mut case = Case::new(gpu, &layer, PLAIN, 20, options);
    let mask = routing(rng, 20, PLAIN.num_experts, 0.3);
    case.write(&tokens(rng, 20, PLAIN.d_model, DType::F32), &mask);
    case.valid.write(&[13u32]);
    for _ in 0..2 {
        case.launch(gpu.raw_stream(), 20, true).expect("a run");
    }
    case.read(20);
    let counts = case.plan.statistics().expect("a copy").expect("it was asked for");
    assert_eq!((counts.k_histogram, counts.expert_counts), counts_of(&mask, 13, 2));
}

/// What so many runs of the first tokens are counted as: how many select k experts, and how many each expert.
pub fn counts_of(mask: &ExpertMask, num_tokens: usize, runs: u64) -> (Vec<u64>, Vec<u64>) {
    let mut k_histogram = vec![0; mask.num_experts() + 1];
    let mut expert_counts = vec![0; mask.num_experts()];
    for token in 0..num_tokens {
        k_histogram[mask.count(token)] += runs;
        mask.experts(token).for_each(|expert| expert_counts[expert] += runs);
    }
    (k_histogram, expert_counts)
}

fn replays_with_other_inputs(gpu: &Gpu) {
    let few = [1, 8, 32].map(|num_tokens| (Path::FewFused, num_tokens));
    replays(gpu, &few);
    replays(gpu, &[(Path::Few, 5), (Path::ExpertMajor, 40)]);
    replays(gpu, &[(Path::TokenTile, 300)]);
}

pub fn replays(gpu: &Gpu, cases: &[(Path, usize)]) {
    let rng = &mut gpu.rng();
    for &(path, num_tokens) in cases.iter().filter(|(path, _)| can(gpu, *path, DType::BF16)) {
        let layer = random_layer(rng, PLAIN, DType::BF16);
        let mut case = Case::new(gpu, &layer, PLAIN, num_tokens, forced(path));
        let graph = gpu.capture(|stream| case.launch(stream, num_tokens, false)).expect("kernels");
        for _ in 0..if is_small() { 3 } else { 1000 } {
            let x = tokens(rng, num_tokens, PLAIN.d_model, DType::BF16);
            case.write(&x, &routing(rng, num_tokens, PLAIN.num_experts, 0.2));
            case.y.poison();
            graph.launch().expect("a launch");
            let replayed = case.read(num_tokens);
            case.y.poison();
            case.launch(gpu.raw_stream(), num_tokens, false).expect("a run");
            assert!(case.read(num_tokens) == replayed, "{}: a replay differs", path.name());
        }
    }
}

/// How many pairs there are is known on the device alone, and some kernels look before the one ahead of them has ended: layers
/// behind each other, one of which has few pairs where the next has nearly all.
fn few_and_many_pairs_in_turn(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let plain =
        Shape { d_model: 768, num_experts: 24, expert_width: 128, shared: 0, rank: 0, glu: false };
    let narrow = Shape { num_experts: 48, expert_width: 64, ..plain };
    let glu = Shape { num_experts: 12, glu: true, ..plain };
    let mut cases = Vec::new();
    for shape in [plain, narrow, glu] {
        cases.extend([0.05, 0.3].map(|density| (shape, density)));
    }
    let num_tokens = if is_small() { 40 } else { 2048 };
    for (shape, density) in thin(cases, 5) {
        let layer = random_layer(rng, shape, DType::BF16);
        let options = PlanOptions { density: Some(density), ..forced(Path::ExpertMajor) };
        let [mut few, mut many] =
            [(); 2].map(|()| Case::new(gpu, &layer, shape, num_tokens, options));
        let x = tokens(rng, num_tokens, shape.d_model, DType::BF16);
        few.write(&x, &routing(rng, num_tokens, shape.num_experts, 0.05));
        many.write(&x, &routing(rng, num_tokens, shape.num_experts, 0.95));
        in_a_row(gpu, &format!("{shape:?} {density}"), &few, &many, num_tokens);
    }
}

/// Two layers by turns, four times, as one graph: what they give one by one. Of x and y either case has a buffer, which go
/// round; the scores are those of the one or the other in turn.
pub fn in_a_row(gpu: &Gpu, name: &str, before: &Case, case: &Case, num_tokens: usize) {
    let run = |case: &Case, stream, from: &Output, to: &Output, scores: &Output| {
        let view = |buffer: &Output| {
            let of = [num_tokens, case.shape.d_model];
            View::matrix(buffer.address(), Format::Float(case.dtype), of)
        };
        let of = [num_tokens, case.shape.num_experts];
        let scores = Some(View::matrix(scores.address(), Format::F32, of));
        let inputs = FfnInputs { x: view(from), scores, ..case.inputs(num_tokens, false) };
        let bytes = case.plan.workspace_bytes();
        let workspace = Workspace { address: case.scratch.address(), bytes };
        unsafe { case.plan.run(stream, view(to), &inputs, workspace) }
    };
    let step = |stream, turn: usize, wait: &dyn Fn()| {
        let scores = [&before.scores, &case.scores];
        let from = if turn == 0 { &before.x } else { &case.y };
        run(before, stream, from, &before.y, scores[turn % 2])?;
        wait();
        run(case, stream, &before.y, &case.y, scores[(turn + 1) % 2])?;
        wait();
        Ok(())
    };
    let wait = || gpu.device.cudarc_context().synchronize().expect("no failure");
    (0..4).try_for_each(|turn| step(gpu.raw_stream(), turn, &wait)).expect("runs");
    let one_by_one = case.read(num_tokens);
    let graph = gpu.capture(|stream| (0..4).try_for_each(|turn| step(stream, turn, &|| ())));
    let graph = graph.expect("kernels");
    for _ in 0..3 {
        graph.launch().expect("a launch");
        assert!(case.read(num_tokens) == one_by_one, "{name}: a graph differs");
    }
}

fn memory_stays_flat(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let layer = random_layer(rng, PLAIN, DType::F16);
    for path in Path::ALL.into_iter().filter(|path| can(gpu, *path, DType::F16)) {
        let mut case = Case::new(gpu, &layer, PLAIN, 8, forced(path));
        let mask = routing(rng, 8, PLAIN.num_experts, 0.2);
        case.write(&tokens(rng, 8, PLAIN.d_model, DType::F16), &mask);
        let free = || {
            gpu.stream.synchronize().expect("no failure");
            moefy::cuda::interop::cudarc::driver::result::mem_get_info().expect("a number").0
        };
        let launch = || case.launch(gpu.raw_stream(), 8, false).expect("a run");
        launch();
        let before = free();
        (0..if is_small() { 10 } else { 10_000 }).for_each(|_| launch());
        assert_eq!(free(), before, "{}", path.name());
    }
}

fn bad_input(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let layer = random_layer(rng, PLAIN, DType::F16);
    let case = Case::new(gpu, &layer, PLAIN, 8, forced(Path::Few));
    let good = case.inputs(8, false);
    let y = View::matrix(case.y.address(), Format::Float(DType::F16), [8, PLAIN.d_model]);
    let bytes = case.plan.workspace_bytes();
    let workspace = Workspace { address: case.scratch.address(), bytes };
    let refused = |inputs: FfnInputs, y, workspace, words: &[&str]| {
        let result = unsafe { case.plan.run(gpu.raw_stream(), y, &inputs, workspace) };
        let message = result.expect_err("it should be refused").to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{message:?} lacks {word:?}"));
    };
    let x = |x: View| FfnInputs { x, ..good };
    let many = View { shape: [9, PLAIN.d_model], ..good.x };
    refused(x(many), y, workspace, &["num_tokens", "8", "9"]);
    let null = View { address: 0, ..good.x };
    refused(x(null), y, workspace, &["moe_ffn", "x", "null"]);
    let odd = View { address: good.x.address + 2, ..good.x };
    refused(x(odd), y, workspace, &["x", "aligned to 16"]);
    let float = View { format: Format::F32, ..good.x };
    refused(x(float), y, workspace, &["x", "f16", "f32"]);
    let narrow = View { shape: [8, 380], row_stride: 380, ..y };
    refused(good, narrow, workspace, &["y", "[8, 384]", "[8, 380]"]);
    let small = Workspace { bytes: bytes - 1, ..workspace };
    refused(good, y, small, &["workspace", &bytes.to_string()]);
    assert!(case.y.read::<u8>().iter().all(|&byte| byte == 0xff), "something was launched");
}
