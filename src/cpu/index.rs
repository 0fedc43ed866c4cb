//! The tokens of every expert.

use std::ops::Range;

use crate::ffn::ExpertMask;

/// Token ids, counted from the start of the batch, grouped by expert and ascending within an expert;
/// after them every token once: the group of the neurons that all tokens run.
#[derive(Debug, Default)]
pub struct TokenIndex {
    /// \[E + 1\]
    offsets: Vec<usize>,
    ids: Vec<u32>,
    num_tokens: usize,
}

impl TokenIndex {
    /// Counts, then places: two passes over the mask.
    pub fn build(&mut self, mask: Option<&ExpertMask>, tokens: Range<usize>) {
        let num_experts = mask.map_or(0, ExpertMask::num_experts);
        self.num_tokens = tokens.len();
        self.offsets.clear();
        self.offsets.resize(num_experts + 1, 0);
        self.ids.clear();
        if let Some(mask) = mask {
            for token in tokens.clone() {
                mask.experts(token).for_each(|expert| self.offsets[expert + 1] += 1);
            }
            for expert in 0..num_experts {
                self.offsets[expert + 1] += self.offsets[expert];
            }
            self.ids.resize(self.offsets[num_experts], 0);
            // offsets[e] walks to the end of expert e, which is where expert e + 1 starts.
            for token in tokens.clone() {
                for expert in mask.experts(token) {
                    self.ids[self.offsets[expert]] = (token - tokens.start) as u32;
                    self.offsets[expert] += 1;
                }
            }
            self.offsets.rotate_right(1);
            self.offsets[0] = 0;
        }
        self.ids.extend(0..tokens.len() as u32);
    }

    /// Where the tokens of an expert are in [`ids`](Self::ids).
    pub fn expert(&self, expert: usize) -> Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// Where every token is in [`ids`](Self::ids), once.
    pub fn all(&self) -> Range<usize> {
        self.ids.len() - self.num_tokens..self.ids.len()
    }

    /// Token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}
