//! Scores of a router are close to those of the reference in f64 on the same rounded weights, and the
//! masks are exactly those of the scores.

use moefy::abi::MOEFY_STATUS_ROW_WITHOUT_SCORE;
use moefy::cuda::{
    DeviceRouter, Format, RouterSelectOutputs, SelectOutputs, View, Workspace, router_select,
    router_select_is_one_launch, router_select_workspace_bytes,
};
use moefy::ffn::{MlpKind, Router, Selection, SelectionRule};
use moefy::{DType, Tensor, reference};
use rand_chacha::ChaCha8Rng;

use crate::harness::{Gpu, Output, is_small, relative_error, sizes, thin, uniform};

pub fn tests() -> crate::Tests {
    vec![
        ("router_select::kinds_and_types", kinds_and_types),
        ("router_select::few_tokens", few_tokens),
        ("router_select::many_tokens", many_tokens),
        ("router_select::one_launch", one_launch),
        ("router_select::many_tokens_of_a_block", many_tokens_of_a_block),
        ("router_select::top_k_with_ties", top_k_with_ties),
        ("router_select::one_launch_of_many_outputs", one_launch_of_many_outputs),
        ("router_select::many_experts", many_experts),
        ("router_select::padding_and_rows_apart", padding_and_rows_apart),
        ("router_select::tokens_without_score", tokens_without_score),
    ]
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every kind of router, its weights rounded to `dtype`.
pub fn routers(
    rng: &mut ChaCha8Rng,
    [num_experts, d_model, hidden]: [usize; 3],
    dtype: DType,
) -> Vec<Router> {
    let mut matrix = |rows, cols| {
        Tensor::matrix(uniform(rng, rows * cols), [rows, cols]).unwrap().to_dtype(dtype)
    };
    vec![
        Router::Linear { w: matrix(num_experts, d_model) },
        Router::Mlp {
            kind: MlpKind::D2dMoe,
            w1: matrix(hidden, d_model),
            w2: matrix(num_experts, hidden),
        },
        Router::Mlp {
            kind: MlpKind::Moefication,
            w1: matrix(hidden, d_model),
            w2: matrix(num_experts, hidden),
        },
        Router::Centroid { centroids: matrix(num_experts, d_model) },
    ]
}

#[derive(Clone, Copy, Debug)]
struct Case {
    num_tokens: usize,
    valid: usize,
    d_model: usize,
    /// Elements from one token to the next.
    x_stride: usize,
    dtype: DType,
}

impl Case {
    fn new(num_tokens: usize, d_model: usize, dtype: DType) -> Self {
        Self { num_tokens, valid: num_tokens, d_model, x_stride: d_model, dtype }
    }

    fn check(&self, gpu: &Gpu, rng: &mut ChaCha8Rng, router: &Router, selection: &Selection) {
        let Self { num_tokens, valid, d_model, x_stride, dtype } = *self;
        let x =
            Tensor::matrix(uniform(rng, num_tokens * x_stride), [num_tokens, x_stride]).unwrap();
        let x = x.to_dtype(dtype);
        let input = gpu.input(x.as_bytes());
        let mut x_view = View::matrix(input.address(), Format::Float(dtype), [num_tokens, d_model]);
        x_view.row_stride = x_stride;
        let weights = DeviceRouter::new(&gpu.device, router, dtype).unwrap();
        let weights = weights.view();
        let num_experts = weights.num_experts();
        let row_words = num_experts.div_ceil(32);
        let bytes = router_select_workspace_bytes(num_tokens, &weights);
        let memory = Output::new(gpu, bytes);
        let workspace = Workspace { address: memory.address(), bytes };
        let num_valid = gpu.input(&[valid as u32]);
        let status = gpu.input(&[0u32]);
        let mut mask = Output::words(gpu, num_tokens * row_words);
        let mut counts = Output::words(gpu, num_tokens);
        let mut scores = Output::words(gpu, num_tokens * num_experts);
        let shape = [num_tokens, num_experts];
        let outputs = RouterSelectOutputs {
            selected: SelectOutputs {
                mask: View::matrix(mask.address(), Format::Word, [num_tokens, row_words]),
                counts: Some(counts.view()),
                status: Some(View::words(status.address(), 1)),
            },
            scores: Some(View::matrix(scores.address(), Format::F32, shape)),
        };
        let num_valid = Some(View::words(num_valid.address(), 1));
        let launch = |outputs: &RouterSelectOutputs, stream| unsafe {
            let device = &gpu.device;
            router_select(
                device, stream, outputs, x_view, num_valid, &weights, selection, workspace,
            )
        };
        gpu.run(&mut [&mut mask, &mut counts, &mut scores], |stream| launch(&outputs, stream));

        let case = format!(
            "{:?} {dtype}, T {num_tokens} ({valid} valid), d {d_model}, hidden {}, E {num_experts}",
            std::mem::discriminant(router),
            weights.hidden()
        );
        let got = scores.read::<f32>();
        let (valid_scores, padding) = got.split_at(valid * num_experts);
        assert!(padding.iter().all(|&score| score == 0.0), "scores of padding: {case}");
        let tokens: Vec<f64> = x
            .to_f64()
            .chunks_exact(x_stride)
            .take(valid)
            .flat_map(|row| row[..d_model].to_vec())
            .collect();
        let expected = reference::router_scores(router, &tokens, d_model);
        let bound = 1e-6 * (d_model.max(weights.hidden()).max(64) as f64 / 64.0).sqrt();
        if valid > 0 {
            let error = relative_error(valid_scores, &expected);
            assert!(error <= bound, "error {error:.2e} > {bound:.2e}: {case}");
        }

        let selected = reference::select(selection, valid_scores, num_experts);
        let mut words = selected.mask.words().to_vec();
        words.resize(num_tokens * row_words, 0);
        assert_eq!(mask.read::<u32>(), words, "{selection:?} {case}");
        let ks: Vec<u32> = (0..valid).map(|t| selected.mask.count(t) as u32).collect();
        assert_eq!(counts.read::<u32>()[..valid], ks, "{case}");
        assert_eq!(status.read::<u32>().unwrap(), [0], "{case}");
        if let SelectionRule::DynamicK { rel_threshold } = selection.rule
            && selection.max_experts.is_none()
        {
            assert_outside_band(&expected, &selected.mask, f64::from(rel_threshold), &case);
        }

        // Without the scores and the counts, the masks are the same.
        let selected = SelectOutputs { counts: None, status: None, ..outputs.selected };
        let bare = RouterSelectOutputs { selected, scores: None };
        gpu.run(&mut [&mut mask], |stream| launch(&bare, stream));
        assert_eq!(mask.read::<u32>(), words, "{case}");
        memory.check_guards();
    }
}

/// Where exact scores are further than 1e-4 of the row's largest from the threshold, the expert is
/// in exactly when its score is above.
pub fn assert_outside_band(
    scores: &[f64],
    mask: &moefy::ffn::ExpertMask,
    threshold: f64,
    case: &str,
) {
    for (token, row) in scores.chunks_exact(mask.num_experts()).enumerate() {
        let max = row.iter().copied().fold(0.0, f64::max);
        for (expert, &score) in row.iter().enumerate() {
            if (score - threshold * max).abs() > 1e-4 * max {
                let expected = score > threshold * max;
                assert_eq!(mask.contains(token, expert), expected, "{token}, {expert}: {case}");
            }
        }
    }
}

fn kinds_and_types(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for (num_tokens, shape) in [(7, [48, 384, 128]), (1030, [112, 96, 64]), (19, [129, 72, 40])]
        {
            let of_router = |router| (router, Case::new(num_tokens, shape[1], dtype));
            cases.extend(routers(rng, shape, dtype).into_iter().map(of_router));
        }
    }
    for (router, case) in thin(cases, 5) {
        case.check(gpu, rng, &router, &Selection::dynamic_k(0.4));
    }
}

