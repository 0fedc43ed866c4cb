//! Lists from masks are those of the reference, number for number.

use moefy::abi::{MOEFY_STATUS_MASK_BEYOND_EXPERTS, MOEFY_STATUS_TOO_MANY_PAIRS};
use moefy::cuda::{
    Format, RouteIndexOutputs, View, Workspace, route_index, route_index_workspace_bytes,
};
use moefy::ffn::ExpertMask;
use moefy::reference;
use rand::RngExt;

use crate::harness::{Gpu, Output, check_padding, is_small, random_mask, sizes, thin};

pub fn tests() -> crate::Tests {
    vec![
        ("route_index::densities_and_sizes", densities_and_sizes),
        ("route_index::skewed_routing", skewed_routing),
        ("route_index::padding", padding),
        ("route_index::stray_bits", stray_bits),
        ("route_index::too_many_pairs", too_many_pairs),
    ]
}

/// Every output, with room for `capacity` token ids.
pub struct Lists {
    pub counts: Output,
    pub offsets: Output,
    pub token_ids: Output,
    pub expert_masks: Output,
    pub word_offsets: Output,
    pub union_ids: Output,
    pub num_union: Output,
    num_tokens: usize,
    num_experts: usize,
}

impl Lists {
    pub fn new(gpu: &Gpu, num_tokens: usize, num_experts: usize, capacity: usize) -> Self {
        Self {
            counts: Output::words(gpu, num_experts),
            offsets: Output::words(gpu, num_experts + 1),
            token_ids: Output::words(gpu, capacity),
            expert_masks: Output::words(gpu, num_experts * num_tokens.div_ceil(32)),
            word_offsets: Output::words(gpu, num_experts * num_tokens.div_ceil(32)),
            union_ids: Output::words(gpu, num_experts),
            num_union: Output::words(gpu, 1),
            num_tokens,
            num_experts,
        }
    }

    pub fn views(&self, status: Option<View>) -> RouteIndexOutputs {
        let shape = [self.num_experts, self.num_tokens.div_ceil(32)];
        RouteIndexOutputs {
            counts: self.counts.view(),
            offsets: self.offsets.view(),
            token_ids: self.token_ids.view(),
            expert_masks: View::matrix(self.expert_masks.address(), Format::Word, shape),
            word_offsets: View::matrix(self.word_offsets.address(), Format::Word, shape),
            union_ids: self.union_ids.view(),
            num_union: self.num_union.view(),
            status,
        }
    }

    fn all(&mut self) -> [&mut Output; 7] {
        [
            &mut self.counts,
            &mut self.offsets,
            &mut self.token_ids,
            &mut self.expert_masks,
            &mut self.word_offsets,
            &mut self.union_ids,
            &mut self.num_union,
        ]
    }

    /// What lies beyond the lists is still poison.
    pub fn check(&self, expected: &reference::RouteIndex, case: &str) {
        let starts_with = |output: &Output, expected: &[u32], name| {
            let actual = output.read::<u32>();
            let (begin, rest) = actual.split_at(expected.len());
            let differs = begin.iter().zip(expected).position(|(got, expected)| got != expected);
            assert_eq!(differs, None, "{name}: {case}");
            assert!(rest.iter().all(|&word| word == u32::MAX), "{name} goes on: {case}");
        };
        starts_with(&self.counts, &expected.counts, "counts");
        starts_with(&self.offsets, &expected.offsets, "offsets");
        starts_with(&self.token_ids, &expected.token_ids, "token_ids");
        starts_with(&self.expert_masks, &expected.expert_masks, "expert_masks");
        starts_with(&self.word_offsets, &expected.word_offsets, "word_offsets");
        starts_with(&self.union_ids, &expected.union_ids, "union_ids");
        starts_with(&self.num_union, &[expected.union_ids.len() as u32], "num_union");
    }
}

