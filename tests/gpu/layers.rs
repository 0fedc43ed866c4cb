//! Whole layers on every sparse path: real sizes, routing that is anything but even, and rows that
//! select nothing.

use std::sync::Arc;

use moefy::abi::MOEFY_STATUS_ROW_WITHOUT_SCORE;
use moefy::cuda::{Buffer, FfnInputs, Format, MoeFfn, Path, PlanOptions, View, Workspace};
use moefy::ffn::{self, ExpertMask};
use moefy::{DType, Tensor, TensorRef, reference};
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::harness::{Gpu, Output, is_small, random_mask, relative_error};
use crate::random_layers::{Shape, random_layer, tokens, tolerance};

pub fn tests() -> crate::Tests {
    vec![
        ("layers::real_sizes", real_sizes),
        ("layers::uneven_routing", uneven_routing),
        ("layers::rows_without_score", rows_without_score),
    ]
}

fn sparse_paths() -> impl Iterator<Item = Path> {
    let dense = |path: &Path| matches!(path, Path::DenseExact | Path::DenseMasked);
    Path::ALL.into_iter().filter(move |path| !dense(path))
}

/// y and the status word, eager and from a graph. `None`: the path cannot do it and says so.
fn run(
    gpu: &Gpu,
    layer: &Arc<MoeFfn>,
    path: Path,
    x: &Tensor,
    scores: &[f32],
) -> Option<(Vec<f32>, u32)> {
    let options = PlanOptions { path: Some(path), ..PlanOptions::default() };
    let plan = match layer.plan(x.shape()[0], options) {
        Err(moefy::Error::Argument { .. }) => return None,
        plan => plan.expect("a plan"),
    };
    let (dtype, shape) = (x.dtype(), x.shape());
    let x = gpu.input(x.as_bytes());
    let scores = gpu.input(scores);
    let status = gpu.input(&[0u32]);
    // Sums read places of pairs that nobody wrote, and use none of them: initcheck would report that.
    let scratch = Buffer::zeroed(&gpu.device, plan.workspace_bytes()).expect("memory");
    let workspace = Workspace { address: scratch.address(), bytes: scratch.bytes() };
    let scores_shape = [shape[0], layer.neurons().num_experts];
    let inputs = FfnInputs {
        scores: Some(View::matrix(scores.address(), Format::F32, scores_shape)),
        status: Some(View::words(status.address(), 1)),
        ..FfnInputs::new(View::matrix(x.address(), Format::Float(dtype), shape))
    };
    let mut y = Output::new(gpu, x.bytes());
    let y_view = View::matrix(y.address(), Format::Float(dtype), shape);
    gpu.run(&mut [&mut y], |stream| unsafe { plan.run(stream, y_view, &inputs, workspace) });
    let bytes = y.read::<u8>();
    let y = TensorRef::from_bytes(dtype, &bytes, shape).expect("its size").to_owned();
    Some((y.to_f32().into_owned(), status.read().expect("a copy")[0]))
}

/// Dynamic-k with the layers' threshold turns them into the masks.
fn scores_of(mask: &ExpertMask) -> Vec<f32> {
    let pairs = (0..mask.num_tokens()).flat_map(|t| (0..mask.num_experts()).map(move |e| (t, e)));
    pairs.map(|(t, e)| if mask.contains(t, e) { 1.0 + e as f32 / 8192.0 } else { 0.0 }).collect()
}

/// Some rows of a matrix, or of masks.
fn rows_of<T: Copy>(values: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    rows.iter().flat_map(|row| values[row * width..(row + 1) * width].iter().copied()).collect()
}

const fn shape(d_model: usize, num_experts: usize, expert_width: usize, glu: bool) -> Shape {
    Shape { d_model, num_experts, expert_width, shared: 0, rank: 0, glu }
}

/// Shapes, each with numbers of tokens.
const REAL: [(Shape, DType, &[usize]); 9] = [
    (shape(4096, 112, 128, true), DType::BF16, &[1, 7, 64, 512, 4096]),
    (shape(4096, 448, 32, true), DType::F16, &[2, 8, 99, 989]),
    (shape(768, 48, 64, false), DType::F32, &[1, 19, 512, 4096]),
    (shape(768, 129, 24, false), DType::BF16, &[2, 7, 99, 4096]),
    (shape(1000, 112, 48, false), DType::F16, &[1, 64, 989]),
    (shape(1000, 129, 6, true), DType::BF16, &[7, 19, 512]),
    (shape(384, 12, 100, true), DType::F32, &[2, 64, 4096]),
    (shape(384, 448, 4, false), DType::F16, &[19, 99, 989]),
    (shape(64, 1, 128, false), DType::BF16, &[1, 512, 4096]),
];
/// The reference is too slow for all.
const CHECKED_TOKENS: usize = 5;

/// Tokens and routing, and the rows that are looked at.
struct Batch {
    x: Tensor,
    mask: ExpertMask,
    rows: Vec<usize>,
}

impl Batch {
    fn draw(rng: &mut ChaCha8Rng, layer: &ffn::MoeFfn, num_tokens: usize) -> Self {
        let density = *[0.02, 0.1, 0.4, 1.0].choose(rng).expect("some");
        let mut mask = random_mask(rng, num_tokens, layer.num_experts(), density);
        (0..num_tokens).for_each(|token| mask.insert(token, token % layer.num_experts()));
        let step = num_tokens.div_ceil(CHECKED_TOKENS - 1);
        let rows = (0..num_tokens).step_by(step).chain([num_tokens - 1]).collect();
        let x = tokens(rng, num_tokens, layer.d_model(), layer.neurons().dtype());
        Self { x, mask, rows }
    }
}