fn few_tokens(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for (index, num_tokens) in [0, 1, 2, 7, 19, 64, 99, 512, 989].into_iter().enumerate() {
        for d_model in sizes(&[64, 768, 1000, 4096, 33], 100) {
            if num_tokens * d_model > 500_000 || is_small() && num_tokens > 99 {
                continue;
            }
            // Widths that are no multiple of 8 have no aligned rows.
            let shape = [[12, d_model, 128], [448, d_model, 100], [1, d_model, 7]][index % 3];
            for router in routers(rng, shape, DType::BF16).iter().take(2) {
                let case = Case::new(num_tokens, d_model, DType::BF16);
                case.check(gpu, rng, router, &Selection::cumulative_share(0.6));
            }
        }
    }
}

fn many_tokens(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for num_tokens in sizes(&[1025, 2049, 4096], 1025) {
        for d_model in sizes(&[64, 384, 33], 64) {
            let dtype = DTYPES[d_model % 3];
            for router in routers(rng, [96, d_model, 100], dtype) {
                let case = Case::new(num_tokens, d_model, dtype);
                case.check(gpu, rng, &router, &Selection::top_k(11));
            }
        }
    }
}

/// Every rule, with and without a cap.
fn selections(num_experts: usize) -> Vec<Selection> {
    let k = num_experts.div_ceil(5);
    let rules = [
        Selection::dynamic_k(0.4),
        Selection::cumulative_share(0.6),
        Selection::top_k(k),
        Selection::dynamic_k(0.0),
        Selection::dynamic_k(1.0),
    ];
    let capped = rules[..2].iter().map(|&rule| Selection { max_experts: Some(k), ..rule });
    rules.iter().copied().chain(capped).collect()
}

