//! Arguments that do not fit are refused with one sentence, before anything is launched.

use moefy::cuda::{
    Format, RawStream, SelectOutputs, View, Workspace, route_index, router_select, select,
};
use moefy::cuda::{RouterSelectOutputs, RouterView};
use moefy::ffn::Selection;
use moefy::{DType, Result};

use crate::harness::{Gpu, Output};
use crate::route_index::Lists;

pub fn tests() -> crate::Tests {
    vec![
        ("bad_input::select", bad_select),
        ("bad_input::route_index", bad_route_index),
        ("bad_input::router_select", bad_router_select),
    ]
}

fn assert_refused(result: Result<()>, words: &[&str]) {
    let message = result.expect_err("it should be refused").to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

fn bad_select(gpu: &Gpu) {
    let scores = gpu.input(&[1.0f32; 8 * 40]);
    let mut mask = Output::words(gpu, 16);
    let good_scores = View::matrix(scores.address(), Format::F32, [8, 40]);
    let good_mask = View::matrix(mask.address(), Format::Word, [8, 2]);
    let good = SelectOutputs { mask: good_mask, counts: None, status: None };
    let call = |outputs: &SelectOutputs, scores, selection| unsafe {
        let stream: RawStream = gpu.raw_stream();
        select(&gpu.device, stream, outputs, scores, None, &selection, Workspace::NONE)
    };
    let top = Selection::top_k(2);
    mask.poison();
    let with_mask = |mask| SelectOutputs { mask, ..good };
    let null = View { address: 0, ..good_mask };
    assert_refused(call(&with_mask(null), good_scores, top), &["select", "mask", "null"]);
    let host = [0u32; 16];
    let on_host = View { address: host.as_ptr() as u64, ..good_mask };
    assert_refused(call(&with_mask(on_host), good_scores, top), &["mask", "device address"]);
    let odd = View { address: mask.address() + 2, ..good_mask };
    assert_refused(call(&with_mask(odd), good_scores, top), &["mask", "aligned to 4"]);
    let short = View { shape: [7, 2], ..good_mask };
    assert_refused(call(&with_mask(short), good_scores, top), &["mask", "[8, 2]", "[7, 2]"]);
    let apart = View { row_stride: 3, ..good_mask };
    assert_refused(call(&with_mask(apart), good_scores, top), &["mask", "without gaps"]);
    let half = View { format: Format::Float(DType::F16), ..good_scores };
    assert_refused(call(&good, half, top), &["scores", "f32", "f16"]);
    let tight = View { row_stride: 39, ..good_scores };
    assert_refused(call(&good, tight, top), &["scores", "40", "39"]);
    let huge = View { shape: [8, 5000], row_stride: 5000, ..good_scores };
    assert_refused(call(&good, huge, top), &["num_experts", "4096", "5000"]);
    assert_refused(call(&good, good_scores, Selection::top_k(41)), &["k", "40", "41"]);
    assert_refused(call(&good, good_scores, Selection::dynamic_k(1.5)), &["rel_threshold"]);
    assert!(mask.read::<u32>().iter().all(|&word| word == u32::MAX), "something was launched");
}

fn bad_route_index(gpu: &Gpu) {
    let mask = gpu.input(&[0u32; 16]);
    let lists = Lists::new(gpu, 8, 40, 20);
    let views = lists.views(None);
    let call = |views, mask| unsafe {
        route_index(&gpu.device, gpu.raw_stream(), &views, mask, 40, None, Workspace::NONE)
    };
    let good = View::matrix(mask.address(), Format::Word, [8, 2]);
    let wide = View { shape: [8, 3], row_stride: 3, ..good };
    assert_refused(call(views, wide), &["route_index", "mask", "[8, 2]", "[8, 3]"]);
    let many = View { shape: [1 << 28, 2], ..good };
    assert_refused(call(views, many), &["num_tokens * num_experts", "2^31"]);
    let short = View { shape: [1, 40], ..views.offsets };
    let views = moefy::cuda::RouteIndexOutputs { offsets: short, ..views };
    assert_refused(call(views, good), &["offsets", "[1, 41]", "[1, 40]"]);
    assert!(lists.counts.read::<u32>().iter().all(|&word| word == u32::MAX));
}

fn bad_router_select(gpu: &Gpu) {
    let format = Format::Float(DType::F16);
    let x = gpu.input(&[0u16; 1100 * 64 + 8]);
    let w = gpu.input(&[0u16; 40 * 64]);
    let mask = Output::words(gpu, 1100 * 2);
    let selected = SelectOutputs {
        mask: View::matrix(mask.address(), Format::Word, [1100, 2]),
        counts: None,
        status: None,
    };
    let outputs = RouterSelectOutputs { selected, scores: None };
    let call = |x, w, workspace| unsafe {
        let router = RouterView::Linear { w };
        let (device, stream, top) = (&gpu.device, gpu.raw_stream(), Selection::top_k(2));
        router_select(device, stream, &outputs, x, None, &router, &top, workspace)
    };
    let good_x = View::matrix(x.address(), format, [1100, 64]);
    let good_w = View::matrix(w.address(), format, [40, 64]);
    let bytes = 1100 * 40 * 4;
    assert_refused(call(good_x, good_w, Workspace::NONE), &["workspace", "176000", "0"]);
    let workspace = Output::new(gpu, bytes);
    let unaligned = Workspace { address: workspace.address() + 4, bytes };
    assert_refused(call(good_x, good_w, unaligned), &["workspace", "256"]);
    let workspace = Workspace { address: workspace.address(), bytes };
    let float_w = View { format: Format::F32, ..good_w };
    assert_refused(call(good_x, float_w, workspace), &["w", "f16", "f32"]);
    let odd_x = View { address: x.address() + 2, ..good_x };
    assert_refused(call(odd_x, good_w, workspace), &["x", "aligned to 16"]);
    let odd_stride = View { row_stride: 65, ..good_x };
    assert_refused(call(odd_stride, good_w, workspace), &["x", "multiples of 16", "65"]);
    let words = View { format: Format::Word, ..good_x };
    assert_refused(call(words, good_w, workspace), &["x", "f32, f16 or bf16", "u32"]);
}
