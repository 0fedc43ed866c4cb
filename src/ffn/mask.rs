//! The set of selected experts of every token, as bits.

use crate::error::{Error, Result};

/// One bit per token and expert: bit e % 32 of word e / 32 of a token's row, least significant
/// first, \[num_tokens, ⌈num_experts/32⌉\]. Bits at and beyond `num_experts` are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertMask {
    num_experts: usize,
    num_tokens: usize,
    words: Vec<u32>,
}

impl ExpertMask {
    /// Nothing selected.
    pub fn none(num_tokens: usize, num_experts: usize) -> Self {
        let words = vec![0; num_tokens * num_experts.div_ceil(32)];
        Self { num_experts, num_tokens, words }
    }

    /// Every expert selected for every token.
    pub fn all(num_tokens: usize, num_experts: usize) -> Self {
        let mut mask = Self::none(num_tokens, num_experts);
        for token in 0..num_tokens {
            (0..num_experts).for_each(|expert| mask.insert(token, expert));
        }
        mask
    }

    /// Takes over words in the layout above.
    ///
    /// # Errors
    /// When the number of words is not `num_tokens` · ⌈`num_experts`/32⌉ or a bit at or beyond
    /// `num_experts` is set.
    pub fn from_words(num_tokens: usize, num_experts: usize, words: Vec<u32>) -> Result<Self> {
        let row_words = num_experts.div_ceil(32);
        if num_tokens.checked_mul(row_words) != Some(words.len()) {
            let expected = format!("{num_tokens} rows of {row_words} words");
            return Err(Error::argument("mask", "words", expected, words.len()));
        }
        let mask = Self { num_experts, num_tokens, words };
        let tail = num_experts % 32;
        let spill = (0..num_tokens)
            .find(|&t| tail != 0 && mask.row(t).last().is_some_and(|&word| word >> tail != 0));
        match spill {
            Some(t) => {
                let expected = format!("no bit at or beyond num_experts = {num_experts}");
                Err(Error::argument("mask", "words", expected, format!("one in row {t}")))
            }
            None => Ok(mask),
        }
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// All rows, one after another.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The words of one token.
    pub fn row(&self, token: usize) -> &[u32] {
        let row_words = self.num_experts.div_ceil(32);
        &self.words[token * row_words..(token + 1) * row_words]
    }

    /// The words of one token, to be overwritten. Bits at and beyond `num_experts` must stay zero.
    pub(crate) fn row_mut(&mut self, token: usize) -> &mut [u32] {
        let row_words = self.num_experts.div_ceil(32);
        &mut self.words[token * row_words..(token + 1) * row_words]
    }

    /// Makes room for another number of tokens and experts, selecting nothing; keeps the memory.
    pub(crate) fn reset(&mut self, num_tokens: usize, num_experts: usize) {
        (self.num_tokens, self.num_experts) = (num_tokens, num_experts);
        self.words.clear();
        self.words.resize(num_tokens * num_experts.div_ceil(32), 0);
    }

    /// Selects an expert for a token.
    pub fn insert(&mut self, token: usize, expert: usize) {
        assert!(expert < self.num_experts);
        let row_words = self.num_experts.div_ceil(32);
        self.words[token * row_words + expert / 32] |= 1 << (expert % 32);
    }

    /// Whether a token selects an expert.
    pub fn contains(&self, token: usize, expert: usize) -> bool {
        self.row(token)[expert / 32] >> (expert % 32) & 1 == 1
    }

    /// k of one token.
    pub fn count(&self, token: usize) -> usize {
        self.row(token).iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The selected experts of one token, ascending.
    pub fn experts(&self, token: usize) -> impl Iterator<Item = usize> + '_ {
        self.row(token).iter().enumerate().flat_map(|(index, &word)| {
            std::iter::successors((word != 0).then_some(word), |w| {
                let rest = w & (w - 1);
                (rest != 0).then_some(rest)
            })
            .map(move |w| index * 32 + w.trailing_zeros() as usize)
        })
    }

    /// Number of (token, expert) pairs.
    pub fn num_pairs(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }
}