/// Checks cases that one launch does, where the device is a Hopper, a rule for each router in turn.
fn check_one_launch(gpu: &Gpu, cases: &[([usize; 3], Case)]) {
    let rng = &mut gpu.rng();
    let is_hopper = gpu.device.properties().compute_capability == (9, 0);
    let mut turn = 0;
    for &(shape, case) in cases {
        let selections = selections(shape[0]);
        for router in routers(rng, shape, case.dtype) {
            let selection = &selections[turn % selections.len()];
            turn += 1;
            let view = DeviceRouter::new(&gpu.device, &router, case.dtype).unwrap();
            let (tokens, dtype) = (case.num_tokens, case.dtype);
            let view = view.view();
            let one = router_select_is_one_launch(&gpu.device, tokens, dtype, &view, selection);
            assert_eq!(one.unwrap(), is_hopper, "{shape:?} {case:?} {selection:?}");
            case.check(gpu, rng, &router, selection);
        }
    }
}

fn one_launch(gpu: &Gpu) {
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for (num_tokens, shape) in [
            (256, [24, 768, 128]),
            (257, [96, 4096, 128]),
            (261, [1, 8, 8]),
            (517, [33, 72, 40]),
            (1030, [448, 136, 104]),
            (2049, [112, 384, 128]),
            (4095, [64, 200, 64]),
            (4225, [65, 328, 128]),
            (4300, [129, 64, 120]),
        ] {
            cases.push((shape, Case::new(num_tokens, shape[1], dtype)));
        }
        let padded = Case { valid: 65, x_stride: 72, ..Case::new(1030, 64, dtype) };
        cases.extend([0, 65, 1029].map(|valid| ([48, 64, 32], Case { valid, ..padded })));
        cases.push((
            [130, 64, 72],
            Case { valid: 4299, x_stride: 80, ..Case::new(4300, 64, dtype) },
        ));
    }
    cases.retain(|(_, case)| !is_small() || case.num_tokens < 600);
    check_one_launch(gpu, &thin(cases, 3));
}

/// So many that a block takes 32 and 64 of them, where blocks take them through a whole router.
fn many_tokens_of_a_block(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let shape = if is_small() { [5, 16, 8] } else { [96, 768, 128] };
    let mut rules = selections(shape[0]).into_iter().cycle();
    for dtype in [DType::F16, DType::BF16] {
        for num_tokens in [2113, 4300] {
            let case = Case { valid: num_tokens - 70, ..Case::new(num_tokens, shape[1], dtype) };
            let router = routers(rng, shape, dtype).swap_remove(1);
            case.check(gpu, rng, &router, &rules.next().expect("a cycle"));
        }
    }
}

/// Experts whose scores are equal two by two, of which top-k takes the first one where one is left to take.
fn top_k_with_ties(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for dtype in [DType::F16, DType::BF16] {
        for (num_tokens, d_model) in [(300, 64), (2200, 64), (300, 1032)] {
            if is_small() && (num_tokens, d_model) != (300, 64) {
                continue;
            }
            let half = 24;
            let router = routers(rng, [half, d_model, 32], dtype).swap_remove(1);
            let Router::Mlp { kind, w1, w2 } = router else { unreachable!("the second one") };
            let values = w2.to_f32();
            let twice = values.chunks(32).flat_map(|row| row.iter().chain(row).copied()).collect();
            let w2 = Tensor::matrix(twice, [2 * half, 32]).unwrap().to_dtype(dtype);
            let router = Router::Mlp { kind, w1, w2 };
            for k in [1, 7, 8, 47, 48] {
                let case = Case { valid: num_tokens - 3, ..Case::new(num_tokens, d_model, dtype) };
                case.check(gpu, rng, &router, &Selection::top_k(k));
            }
        }
    }
}

