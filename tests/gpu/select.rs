//! Masks from given scores are those of the reference, bit for bit.

use moefy::abi::MOEFY_STATUS_ROW_WITHOUT_SCORE;
use moefy::cuda::{Format, SelectOutputs, View, Workspace, select};
use moefy::ffn::Selection;
use moefy::reference;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::harness::{Gpu, Output, sizes, thin, uniform};

pub fn tests() -> crate::Tests {
    vec![
        ("select::every_rule_and_size", every_rule_and_size),
        ("select::many_tokens", many_tokens),
        ("select::ties_and_special_values", ties_and_special_values),
        ("select::rows_apart_and_padding", rows_apart_and_padding),
    ]
}

pub fn rules(num_experts: usize) -> Vec<Selection> {
    let mut rules = vec![
        Selection::dynamic_k(0.0),
        Selection::dynamic_k(0.1),
        Selection::dynamic_k(0.5),
        Selection::dynamic_k(1.0),
        Selection::cumulative_share(0.0),
        Selection::cumulative_share(0.3),
        Selection::cumulative_share(0.9),
        Selection::cumulative_share(1.0),
    ];
    let ks = [1, 2, num_experts / 3, num_experts];
    rules.extend(ks.map(|k| Selection::top_k(k.clamp(1, num_experts))));
    for cap in [1, 3, num_experts.div_ceil(2)] {
        let capped = |rule: Selection| Selection { max_experts: Some(cap), ..rule };
        rules.extend([Selection::dynamic_k(0.2), Selection::cumulative_share(0.6)].map(capped));
    }
    rules
}

/// Compares masks, counts and status of `valid` rows among `scores` \[T, E\].
fn check(gpu: &Gpu, scores: &[f32], num_experts: usize, selection: &Selection, valid: usize) {
    let num_tokens = scores.len() / num_experts;
    let row_words = num_experts.div_ceil(32);
    let input = gpu.input(scores);
    let num_valid = gpu.input(&[valid as u32]);
    let mut mask = Output::words(gpu, num_tokens * row_words);
    let mut counts = Output::words(gpu, num_tokens);
    let status = gpu.input(&[0u32]);
    let outputs = SelectOutputs {
        mask: View::matrix(mask.address(), Format::Word, [num_tokens, row_words]),
        counts: Some(counts.view()),
        status: Some(View::words(status.address(), 1)),
    };
    let view = View::matrix(input.address(), Format::F32, [num_tokens, num_experts]);
    let num_valid = View::words(num_valid.address(), 1);
    gpu.run(&mut [&mut mask, &mut counts], |stream| unsafe {
        select(&gpu.device, stream, &outputs, view, Some(num_valid), selection, Workspace::NONE)
    });

    let mut expected = reference::select(selection, &scores[..valid * num_experts], num_experts);
    let mut words = expected.mask.words().to_vec();
    words.resize(num_tokens * row_words, 0);
    let case = format!("{selection:?}, T {num_tokens}, E {num_experts}, {valid} valid");
    assert_eq!(mask.read::<u32>(), words, "{case}");
    let mut ks: Vec<u32> = (0..valid).map(|t| expected.mask.count(t) as u32).collect();
    ks.resize(num_tokens, 0);
    assert_eq!(counts.read::<u32>(), ks, "{case}");
    let bit = MOEFY_STATUS_ROW_WITHOUT_SCORE;
    expected.rows_without_score = expected.rows_without_score.min(1);
    assert_eq!(status.read::<u32>().unwrap(), [bit * expected.rows_without_score as u32], "{case}");
}

fn every_rule_and_size(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for num_experts in sizes(&[1, 2, 12, 31, 32, 33, 48, 112, 129, 448, 512, 513, 1000, 4096], 33) {
        let of_rule = |(index, rule)| (num_experts, [0, 1, 2, 7, 19, 64, 99][index % 7], rule);
        cases.extend(rules(num_experts).into_iter().enumerate().map(of_rule));
    }
    for (num_experts, num_tokens, selection) in thin(cases, 5) {
        let scores = uniform(rng, num_tokens * num_experts);
        let scores: Vec<f32> = scores.into_iter().map(f32::abs).collect();
        check(gpu, &scores, num_experts, &selection, num_tokens);
    }
}

fn many_tokens(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for num_tokens in sizes(&[512, 989, 4096], 512) {
        for num_experts in sizes(&[12, 48, 448], 48) {
            let scores = uniform(rng, num_tokens * num_experts);
            for selection in
                [Selection::top_k(5), Selection::dynamic_k(0.3), Selection::cumulative_share(0.5)]
            {
                check(gpu, &scores, num_experts, &selection, num_tokens);
            }
        }
    }
}

fn special(rng: &mut ChaCha8Rng) -> f32 {
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, -1.0, f32::MIN_POSITIVE];
    match rng.random_range(0..20) {
        index @ 0..7 => values[index],
        7 => 1e-42,
        // Few different values, so that most tie.
        _ => rng.random_range(0..4) as f32 / 4.0,
    }
}

fn ties_and_special_values(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for num_experts in sizes(&[1, 3, 48, 129, 512, 700, 4096], 48) {
        for selection in thin(rules(num_experts), 5) {
            let mut scores: Vec<f32> = (0..24 * num_experts).map(|_| special(rng)).collect();
            let mut rows = scores.chunks_exact_mut(num_experts);
            rows.next().unwrap().fill(0.0);
            rows.next().unwrap().fill(f32::NAN);
            rows.next().unwrap().fill(f32::INFINITY);
            rows.next().unwrap().fill(f32::NEG_INFINITY);
            rows.next().unwrap().fill(-3.0);
            rows.next().unwrap().fill(0.5);
            check(gpu, &scores, num_experts, &selection, 24);
        }
    }
}

fn rows_apart_and_padding(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    for (num_experts, stride) in [(48, 50), (129, 160), (600, 601)] {
        for valid in [0, 1, 18, 19] {
            let scores: Vec<f32> = uniform(rng, 19 * num_experts);
            check(gpu, &scores, num_experts, &Selection::dynamic_k(0.5), valid);
        }
        let scores = uniform(rng, 19 * stride);
        let packed: Vec<f32> =
            scores.chunks_exact(stride).flat_map(|row| &row[..num_experts]).copied().collect();
        let input = gpu.input(&scores);
        let row_words = num_experts.div_ceil(32);
        let mut mask = Output::words(gpu, 19 * row_words);
        let outputs = SelectOutputs {
            mask: View::matrix(mask.address(), Format::Word, [19, row_words]),
            counts: None,
            status: None,
        };
        let mut view = View::matrix(input.address(), Format::F32, [19, num_experts]);
        view.row_stride = stride;
        let selection = Selection::top_k(7);
        gpu.run(&mut [&mut mask], |stream| unsafe {
            select(&gpu.device, stream, &outputs, view, None, &selection, Workspace::NONE)
        });
        let expected = reference::select(&selection, &packed, num_experts).mask;
        assert_eq!(mask.read::<u32>(), expected.words());
    }
}