fn real_sizes(gpu: &Gpu) {
    if is_small() {
        return;
    }
    let draw = |&(shape, dtype, token_counts): &(Shape, DType, &[usize]), rng: &mut ChaCha8Rng| {
        let layer = random_layer(rng, shape, dtype);
        let batches = token_counts.iter().map(|&num_tokens| Batch::draw(rng, &layer, num_tokens));
        let batches: Vec<Batch> = batches.collect();
        // All at once: the reference widens the weights first.
        let (d_model, row_words) = (layer.d_model(), layer.num_experts().div_ceil(32));
        let x = batches.iter().flat_map(|b| rows_of(&b.x.to_f64(), d_model, &b.rows));
        let words = batches.iter().flat_map(|b| rows_of(b.mask.words(), row_words, &b.rows));
        let (x, words) = (x.collect::<Vec<f64>>(), words.collect::<Vec<u32>>());
        let mask = ExpertMask::from_words(x.len() / d_model, layer.num_experts(), words);
        let expected = reference::experts(&layer, &x, &mask.expect("rows of masks"), None);
        (layer, batches, expected)
    };
    gpu.check_all(&REAL, draw, |gpu, (layer, batches, expected)| {
        let on_device = Arc::new(MoeFfn::new(&gpu.device, &layer).expect("memory"));
        for path in sparse_paths() {
            let mut rest = &expected[..];
            for Batch { x, mask, rows } in &batches {
                let expected;
                (expected, rest) = rest.split_at(rows.len() * layer.d_model());
                let run = run(gpu, &on_device, path, x, &scores_of(mask));
                let Some((y, _)) = run else { continue };
                let error = relative_error(&rows_of(&y, layer.d_model(), rows), expected);
                let bar = tolerance(&layer, x.dtype());
                let (name, shape) = (path.name(), x.shape());
                assert!(error <= bar, "{name} {shape:?} {}: {error:.3e}", layer.num_experts());
                assert!(y.iter().all(|v| v.is_finite()), "{name} {shape:?}: not finite");
            }
        }
    });
}

const SMALL: Shape =
    Shape { d_model: 136, num_experts: 40, expert_width: 12, shared: 8, rank: 0, glu: false };

/// One expert gets everything; one token takes all; every token takes all, which is the dense layer.
fn uneven_routing(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let layer = random_layer(rng, SMALL, dtype);
        let on_device = Arc::new(MoeFfn::new(&gpu.device, &layer).expect("memory"));
        let num_experts = SMALL.num_experts;
        for num_tokens in if is_small() { vec![5] } else { vec![1, 7, 32, 99] } {
            let mut one = ExpertMask::none(num_tokens, num_experts);
            (0..num_tokens).for_each(|token| one.insert(token, num_experts - 1));
            let mut greedy = one.clone();
            (0..num_experts).for_each(|expert| greedy.insert(num_tokens / 2, expert));
            let all = ExpertMask::all(num_tokens, num_experts);
            let x = tokens(rng, num_tokens, SMALL.d_model, dtype);
            let dense = reference::dense_ffn(layer.neurons(), &x.to_f64());
            for mask in [one, greedy, all] {
                let expected = reference::experts(&layer, &x.to_f64(), &mask, None);
                for path in sparse_paths() {
                    let run = run(gpu, &on_device, path, &x, &scores_of(&mask));
                    let Some((y, status)) = run else { continue };
                    let (name, bar) = (path.name(), tolerance(&layer, dtype));
                    let error = relative_error(&y, &expected);
                    assert!(error <= bar, "{name} {dtype} T {num_tokens}: {error:.3e}");
                    assert_eq!(status, 0, "{name}");
                    if mask.num_pairs() == num_tokens * num_experts {
                        assert!(relative_error(&y, &dense) <= bar, "{name} is not the dense layer");
                    }
                }
            }
        }
    }
}

/// Without a finite score a token runs the shared neurons alone, and the status word says so.
fn rows_without_score(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in [DType::F32, DType::BF16] {
        let layer = random_layer(rng, SMALL, dtype);
        let on_device = Arc::new(MoeFfn::new(&gpu.device, &layer).expect("memory"));
        for num_tokens in [5, 40] {
            let num_experts = SMALL.num_experts;
            let mask = random_mask(rng, num_tokens, num_experts, 0.2);
            let mut scores = scores_of(&mask);
            let mut rows = scores.chunks_exact_mut(num_experts);
            for special in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
                rows.next().expect("tokens").fill(special);
            }
            // The largest, and a NaN that counts for nothing.
            rows.next().expect("tokens")[..2].copy_from_slice(&[f32::INFINITY, f32::NAN]);
            let selected = reference::select(&layer.selection(), &scores, num_experts);
            assert_eq!(selected.rows_without_score, 3);
            let x = tokens(rng, num_tokens, SMALL.d_model, dtype);
            let expected = reference::experts(&layer, &x.to_f64(), &selected.mask, None);
            for path in sparse_paths() {
                let Some((y, status)) = run(gpu, &on_device, path, &x, &scores) else { continue };
                let error = relative_error(&y, &expected);
                let (name, bar) = (path.name(), tolerance(&layer, dtype));
                assert!(error <= bar, "{name} {dtype} T {num_tokens}: {error:.3e}");
                assert_eq!(status, MOEFY_STATUS_ROW_WITHOUT_SCORE, "{name}");
            }
        }
    }
}
