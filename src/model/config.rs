//! `config.json`: what the encoder needs, typed, beside every key as it was.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::ffn::Activation;

/// The families of encoders that share BERT's tensors and forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Positions count from 0.
    Bert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT: positions count from `pad_token_id` + 1, and padding
    /// tokens have position `pad_token_id`.
    Roberta,
}

/// The parsed `config.json` of a BERT-family encoder. Absent keys have the defaults of the
/// `transformers` package.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// From `model_type`, or from `architectures` where that is absent.
    pub architecture: Architecture,
    /// d, the width of a token.
    pub hidden_size: usize,
    /// F, the neurons of an FFN.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Divides `hidden_size`.
    pub num_attention_heads: usize,
    /// φ, from `hidden_act`.
    pub activation: Activation,
    /// Added to the variance in every layer norm.
    pub layer_norm_eps: f64,
    /// Rows of the word embeddings.
    pub vocab_size: usize,
    /// Rows of the position embeddings.
    pub max_position_embeddings: usize,
    /// Rows of the token type embeddings.
    pub type_vocab_size: usize,
    /// The token that fills short rows.
    pub pad_token_id: usize,
    raw: Map<String, Value>,
}

impl Config {
    /// Parses the text of a `config.json`; `file` is where it came from, for errors.
    ///
    /// # Errors
    /// When the text is not a JSON object, a required key is missing, or a value cannot work. The
    /// error names the file, the key, what was expected and what was found.
    pub fn parse(file: &Path, text: &str) -> Result<Self> {
        let raw = object(file, text)?;
        let keys = Keys { file, raw: &raw };
        let architecture = keys.architecture()?;
        keys.refuse_other_than("position_embedding_type", "absolute".into())?;
        keys.refuse_other_than("is_decoder", false.into())?;

        let hidden_act = keys.get("hidden_act")?.unwrap_or_else(|| "gelu".to_string());
        let activation =
            Activation::from_hf_name(&hidden_act).map_err(|e| keys.wrong("hidden_act", e))?;
        let layer_norm_eps = keys.get("layer_norm_eps")?.unwrap_or(1e-12);
        if !(0.0..1.0).contains(&layer_norm_eps) {
            return Err(keys.unexpected("layer_norm_eps", "at least 0 and below 1"));
        }
        let [default_types, default_pad] = match architecture {
            Architecture::Bert => [2, 0],
            Architecture::Roberta => [2, 1],
        };
        let config = Self {
            architecture,
            hidden_size: keys.size("hidden_size", None)?,
            intermediate_size: keys.size("intermediate_size", None)?,
            num_hidden_layers: keys.size("num_hidden_layers", None)?,
            num_attention_heads: keys.size("num_attention_heads", None)?,
            activation,
            layer_norm_eps,
            vocab_size: keys.size("vocab_size", None)?,
            max_position_embeddings: keys.size("max_position_embeddings", None)?,
            type_vocab_size: keys.size("type_vocab_size", Some(default_types))?,
            pad_token_id: keys.get("pad_token_id")?.unwrap_or(default_pad),
            raw: Map::new(),
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let expected = format!("a divisor of `hidden_size` = {}", config.hidden_size);
            return Err(keys.unexpected("num_attention_heads", &expected));
        }
        if config.pad_token_id >= config.vocab_size {
            let expected = format!("below `vocab_size` = {}", config.vocab_size);
            return Err(keys.unexpected("pad_token_id", &expected));
        }
        if config.num_positions() == 0 {
            let expected = "more than the positions that precede the first token";
            return Err(keys.unexpected("max_position_embeddings", expected));
        }
        Ok(Self { raw, ..config })
    }

    /// Every key of the file, in its order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// The position of a row's first token.
    pub fn first_position(&self) -> usize {
        match self.architecture {
            Architecture::Bert => 0,
            Architecture::Roberta => self.pad_token_id.saturating_add(1),
        }
    }

    /// The most tokens that one row can have.
    pub fn num_positions(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position())
    }
}

/// Parses `text` as a JSON object.
pub(super) fn object(file: &Path, text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text).map_err(|e| Error::file(file, format!("not a JSON object: {e}")))
}

/// Reads keys of an object, with errors that name file and key.
struct Keys<'a> {
    file: &'a Path,
    raw: &'a Map<String, Value>,
}

impl Keys<'_> {
    /// `None` where the key is absent or null.
    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        match self.raw.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|e| self.wrong(key, e)),
        }
    }

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match self.get(key)?.or(default) {
            Some(0) => Err(self.unexpected(key, "at least 1")),
            Some(size) => Ok(size),
            None => Err(Error::file(self.file, format!("the key `{key}` is missing"))),
        }
    }

    fn architecture(&self) -> Result<Architecture> {
        const KNOWN: [(&str, &str, Architecture); 4] = [
            ("bert", "Bert", Architecture::Bert),
            ("roberta", "Roberta", Architecture::Roberta),
            ("xlm-roberta", "XLMRoberta", Architecture::Roberta),
            ("camembert", "Camembert", Architecture::Roberta),
        ];
        let expected = "one of bert, roberta, xlm-roberta, camembert";
        if let Some(model_type) = self.get::<String>("model_type")? {
            let known = KNOWN.into_iter().find(|(name, ..)| *name == model_type);
            let (.., architecture) =
                known.ok_or_else(|| self.unexpected("model_type", expected))?;
            return Ok(architecture);
        }
        // BertModel, BertForMaskedLM, …: but not BertGenerationEncoder.
        let is_of = |class: &str, family: &str| {
            let rest = class.strip_prefix(family);
            rest.is_some_and(|rest| rest.starts_with("Model") || rest.starts_with("For"))
        };
        let classes: Vec<String> = self.get("architectures")?.unwrap_or_default();
        let known = KNOWN
            .into_iter()
            .find(|(_, family, _)| classes.iter().any(|class| is_of(class, family)));
        let (.., architecture) = known.ok_or_else(|| self.unexpected("model_type", expected))?;
        Ok(architecture)
    }

    /// For variants of the model whose forward pass differs.
    fn refuse_other_than(&self, key: &str, supported: Value) -> Result<()> {
        match self.get::<Value>(key)? {
            Some(value) if value != supported => {
                Err(self.unexpected(key, &format!("{supported} (others are not supported)")))
            }
            _ => Ok(()),
        }
    }

    fn unexpected(&self, key: &str, expected: &str) -> Error {
        let got = self.raw.get(key).map_or("nothing".to_string(), shortened);
        Error::file(self.file, format!("`{key}` must be {expected}, got {got}"))
    }

    fn wrong(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(self.file, format!("`{key}`: {reason}"))
    }
}

/// A JSON value that fits into a sentence.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
