//! Sentence embeddings of any number of token sequences.

use super::encoder::MaskObserver;
use super::{BATCH_TOKENS, Backend, Batch, Encoder, FfnRun, batches};
use crate::error::Result;

/// Embeddings \[sequences, d_model\] of unit length, in the order of the sequences.
///
/// `observe` sees the experts that each layer selected, batch by batch.
///
/// # Errors
/// When a sequence is empty or too long for the model, or holds an unknown token; and those of the
/// forward pass.
pub fn embed<B: Backend>(
    encoder: &Encoder<B>,
    sequences: &[Vec<u32>],
    run: FfnRun,
    mut observe: Option<&mut MaskObserver<'_>>,
) -> Result<Vec<f32>> {
    let d_model = encoder.d_model();
    let batches = batches(sequences, BATCH_TOKENS);
    let tokens = |ids: &Vec<usize>| ids.iter().map(|&i| sequences[i].len()).sum();
    let max_tokens = batches.iter().map(tokens).max().unwrap_or(0);
    let mut workspace = encoder.workspace(max_tokens)?;
    let mut x = encoder.activations(max_tokens)?;

    let mut embeddings = vec![0.0; sequences.len() * d_model];
    for ids in batches {
        let batch = encoder.batch(&Batch::pack(ids.iter().map(|&i| &sequences[i]))?)?;
        encoder.forward(run, &mut x, &batch, &mut workspace, observe.as_deref_mut())?;
        let pooled = encoder.pool(&x, &batch)?;
        for (&id, row) in ids.iter().zip(pooled.chunks_exact(d_model)) {
            embeddings[id * d_model..(id + 1) * d_model].copy_from_slice(row);
        }
    }
    Ok(embeddings)
}
