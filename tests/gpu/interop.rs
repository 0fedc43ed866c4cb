//! The operations on cudarc's slices, one after the other on one stream.

use moefy::cuda::interop::{self, RouteIndexSlices};
use moefy::cuda::{DeviceRouter, route_index_workspace_bytes, router_select_workspace_bytes};
use moefy::ffn::{ExpertMask, Selection};
use moefy::{DType, reference};

use crate::harness::{Gpu, uniform};
use crate::router_select::routers;

pub fn tests() -> crate::Tests {
    vec![
        ("interop::from_tokens_to_lists", from_tokens_to_lists),
        ("interop::short_slices", short_slices),
    ]
}

fn from_tokens_to_lists(gpu: &Gpu) {
    let (num_tokens, num_experts, d_model) = (40, 70, 64);
    let rng = &mut gpu.rng();
    let router = &routers(rng, [num_experts, d_model, 32], DType::F32)[1];
    let router = DeviceRouter::new(&gpu.device, router, DType::F32).unwrap();
    let (device, stream) = (&gpu.device, &gpu.stream);
    let words = |len| stream.alloc_zeros::<u32>(len).unwrap();
    let bytes = |len: usize| stream.alloc_zeros::<u8>(len.max(1)).unwrap();

    let x = stream.clone_htod(&uniform(rng, num_tokens * d_model)).unwrap();
    let mut mask = words(num_tokens * 3);
    let mut scores = stream.alloc_zeros::<f32>(num_tokens * num_experts).unwrap();
    let mut workspace = bytes(router_select_workspace_bytes(num_tokens, &router.view()));
    let rule = Selection::dynamic_k(0.5);
    let out = Some(&mut scores);
    interop::router_select(device, stream, &mut mask, out, &x, &router, &rule, &mut workspace)
        .unwrap();
    let host_scores = stream.clone_dtoh(&scores).unwrap();
    let expected = reference::select(&rule, &host_scores, num_experts).mask;
    assert_eq!(stream.clone_dtoh(&mask).unwrap(), expected.words());

    let top = Selection::top_k(3);
    let (mut mask, mut counts) = (words(num_tokens * 3), words(num_tokens));
    let counts_out = Some(&mut counts);
    interop::select(device, stream, &mut mask, counts_out, &scores, num_experts, &top).unwrap();
    let expected: ExpertMask = reference::select(&top, &host_scores, num_experts).mask;
    assert_eq!(stream.clone_dtoh(&mask).unwrap(), expected.words());
    assert_eq!(stream.clone_dtoh(&counts).unwrap(), [3; 40]);

    let rows = num_experts * 2;
    let mut lists =
        [num_experts, num_experts + 1, num_tokens * 3, rows, rows, num_experts, 1].map(words);
    let [counts, offsets, token_ids, expert_masks, word_offsets, union_ids, num_union] =
        lists.each_mut();
    let slices = RouteIndexSlices {
        counts,
        offsets,
        token_ids,
        expert_masks,
        word_offsets,
        union_ids,
        num_union,
    };
    let mut workspace = bytes(route_index_workspace_bytes(num_tokens, num_experts));
    interop::route_index(device, stream, slices, &mask, num_experts, &mut workspace).unwrap();
    let expected = reference::route_index(&expected, num_tokens);
    assert_eq!(stream.clone_dtoh(&lists[1]).unwrap(), expected.offsets);
    assert_eq!(stream.clone_dtoh(&lists[2]).unwrap(), expected.token_ids);
    assert_eq!(stream.clone_dtoh(&lists[4]).unwrap(), expected.word_offsets);
    let num_union = stream.clone_dtoh(&lists[6]).unwrap();
    assert_eq!(num_union, [expected.union_ids.len() as u32]);
}

fn short_slices(gpu: &Gpu) {
    let scores = gpu.stream.alloc_zeros::<f32>(5 * 40).unwrap();
    let mut mask = gpu.stream.alloc_zeros::<u32>(4 * 2).unwrap();
    let (top, none) = (Selection::top_k(1), None);
    let result = interop::select(&gpu.device, &gpu.stream, &mut mask, none, &scores, 40, &top);
    let message = result.unwrap_err().to_string();
    assert!(message.contains("[5, 2]") && message.contains("[4, 2]"), "{message}");
}
