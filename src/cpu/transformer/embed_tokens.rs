//! Looks up and adds the embeddings of every token.

use rayon::prelude::*;

use crate::model::Embeddings;

/// y \[T, d_model\].
pub(super) fn embed_tokens(
    y: &mut [f32],
    token_ids: &[u32],
    position_ids: &[u32],
    embeddings: &Embeddings<Vec<f32>>,
) {
    let Embeddings { words, positions, token_type, d_model } = embeddings;
    let ids = token_ids.par_iter().zip(position_ids);
    let rows = y.par_chunks_exact_mut(*d_model).zip(ids).with_min_len(16);
    rows.for_each(|(y, (&token, &position))| {
        let word = &words[token as usize * d_model..][..*d_model];
        let position = &positions[position as usize * d_model..][..*d_model];
        for (((y, w), t), p) in y.iter_mut().zip(word).zip(token_type).zip(position) {
            *y = w + t + p;
        }
    });
}
