//! The sum of a token's word, position and token-type embeddings.

/// `words` \[vocab, d_model\], `positions` \[max_positions, d_model\] and one vector
/// `token_type` \[d_model\] for all tokens → \[T, d_model\].
pub fn embed_tokens(
    words: &[f64],
    positions: &[f64],
    token_type: &[f64],
    token_ids: &[u32],
    position_ids: &[u32],
) -> Vec<f64> {
    let d_model = token_type.len();
    let row = |table: &[f64], id: u32| table[id as usize * d_model..][..d_model].to_vec();
    let mut y = Vec::with_capacity(token_ids.len() * d_model);
    for (&token, &position) in token_ids.iter().zip(position_ids) {
        let (word, position) = (row(words, token), row(positions, position));
        y.extend(word.iter().zip(position).zip(token_type).map(|((w, p), t)| w + p + t));
    }
    y
}
