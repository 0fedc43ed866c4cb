//! The lists of tokens per expert, from masks.

use crate::ffn::ExpertMask;

/// What [`route_index`] found. Lists are exact: every path must give these very numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteIndex {
    /// Tokens of each expert, \[E\].
    pub counts: Vec<u32>,
    /// Where each expert's list begins in `token_ids`, \[E + 1\].
    pub offsets: Vec<u32>,
    /// The tokens that select expert 0, ascending, then those of expert 1, …
    pub token_ids: Vec<u32>,
    /// The transpose of the masks, \[E, ⌈T/32⌉\]: bit t % 32 of word t / 32 of row e, least
    /// significant first.
    pub expert_masks: Vec<u32>,
    /// Where the tokens of each word of `expert_masks` begin in `token_ids`, \[E, ⌈T/32⌉\].
    pub word_offsets: Vec<u32>,
    /// The experts that any token selects, ascending.
    pub union_ids: Vec<u32>,
}

/// S(t) of the first `num_valid_tokens` tokens → lists. Later tokens enter none.
pub fn route_index(mask: &ExpertMask, num_valid_tokens: usize) -> RouteIndex {
    let (num_tokens, num_experts) = (mask.num_tokens(), mask.num_experts());
    let row_words = num_tokens.div_ceil(32);
    let mut index = RouteIndex {
        counts: vec![0; num_experts],
        offsets: vec![0],
        token_ids: Vec::new(),
        expert_masks: vec![0; num_experts * row_words],
        word_offsets: Vec::new(),
        union_ids: Vec::new(),
    };
    for expert in 0..num_experts {
        for token in 0..num_tokens {
            if token % 32 == 0 {
                index.word_offsets.push(index.token_ids.len() as u32);
            }
            if token < num_valid_tokens && mask.contains(token, expert) {
                index.counts[expert] += 1;
                index.token_ids.push(token as u32);
                index.expert_masks[expert * row_words + token / 32] |= 1 << (token % 32);
            }
        }
        index.offsets.push(index.token_ids.len() as u32);
        if index.counts[expert] > 0 {
            index.union_ids.push(expert as u32);
        }
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_three_tokens() {
        let words = vec![0b101, 0b100, 0b001];
        let mask = ExpertMask::from_words(3, 3, words).unwrap();
        let index = route_index(&mask, 3);
        assert_eq!(index.counts, [2, 0, 2]);
        assert_eq!(index.offsets, [0, 2, 2, 4]);
        assert_eq!(index.token_ids, [0, 2, 0, 1]);
        assert_eq!(index.expert_masks, [0b101, 0, 0b011]);
        assert_eq!(index.word_offsets, [0, 2, 2]);
        assert_eq!(index.union_ids, [0, 2]);
    }

    #[test]
    fn padding_enters_no_list() {
        let index = route_index(&ExpertMask::all(40, 2), 33);
        assert_eq!(index.offsets, [0, 33, 66]);
        assert_eq!(index.expert_masks, [u32::MAX, 1, u32::MAX, 1]);
        assert_eq!(index.word_offsets, [0, 32, 33, 65]);
        assert_eq!(route_index(&ExpertMask::all(40, 2), 0).union_ids, [0u32; 0]);
    }

    #[test]
    fn no_token_at_all() {
        let index = route_index(&ExpertMask::none(0, 3), 0);
        assert_eq!((index.counts, index.offsets), (vec![0; 3], vec![0; 4]));
    }
}
