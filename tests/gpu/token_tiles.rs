//! Tiles of tokens are those of the reference, number for number.

use moefy::cuda::{Format, TokenTiles, View, Workspace, token_tiles, token_tiles_workspace_bytes};
use moefy::ffn::ExpertMask;
use moefy::reference;
use rand::RngExt;

use crate::harness::{Gpu, Output, check_padding, random_mask, sizes, thin};

pub fn tests() -> crate::Tests {
    vec![
        ("token_tiles::densities_and_sizes", densities_and_sizes),
        ("token_tiles::skewed_routing", skewed_routing),
        ("token_tiles::padding", padding),
        ("token_tiles::stray_bits", stray_bits),
        ("token_tiles::bad_input", bad_input),
    ]
}

const TILE: usize = 128;
const WORDS: usize = TILE / 32;

/// Every output.
pub struct Tiles {
    token_ids: Output,
    counts: Output,
    expert_ids: Output,
    masks: Output,
    num_experts: usize,
}

impl Tiles {
    pub fn new(gpu: &Gpu, num_tokens: usize, num_experts: usize) -> Self {
        let num_tiles = num_tokens.div_ceil(TILE);
        Self {
            token_ids: Output::words(gpu, num_tokens),
            counts: Output::words(gpu, num_tiles),
            expert_ids: Output::words(gpu, num_tiles * num_experts),
            masks: Output::words(gpu, num_tiles * num_experts * WORDS),
            num_experts,
        }
    }

    pub fn views(&self) -> TokenTiles {
        let num_tiles = self.counts.bytes() / 4;
        let rows = |output: &Output, width| {
            View::matrix(output.address(), Format::Word, [num_tiles, width])
        };
        TokenTiles {
            token_ids: self.token_ids.view(),
            counts: self.counts.view(),
            expert_ids: rows(&self.expert_ids, self.num_experts),
            masks: rows(&self.masks, self.num_experts * WORDS),
        }
    }

    fn all(&mut self) -> [&mut Output; 4] {
        [&mut self.token_ids, &mut self.counts, &mut self.expert_ids, &mut self.masks]
    }

    /// What lies beyond a tile's experts is still poison.
    fn check(&self, expected: &reference::TokenTiles, case: &str) {
        assert_eq!(self.token_ids.read::<u32>(), expected.token_ids, "{case}");
        let (experts, masks) = (self.expert_ids.read::<u32>(), self.masks.read::<u32>());
        for (tile, count) in self.counts.read::<u32>().into_iter().enumerate() {
            let of_tile = tile * self.num_experts..(tile + 1) * self.num_experts;
            let (there, rest) = experts[of_tile.clone()].split_at(count as usize);
            assert_eq!(there, expected.experts[tile], "tile {tile}: {case}");
            assert!(rest.iter().all(|&word| word == u32::MAX), "tile {tile} goes on: {case}");
            let masks = masks[of_tile.start * WORDS..].chunks_exact(WORDS);
            assert!(
                masks.zip(&expected.masks[tile]).all(|(got, expected)| got == expected),
                "{case}"
            );
        }
    }
}

/// Launches with these words.
fn tiles(gpu: &Gpu, words: &[u32], [num_tokens, num_experts]: [usize; 2], valid: usize) -> Tiles {
    let input = gpu.input(words);
    let num_valid = gpu.input(&[valid as u32]);
    let mut tiles = Tiles::new(gpu, num_tokens, num_experts);
    let views = tiles.views();
    let mask = View::matrix(input.address(), Format::Word, [num_tokens, num_experts.div_ceil(32)]);
    let num_valid = Some(View::words(num_valid.address(), 1));
    let bytes = token_tiles_workspace_bytes(num_tokens, num_experts).expect("sizes that can be");
    let scratch = Output::new(gpu, bytes);
    let workspace = Workspace { address: scratch.address(), bytes };
    gpu.run(&mut tiles.all(), |stream| unsafe {
        token_tiles(&gpu.device, stream, &views, mask, num_experts, num_valid, workspace)
    });
    scratch.check_guards();
    tiles
}

fn check(gpu: &Gpu, mask: &ExpertMask, valid: usize) {
    let shape = [mask.num_tokens(), mask.num_experts()];
    let expected = reference::token_tiles(mask, valid, TILE);
    tiles(gpu, mask.words(), shape, valid)
        .check(&expected, &format!("[T, E] {shape:?}, {valid} valid"));
}

fn densities_and_sizes(gpu: &Gpu) {
    let rng = &mut gpu.rng();
    let mut cases = Vec::new();
    for num_tokens in sizes(&[0, 1, 2, 31, 99, 128, 129, 255, 256, 257, 989, 4096, 8192], 129) {
        let all_experts = sizes(&[1, 12, 48, 64, 65, 112, 129, 448, 1025, 4095], 129);
        cases.extend(all_experts.into_iter().map(|num_experts| (num_tokens, num_experts)));
    }
    // The largest masks would take the reference too long.
    cases.retain(|(num_tokens, num_experts)| num_tokens * num_experts <= 1_000_000);
    for (num_tokens, num_experts) in thin(cases, 5) {
        let density = [0.0, 0.03, 0.3, 1.0][rng.random_range(0..4)];
        check(gpu, &random_mask(rng, num_tokens, num_experts, density), num_tokens);
    }
}

fn skewed_routing(gpu: &Gpu) {
    for [num_tokens, num_experts] in [[99, 48], [989, 129]] {
        let mut mask = ExpertMask::none(num_tokens, num_experts);
        (0..num_tokens).for_each(|token| mask.insert(token, num_experts - 1));
        (0..num_tokens).step_by(3).for_each(|token| mask.insert(token, 1));
        // And one token that takes all.
        (0..num_experts).for_each(|expert| mask.insert(num_tokens / 2, expert));
        check(gpu, &mask, num_tokens);
    }
}

fn padding(gpu: &Gpu) {
    check_padding(gpu, check);
}

/// Bits beyond the experts count for nothing.
fn stray_bits(gpu: &Gpu) {
    let mut mask = ExpertMask::none(70, 40);
    mask.insert(3, 39);
    let mut words = mask.words().to_vec();
    (0..70).for_each(|token| words[2 * token + 1] |= !0 << 8);
    tiles(gpu, &words, [70, 40], 70).check(&reference::token_tiles(&mask, 70, TILE), "stray bits");
}

fn bad_input(gpu: &Gpu) {
    let input = gpu.input(&[0u32; 8]);
    let tiles = Tiles::new(gpu, 8, 40);
    let good = tiles.views();
    let call = |outputs: &TokenTiles, shape: [usize; 2], num_experts| {
        let mask = View::matrix(input.address(), Format::Word, shape);
        let none = Workspace::NONE;
        let result = unsafe {
            token_tiles(&gpu.device, gpu.raw_stream(), outputs, mask, num_experts, None, none)
        };
        result.expect_err("it should be refused").to_string()
    };
    let message = call(&good, [8193, 2], 40);
    assert!(message.contains("token_tiles") && message.contains("8192"), "{message}");
    assert!(call(&good, [8, 128], 4096).contains("4095"));
    assert!(call(&good, [8, 2], 40).contains("workspace"));
}