/// More than 128 hidden units, or experts of a router with one layer.
fn one_launch_of_many_outputs(gpu: &Gpu) {
    let mut cases = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for (num_tokens, shape) in [
            (259, [200, 1000, 256]),
            (333, [512, 512, 200]),
            (1999, [511, 72, 136]),
            (3001, [300, 128, 256]),
            (8200, [260, 64, 248]),
        ] {
            cases.push((shape, Case::new(num_tokens, shape[1], dtype)));
        }
        cases.push(([257, 64, 160], Case { valid: 70, x_stride: 96, ..Case::new(333, 64, dtype) }));
    }
    cases.retain(|(_, case)| !is_small() || case.num_tokens < 400);
    check_one_launch(gpu, &thin(cases, 3));
}

fn many_experts(gpu: &Gpu) {
    if is_small() {
        return;
    }
    let rng = &mut gpu.rng();
    for num_experts in [513, 4096] {
        for router in routers(rng, [num_experts, 64, 32], DType::F16) {
            let case = Case::new(3, 64, DType::F16);
            case.check(gpu, rng, &router, &Selection::dynamic_k(0.7));
        }
    }
    // A token and its hidden layer that fit no block.
    for router in routers(rng, [16, 24576, 8], DType::F16) {
        Case::new(2, 24576, DType::F16).check(gpu, rng, &router, &Selection::top_k(2));
    }
}

fn padding_and_rows_apart(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for (num_tokens, valid) in [(7, 0), (7, 5), (1030, 0), (1030, 65)] {
        let case = Case { valid, x_stride: 72, ..Case::new(num_tokens, 64, DType::F16) };
        let of_router = |router| (router, case);
        cases.extend(routers(rng, [48, 64, 32], DType::F16).into_iter().map(of_router));
    }
    for (router, case) in thin(cases, 5) {
        case.check(gpu, rng, &router, &Selection::dynamic_k(0.5));
    }
}

/// A token of NaN or infinity has no finite score from a linear router: it selects nothing, and the status
/// word says so. Its neighbours are as they were.
fn tokens_without_score(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let (d_model, num_experts) = (64, 40);
    let device = &gpu.device;
    for (num_tokens, dtype) in [(5, DType::F32), (1030, DType::F32), (1030, DType::BF16)] {
        let router = &routers(rng, [num_experts, d_model, 32], dtype)[0];
        let mut x = uniform(rng, num_tokens * d_model);
        x[d_model] = f32::NAN;
        x[3 * d_model + 7] = f32::INFINITY;
        let x = Tensor::vector(x).to_dtype(dtype);
        let weights = DeviceRouter::new(device, router, dtype).unwrap();
        let input = gpu.input(x.as_bytes());
        let input = View::matrix(input.address(), Format::Float(dtype), [num_tokens, d_model]);
        let bytes = router_select_workspace_bytes(num_tokens, &weights.view());
        let memory = Output::new(gpu, bytes);
        let status = gpu.input(&[0u32]);
        let (mask, scores) =
            (Output::words(gpu, num_tokens * 2), Output::words(gpu, num_tokens * num_experts));
        let outputs = RouterSelectOutputs {
            selected: SelectOutputs {
                mask: View::matrix(mask.address(), Format::Word, [num_tokens, 2]),
                counts: None,
                status: Some(View::words(status.address(), 1)),
            },
            scores: Some(View::matrix(scores.address(), Format::F32, [num_tokens, num_experts])),
        };
        let (stream, selection) = (gpu.raw_stream(), Selection::dynamic_k(0.5));
        let workspace = Workspace { address: memory.address(), bytes };
        let router = weights.view();
        unsafe {
            router_select(device, stream, &outputs, input, None, &router, &selection, workspace)
                .expect("arguments that fit");
        }
        let selected = reference::select(&selection, &scores.read::<f32>(), num_experts);
        assert_eq!(selected.rows_without_score, 2);
        assert_eq!(mask.read::<u32>(), selected.mask.words());
        assert_eq!(status.read::<u32>().unwrap(), [MOEFY_STATUS_ROW_WITHOUT_SCORE]);
    }
}