/// Launches with these words and returns the lists and the status.
fn lists(
    gpu: &Gpu,
    words: &[u32],
    [num_tokens, num_experts]: [usize; 2],
    capacity: usize,
    valid: usize,
) -> (Lists, u32) {
    let row_words = num_experts.div_ceil(32);
    let input = gpu.input(words);
    let (num_valid, status) = (gpu.input(&[valid as u32]), gpu.input(&[0u32]));
    let mut lists = Lists::new(gpu, num_tokens, num_experts, capacity);
    let views = lists.views(Some(View::words(status.address(), 1)));
    let mask = View::matrix(input.address(), Format::Word, [num_tokens, row_words]);
    let num_valid = Some(View::words(num_valid.address(), 1));
    let bytes = route_index_workspace_bytes(num_tokens, num_experts);
    let workspace = Output::new(gpu, bytes);
    let workspace_view = Workspace { address: workspace.address(), bytes };
    gpu.run(&mut lists.all(), |stream| unsafe {
        route_index(&gpu.device, stream, &views, mask, num_experts, num_valid, workspace_view)
    });
    workspace.check_guards();
    (lists, status.read().unwrap()[0])
}

fn check(gpu: &Gpu, mask: &ExpertMask, valid: usize) {
    let shape = [mask.num_tokens(), mask.num_experts()];
    let capacity = mask.num_pairs() + 3;
    let (lists, status) = lists(gpu, mask.words(), shape, capacity, valid);
    let expected = reference::route_index(mask, valid);
    lists.check(&expected, &format!("[T, E] {shape:?}, {valid} valid"));
    assert_eq!(status, 0);
}

fn densities_and_sizes(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let all_tokens = [0, 1, 2, 7, 19, 31, 32, 33, 64, 99, 512, 989, 1025, 4096, 8200, 9000];
    let mut cases = Vec::new();
    for num_tokens in sizes(&all_tokens, 99) {
        let all_experts = sizes(&[1, 12, 48, 112, 129, 448, 1025, 4096], 500);
        cases.extend(all_experts.into_iter().map(|num_experts| (num_tokens, num_experts)));
    }
    // The largest masks would take the reference too long.
    cases.retain(|(num_tokens, num_experts)| num_tokens * num_experts <= 2_000_000);
    let mut cases = thin(cases, 5);
    // Where one launch has all the tokens, and all the words, that it can have, and where it has not.
    if !is_small() {
        cases.extend([(8192, 128), (8192, 129), (512, 512), (512, 513)]);
    }
    for (num_tokens, num_experts) in cases {
        let density = [0.0, 0.03, 0.3, 1.0][rng.random_range(0..4)];
        let mask = random_mask(rng, num_tokens, num_experts, density);
        check(gpu, &mask, num_tokens);
    }
}

fn skewed_routing(gpu: &Gpu) {
    for [num_tokens, num_experts] in [[99, 48], [989, 129], [4096, 448]] {
        if is_small() && num_tokens > 99 {
            continue;
        }
        for everything in [0, num_experts / 2, num_experts - 1] {
            let mut mask = ExpertMask::none(num_tokens, num_experts);
            (0..num_tokens).for_each(|token| mask.insert(token, everything));
            // And one token that takes all.
            (0..num_experts).for_each(|expert| mask.insert(num_tokens / 2, expert));
            check(gpu, &mask, num_tokens);
        }
    }
}

fn padding(gpu: &Gpu) {
    check_padding(gpu, check);
}

fn stray_bits(gpu: &Gpu) {
    let mut mask = ExpertMask::none(70, 40);
    mask.insert(3, 39);
    let mut words = mask.words().to_vec();
    words[2 * 69 + 1] |= 1 << 8;
    let (lists, status) = lists(gpu, &words, [70, 40], 8, 70);
    lists.check(&reference::route_index(&mask, 70), "stray bits");
    assert_eq!(status, MOEFY_STATUS_MASK_BEYOND_EXPERTS);
}

fn too_many_pairs(gpu: &Gpu) {
    for [num_tokens, num_experts] in [[70, 40], [4096, 64]] {
        let mask = ExpertMask::all(num_tokens, num_experts);
        let capacity = num_tokens + 5;
        let (lists, status) =
            lists(gpu, mask.words(), [num_tokens, num_experts], capacity, num_tokens);
        assert_eq!(status, MOEFY_STATUS_TOO_MANY_PAIRS);
        let offsets = lists.offsets.read::<u32>();
        assert_eq!(offsets[..3], [0, num_tokens as u32, capacity as u32]);
        assert!(offsets[2..].iter().all(|&offset| offset == capacity as u32));
        let ids = lists.token_ids.read::<u32>();
        assert!(ids.iter().enumerate().all(|(i, &id)| id as usize == i % num_tokens));
    }
}
