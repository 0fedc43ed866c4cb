//! Tokens with similar masks side by side, in tiles.

use crate::ffn::ExpertMask;

/// What [`token_tiles`] found. All of it is exact: every path must give these very numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenTiles {
    /// All tokens in their order, \[T\].
    pub token_ids: Vec<u32>,
    /// The experts that any token of a tile selects, ascending, of each tile.
    pub experts: Vec<Vec<u32>>,
    /// Of each of those the tokens of the tile that select it: bit i % 32 of word i / 32 for the i-th, least significant
    /// first.
    pub masks: Vec<Vec<Vec<u32>>>,
}

/// Orders the tokens by their rarest expert, the rarest first, then by their second rarest, those with one expert before those
/// with more, then by number; tokens without an expert come last, and padding is among those. An expert is rarer
/// than another if fewer of the first `num_valid_tokens` tokens select it, or as many and its number is lower. Every
/// `tile_tokens` that follow each other are a tile.
pub fn token_tiles(mask: &ExpertMask, num_valid_tokens: usize, tile_tokens: usize) -> TokenTiles {
    let experts_of = |token: usize| mask.experts(token).filter(move |_| token < num_valid_tokens);
    let mut counts = vec![0; mask.num_experts()];
    (0..mask.num_tokens()).flat_map(experts_of).for_each(|expert| counts[expert] += 1);
    let key = |token: usize| {
        let mut rarest: Vec<_> = experts_of(token).map(|expert| (counts[expert], expert)).collect();
        rarest.sort_unstable();
        rarest.truncate(2);
        (rarest.is_empty(), rarest, token)
    };
    let mut order: Vec<usize> = (0..mask.num_tokens()).collect();
    order.sort_by_cached_key(|&token| key(token));
    let mut tiles = TokenTiles {
        token_ids: order.iter().map(|&token| token as u32).collect(),
        experts: Vec::new(),
        masks: Vec::new(),
    };
    for tokens in order.chunks(tile_tokens) {
        let mut masks = vec![vec![0; tile_tokens.div_ceil(32)]; mask.num_experts()];
        for (place, &token) in tokens.iter().enumerate() {
            experts_of(token).for_each(|expert| masks[expert][place / 32] |= 1 << (place % 32));
        }
        let any = |expert: &u32| masks[*expert as usize].iter().any(|&word| word != 0);
        let experts: Vec<u32> = (0..mask.num_experts() as u32).filter(any).collect();
        tiles.masks.push(experts.iter().map(|&expert| masks[expert as usize].clone()).collect());
        tiles.experts.push(experts);
    }
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_with_the_rarest_expert_come_first() {
        // Of three experts, two tokens select the first, two the second, one the third.
        let words = vec![0b011, 0b001, 0b000, 0b110];
        let mask = ExpertMask::from_words(4, 3, words).unwrap();
        let tiles = token_tiles(&mask, 4, 2);
        assert_eq!(tiles.token_ids, [3, 1, 0, 2]);
        assert_eq!(tiles.experts, [vec![0, 1, 2], vec![0, 1]]);
        assert_eq!(tiles.masks[0], [vec![0b10], vec![0b01], vec![0b01]]);
        assert_eq!(tiles.masks[1], [vec![0b01], vec![0b01]]);
    }

    #[test]
    fn padding_selects_nothing() {
        let tiles = token_tiles(&ExpertMask::all(5, 2), 2, 4);
        assert_eq!(tiles.token_ids, [0, 1, 2, 3, 4]);
        assert_eq!(tiles.experts, [vec![0, 1], vec![]]);
        assert_eq!(tiles.masks[0], [vec![0b11], vec![0b11]]);
    }

    #[test]
    fn real_routing_shares_experts() {
        let bytes = include_bytes!("../../benches/traces/minilm-e48-layer3.npy");
        let rows = &bytes[bytes.len() - 22_213 * 6..];
        let mut mask = ExpertMask::none(8192, 48);
        for (token, row) in rows.chunks_exact(6).take(8192).enumerate() {
            let selects = |expert: &usize| row[expert / 8] << (expert % 8) & 0x80 != 0;
            (0..48).filter(selects).for_each(|expert| mask.insert(token, expert));
        }
        for (tile_tokens, experts, share) in [(128, 264, 0.0859), (256, 153, 0.0996)] {
            let tiles = token_tiles(&mask, 8192, tile_tokens);
            let all: usize = tiles.experts.iter().map(Vec::len).sum();
            assert_eq!(all, experts, "tiles of {tile_tokens}: the union is {share} of all experts");
        }
    }
}
