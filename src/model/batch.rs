//! Several token sequences, one after another, without padding.

use crate::error::{Error, Result};

/// Tokens per batch that keep a CPU or a GPU busy and bound the memory of a pass.
pub const BATCH_TOKENS: usize = 4096;

/// Packed sequences: sequence i is `token_ids[sequence_offsets[i]..sequence_offsets[i + 1]]`.
///
/// Nothing is padded here, and nothing but tokens costs time. Where a device runs batches in captured sizes,
/// it fills them up with padding, which costs what as many tokens would outside the experts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    token_ids: Vec<u32>,
    sequence_offsets: Vec<u32>,
}

impl Batch {
    /// Takes over packed sequences; `sequence_offsets` has one entry more than there are
    /// sequences and is an exclusive prefix sum of their lengths.
    ///
    /// # Errors
    /// When the offsets do not start at 0, do not end at the number of tokens, or do not grow: an
    /// empty sequence has no embedding.
    pub fn new(token_ids: Vec<u32>, sequence_offsets: Vec<u32>) -> Result<Self> {
        let refuse = |expected: String, got: String| {
            Err(Error::argument("batch", "sequence_offsets", expected, got))
        };
        if sequence_offsets.first() != Some(&0) {
            return refuse("offsets that start at 0".into(), format!("{sequence_offsets:?}"));
        }
        if let Some(i) = sequence_offsets.windows(2).position(|pair| pair[0] >= pair[1]) {
            let (from, to) = (sequence_offsets[i], sequence_offsets[i + 1]);
            let got = format!("tokens {from}..{to} for sequence {i}");
            return refuse("sequences of at least one token".into(), got);
        }
        let end = sequence_offsets[sequence_offsets.len() - 1];
        if end as usize != token_ids.len() {
            let expected = format!("offsets that end at the number of tokens, {}", token_ids.len());
            return refuse(expected, end.to_string());
        }
        Ok(Self { token_ids, sequence_offsets })
    }

    /// Packs sequences one after another.
    ///
    /// # Errors
    /// When a sequence is empty, or all together have 2³² tokens or more.
    pub fn pack<S: AsRef<[u32]>>(sequences: impl IntoIterator<Item = S>) -> Result<Self> {
        let (mut token_ids, mut sequence_offsets) = (Vec::new(), vec![0]);
        for sequence in sequences {
            token_ids.extend_from_slice(sequence.as_ref());
            let end = u32::try_from(token_ids.len()).map_err(|_| {
                Error::argument("batch", "sequences", "of fewer than 2^32 tokens", token_ids.len())
            })?;
            sequence_offsets.push(end);
        }
        Self::new(token_ids, sequence_offsets)
    }

    /// All sequences' tokens.
    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// The first token of every sequence, and the number of tokens.
    pub fn sequence_offsets(&self) -> &[u32] {
        &self.sequence_offsets
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.sequence_offsets.len() - 1
    }

    /// Tokens of the longest sequence.
    pub fn max_length(&self) -> usize {
        self.sequences().map(<[u32]>::len).max().unwrap_or(0)
    }

    /// The sequences, in order.
    pub fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        let bounds = self.sequence_offsets.windows(2);
        bounds.map(|pair| &self.token_ids[pair[0] as usize..pair[1] as usize])
    }
}

/// Which sequences to run together, by index: all of them, shortest first, in batches of at most
/// `max_tokens` tokens; a longer sequence is a batch of its own.
pub fn batches(sequences: &[Vec<u32>], max_tokens: usize) -> Vec<Vec<usize>> {
    let length = |&id: &usize| sequences[id].len();
    let mut ids: Vec<usize> = (0..sequences.len()).collect();
    ids.sort_by_key(length);
    together(&ids, length, max_tokens).map(<[usize]>::to_vec).collect()
}

/// Sequences in their order, in batches of at most `max_tokens` tokens; a longer one is a batch of
/// its own.
pub fn batches_in_order<S: AsRef<[u32]>>(
    sequences: &[S],
    max_tokens: usize,
) -> impl Iterator<Item = &[S]> {
    together(sequences, |sequence| sequence.as_ref().len(), max_tokens)
}

/// As many neighbours at a time as have room.
fn together<T>(
    items: &[T],
    length: impl Fn(&T) -> usize,
    max_tokens: usize,
) -> impl Iterator<Item = &[T]> {
    let mut num_tokens = 0;
    items.chunk_by(move |last, next| {
        num_tokens += length(last);
        let fits = num_tokens + length(next) <= max_tokens;
        if !fits {
            num_tokens = 0;
        }
        fits
    })
}
