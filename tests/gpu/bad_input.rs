//! Arguments that do not fit are refused with one sentence, before anything is launched.

use std::sync::Arc;

use moefy::cuda::{
    Buffer, ExpertLists, ExpertsInputs, FfnInputs, Format, MoeFfn, Neurons, Path, PlanOptions,
    RawStream, RouterSelectOutputs, RouterView, SelectOutputs, View, Workspace, experts,
    experts_workspace_bytes, gates, route_index, router_select, select,
};
use moefy::ffn::Selection;
use moefy::{DType, Result};

use crate::harness::{Gpu, Output};
use crate::random_layers::{Shape, random_layer};
use crate::route_index::Lists;

pub fn tests() -> crate::Tests {
    vec![
        ("bad_input::select", bad_select),
        ("bad_input::route_index", bad_route_index),
        ("bad_input::router_select", bad_router_select),
        ("bad_input::experts", bad_experts),
        ("bad_input::gates", bad_gates),
        ("bad_input::plan", bad_plan),
        ("bad_input::out_of_memory", out_of_memory),
        ("bad_input::another_device", another_device),
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

const SHAPE: Shape =
    Shape { d_model: 64, num_experts: 40, expert_width: 4, shared: 0, rank: 0, glu: false };

fn layer(gpu: &Gpu) -> Arc<MoeFfn> {
    let layer = random_layer(&mut gpu.rng(), SHAPE, DType::F16);
    Arc::new(MoeFfn::new(&gpu.device, &layer).expect("memory"))
}

fn bad_experts(gpu: &Gpu) {
    let format = Format::Float(DType::F16);
    let layer = layer(gpu);
    let x = gpu.input(&[0u16; 8 * 64 + 8]);
    let mask = gpu.input(&[0u32; 16]);
    let y = Output::new(gpu, 8 * 64 * 2);
    let lists = Lists::new(gpu, 8, 40, 20);
    let views = lists.views(None);
    let lists = ExpertLists {
        offsets: views.offsets,
        token_ids: views.token_ids,
        word_offsets: views.word_offsets,
        expected_pairs: None,
    };
    let tokens = Some(lists);
    let good = ExpertsInputs {
        x: View::matrix(x.address(), format, [8, 64]),
        mask: View::matrix(mask.address(), Format::Word, [8, 2]),
        gates: None,
        num_valid_tokens: None,
        lists: tokens,
        tiles: None,
    };
    let good_y = View::matrix(y.address(), format, [8, 64]);
    let bytes = experts_workspace_bytes(&gpu.device, layer.neurons(), 8, tokens, None).unwrap();
    let memory = Output::new(gpu, bytes);
    let good_workspace = Workspace { address: memory.address(), bytes };
    let call = |y, neurons: &Neurons, inputs: &ExpertsInputs, workspace| unsafe {
        experts(&gpu.device, gpu.raw_stream(), y, neurons, inputs, workspace)
    };
    let inputs = |inputs: ExpertsInputs, words: &[&str]| {
        assert_refused(call(good_y, layer.neurons(), &inputs, good_workspace), words);
    };
    let with_x = |x| ExpertsInputs { x, ..good };
    inputs(with_x(View { address: 0, ..good.x }), &["experts", "x", "null"]);
    inputs(with_x(View { address: good.x.address + 2, ..good.x }), &["x", "aligned to 16"]);
    inputs(with_x(View { format: Format::F32, ..good.x }), &["x", "f16", "f32"]);
    inputs(with_x(View { row_stride: 72, ..good.x }), &["x", "without gaps", "72"]);
    let narrow = View { shape: [8, 1], row_stride: 1, ..good.mask };
    inputs(ExpertsInputs { mask: narrow, ..good }, &["mask", "[8, 2]", "[8, 1]"]);
    let gates = Some(View::matrix(y.address(), Format::F32, [8, 39]));
    inputs(ExpertsInputs { gates, ..good }, &["gates", "[8, 40]", "[8, 39]"]);
    let two = Some(View::words(mask.address(), 2));
    let valid = ExpertsInputs { num_valid_tokens: two, ..good };
    inputs(valid, &["num_valid_tokens", "[1, 1]", "[1, 2]"]);
    let short = View { shape: [1, 40], row_stride: 40, ..views.offsets };
    let lists = Some(ExpertLists { offsets: short, ..lists });
    inputs(ExpertsInputs { lists, ..good }, &["offsets", "[1, 41]", "[1, 40]"]);
    let neurons = |neurons: Neurons, words: &[&str]| {
        assert_refused(call(good_y, &neurons, &good, good_workspace), words);
    };
    let n = *layer.neurons();
    let odd = View { shape: [160, 60], row_stride: 60, ..n.w_in };
    neurons(Neurons { w_in: odd, ..n }, &["d_model", "multiple of 8", "60"]);
    neurons(Neurons { expert_width: 0, ..n }, &["expert_width", "at least 1"]);
    let less = View { shape: [159, 64], ..n.w_out };
    neurons(Neurons { w_out: less, ..n }, &["w_out", "[160, 64]", "[159, 64]"]);
    let small = Workspace { bytes: bytes - 1, ..good_workspace };
    let workspace = call(good_y, layer.neurons(), &good, small);
    assert_refused(workspace, &["workspace", &bytes.to_string()]);
    let other = View { shape: [7, 64], ..good_y };
    assert_refused(call(other, layer.neurons(), &good, good_workspace), &["y", "[8, 64]"]);
    assert!(y.read::<u8>().iter().all(|&byte| byte == 0xff), "something was launched");
}

fn bad_gates(gpu: &Gpu) {
    let (scores, mask) = (gpu.input(&[1.0f32; 320]), gpu.input(&[0u32; 16]));
    let out = Output::words(gpu, 320);
    let good_scores = View::matrix(scores.address(), Format::F32, [8, 40]);
    let good_mask = View::matrix(mask.address(), Format::Word, [8, 2]);
    let call = |out, scores, mask| unsafe {
        gates(&gpu.device, gpu.raw_stream(), out, scores, mask, false)
    };
    let good_out = View { address: out.address(), ..good_scores };
    let null = View { address: 0, ..good_out };
    assert_refused(call(null, good_scores, good_mask), &["gates", "null"]);
    let half = View { format: Format::Float(DType::F16), ..good_scores };
    assert_refused(call(good_out, half, good_mask), &["gates", "scores", "f32", "f16"]);
    let wide = View { shape: [8, 3], row_stride: 3, ..good_mask };
    assert_refused(call(good_out, good_scores, wide), &["gates", "mask", "[8, 2]", "[8, 3]"]);
    assert!(out.read::<u8>().iter().all(|&byte| byte == 0xff), "something was launched");
}

fn bad_plan(gpu: &Gpu) {
    let (layer, format) = (layer(gpu), Format::Float(DType::F16));
    let forced = PlanOptions { path: Some(Path::ExpertMajor), ..PlanOptions::default() };
    let message = layer.plan(usize::MAX / 4, forced).err().expect("a refusal").to_string();
    assert!(message.contains("max_tokens"), "{message}");
    let plan = layer.plan(8, forced).expect("a plan");
    let x = gpu.input(&[0u16; 8 * 64]);
    let y = Output::new(gpu, 8 * 64 * 2);
    let memory = Output::new(gpu, plan.workspace_bytes());
    let workspace = Workspace { address: memory.address(), bytes: plan.workspace_bytes() };
    let y_view = View::matrix(y.address(), format, [8, 64]);
    let refused = |inputs: FfnInputs, words: &[&str]| {
        let stream = gpu.raw_stream();
        assert_refused(unsafe { plan.run(stream, y_view, &inputs, workspace) }, words);
    };
    let good = FfnInputs::new(View::matrix(x.address(), format, [8, 64]));
    let scores = Some(View::matrix(y.address(), Format::F32, [8, 41]));
    refused(FfnInputs { scores, ..good }, &["moe_ffn", "scores", "[8, 40]", "[8, 41]"]);
    let null = Some(View::words(0, 1));
    refused(FfnInputs { num_valid_tokens: null, ..good }, &["num_valid_tokens", "null"]);
    refused(FfnInputs { status: null, ..good }, &["status", "null"]);
    assert!(y.read::<u8>().iter().all(|&byte| byte == 0xff), "something was launched");
}

fn out_of_memory(gpu: &Gpu) {
    let message = Buffer::new(&gpu.device, 1 << 50).err().expect("a refusal").to_string();
    assert!(message.contains("allocate 1125899906842624 bytes"), "{message}");
    // Nothing is broken by it.
    assert_eq!(gpu.input(&[7u32]).read::<u32>().expect("a copy"), [7]);
}

/// Memory of a second GPU, where there is one.
fn another_device(gpu: &Gpu) {
    let Ok(other) = moefy::cuda::Device::open(1) else { return };
    let elsewhere = Buffer::from_slice(&other, &[1.0f32; 320]).expect("memory");
    let mask = Output::words(gpu, 16);
    let outputs = SelectOutputs {
        mask: View::matrix(mask.address(), Format::Word, [8, 2]),
        counts: None,
        status: None,
    };
    let scores = View::matrix(elsewhere.address(), Format::F32, [8, 40]);
    let (top, none) = (Selection::top_k(2), Workspace::NONE);
    let stream = gpu.raw_stream();
    let result = unsafe { select(&gpu.device, stream, &outputs, scores, None, &top, none) };
    assert_refused(result, &["select", "scores", "device 0", "device 1"]);
}
