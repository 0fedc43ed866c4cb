//! Text to token ids, by a folder's `tokenizer.json`.

use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use tokenizers::{PostProcessor, TruncationParams};

use super::Folder;
use crate::error::{Error, Result};

/// The tokenizer of a model folder. Special tokens are added; texts are cut at
/// [`max_length`](Self::max_length) tokens and never padded, whatever the file says about either.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    max_length: usize,
}

/// Where sentence encoders keep the length that they were trained for.
const SENTENCE_CONFIG: &str = "sentence_bert_config.json";

#[derive(Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
}

impl Tokenizer {
    /// Opens the tokenizer of a folder. Texts are cut at `max_length` tokens, special ones
    /// included; by default at `max_seq_length` of `sentence_bert_config.json`, and always at what
    /// the model has positions for.
    ///
    /// # Errors
    /// When a file is missing or cannot be parsed, or `max_length` leaves no room for text.
    pub fn open(folder: &Folder, max_length: Option<usize>) -> Result<Self> {
        let file = folder.path().join("tokenizer.json");
        let text = std::fs::read(&file).map_err(Error::io("read", &file))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(text)
            .map_err(|e| Error::file(&file, format!("not a tokenizer that moefy can read: {e}")))?;

        let wanted = match max_length {
            Some(max_length) => Some(max_length),
            None => sentence_length(&folder.path().join(SENTENCE_CONFIG))?,
        };
        let positions = folder.config().num_positions();
        let max_length = wanted.map_or(positions, |wanted| wanted.min(positions));
        let special = inner.get_post_processor().map_or(0, |p| p.added_tokens(false));
        if max_length <= special {
            let expected = format!("more than the {special} special tokens of a text");
            return Err(Error::argument("tokenizer", "max_length", expected, max_length));
        }
        inner
            .with_padding(None)
            .with_truncation(Some(TruncationParams { max_length, ..Default::default() }))
            .map_err(|e| Error::file(&file, format!("cannot cut texts: {e}")))?;
        Ok(Self { inner, max_length })
    }

    /// The most tokens of a text.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The token ids of every text, in order.
    ///
    /// # Errors
    /// When the tokenizer cannot encode a text.
    pub fn encode<S: AsRef<str> + Sync>(&self, texts: &[S]) -> Result<Vec<Vec<u32>>> {
        let encode = |(i, text): (usize, &S)| match self.inner.encode_fast(text.as_ref(), true) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => {
                let got = format!("text {i}, for which it says: {e}");
                Err(Error::argument("tokenizer", "texts", "ones that it can encode", got))
            }
        };
        texts.par_iter().enumerate().map(encode).collect()
    }
}

fn sentence_length(file: &Path) -> Result<Option<usize>> {
    if !file.exists() {
        return Ok(None);
    }
    let text = std::fs::read(file).map_err(Error::io("read", file))?;
    let config: SentenceConfig = serde_json::from_slice(&text)
        .map_err(|e| Error::file(file, format!("cannot read `max_seq_length`: {e}")))?;
    Ok(config.max_seq_length)
}
