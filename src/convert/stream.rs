//! The hidden states of a text, taken through an encoder one layer at a time.

use crate::error::Result;
use crate::model::{
    BATCH_TOKENS, Backend, Batch, DeviceBatch, Encoder, FfnRun, Workspace, batches_in_order,
};

/// Hears how many batches are done, of how many, and may stop with an error.
pub(super) type EachBatch<'a> = &'a dyn Fn(usize, usize) -> Result<()>;

/// The hidden states of a text between two blocks of an encoder, in the order of the text.
pub(super) struct Stream<B: Backend> {
    batches: Vec<(DeviceBatch<B>, B::Tensor)>,
    workspace: Workspace<B>,
}

impl<B: Backend> Stream<B> {
    /// The inputs of the first layer.
    pub(super) fn start(encoder: &Encoder<B>, sequences: &[&[u32]]) -> Result<Self> {
        let batches = batches_in_order(sequences, BATCH_TOKENS).map(|sequences| {
            let batch = Batch::pack(sequences)?;
            let mut hidden = encoder.activations(batch.num_tokens())?;
            let batch = encoder.batch(&batch)?;
            encoder.embed_tokens(&mut hidden, &batch)?;
            Ok((batch, hidden))
        });
        let batches = batches.collect::<Result<_>>()?;
        let longest = sequences.iter().map(|sequence| sequence.len()).max().unwrap_or(0);
        Ok(Self { batches, workspace: encoder.workspace(longest.max(BATCH_TOKENS))? })
    }

    /// Takes a layer's input to the input of its FFN, and returns that, \[T, d_model\].
    pub(super) fn attention(
        &mut self,
        encoder: &Encoder<B>,
        layer: usize,
        each_batch: EachBatch<'_>,
    ) -> Result<Vec<f32>> {
        let total = self.batches.len();
        let mut inputs = Vec::new();
        for (done, (batch, hidden)) in self.batches.iter_mut().enumerate() {
            encoder.attention_block(layer, hidden, batch, &mut self.workspace)?;
            inputs.extend(encoder.to_host(hidden, batch)?);
            each_batch(done + 1, total)?;
        }
        Ok(inputs)
    }

    /// The hidden states as they are now, \[T, d_model\].
    pub(super) fn to_host(&self, encoder: &Encoder<B>) -> Result<Vec<f32>> {
        let mut states = Vec::new();
        for (batch, hidden) in &self.batches {
            states.extend(encoder.to_host(hidden, batch)?);
        }
        Ok(states)
    }

    /// Takes the input of a layer's FFN to the layer's output, and returns the words of the masks
    /// of what it selected.
    pub(super) fn ffn(
        &mut self,
        encoder: &Encoder<B>,
        layer: usize,
        run: FfnRun,
        each_batch: EachBatch<'_>,
    ) -> Result<Vec<u32>> {
        let total = self.batches.len();
        let mut words = Vec::new();
        for (done, (batch, hidden)) in self.batches.iter_mut().enumerate() {
            encoder.ffn_block(layer, run, hidden, batch, &mut self.workspace)?;
            if let Some(mask) = encoder.mask(&self.workspace)? {
                words.extend_from_slice(mask.words());
            }
            each_batch(done + 1, total)?;
        }
        Ok(words)
    }
}

/// About `num_tokens` tokens in whole sequences from all over the text, in order; all of a shorter
/// text.
pub(super) fn spread<S: AsRef<[u32]>>(sequences: &[S], num_tokens: usize) -> Vec<&[u32]> {
    let total: usize = sequences.iter().map(|sequence| sequence.as_ref().len()).sum();
    let share = num_tokens as f64 / total.max(1) as f64;
    let mut wanted = 0.0;
    let mut taken = 0;
    let mut picked = Vec::new();
    for sequence in sequences {
        let sequence = sequence.as_ref();
        wanted += share * sequence.len() as f64;
        // Closer to what is wanted so far with this sequence than without.
        if taken as f64 + sequence.len() as f64 / 2.0 <= wanted || share >= 1.0 {
            taken += sequence.len();
            picked.push(sequence);
        }
    }
    picked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_takes_about_as_many_tokens_from_everywhere() {
        let sequences: Vec<Vec<u32>> = (0..100).map(|i| vec![i; 1 + i as usize * 7 % 20]).collect();
        let total: usize = sequences.iter().map(Vec::len).sum();
        for wanted in [0, 50, 300, total, total + 1] {
            let picked = spread(&sequences, wanted);
            let tokens: usize = picked.iter().map(|sequence| sequence.len()).sum();
            assert!(tokens.abs_diff(wanted.min(total)) <= 20, "{tokens} of {wanted}");
            assert!(picked.is_sorted_by_key(|sequence| sequence[0]));
            let in_first_half = picked.iter().filter(|sequence| sequence[0] < 50).count();
            assert!(in_first_half.abs_diff(picked.len() / 2) <= 3);
        }
    }
}
