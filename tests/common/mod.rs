//! A tiny random BERT in the Hugging Face layout, made in code.
#![allow(dead_code)] // No test uses all of it.

pub mod conversion;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use moefy::DType;
use moefy::model::Folder;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// The sizes of the fixture.
pub const HIDDEN: usize = 32;
pub const INTERMEDIATE: usize = 48;
pub const LAYERS: usize = 2;
pub const POSITIONS: usize = 40;

pub const VOCAB: [&str; 30] = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "a", "the", "cat", "dog", "bird",
    "sat", "ran", "flew", "on", "over", "under", "mat", "house", "tree", "and", "then", "slept",
    "old", "young", "##s", "##ed", "##er", "##ing",
];

/// One tensor as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Everything of a folder that can be changed before it is written.
#[derive(Clone)]
pub struct TinyBert {
    pub config: Value,
    pub tokenizer: Value,
    pub tensors: BTreeMap<String, Stored>,
}

impl TinyBert {
    pub fn new(seed: u64, dtype: DType) -> Self {
        Self::with_prefix(seed, dtype, "")
    }

    pub fn with_prefix(seed: u64, dtype: DType, prefix: &str) -> Self {
        let (d, f) = (HIDDEN, INTERMEDIATE);
        let mut norms = vec!["embeddings".to_string()];
        let mut linears = vec![];
        for layer in 0..LAYERS {
            let layer = format!("encoder.layer.{layer}");
            norms.extend([format!("{layer}.attention.output"), format!("{layer}.output")]);
            linears.extend([
                (format!("{layer}.attention.self.query"), [d, d]),
                (format!("{layer}.attention.self.key"), [d, d]),
                (format!("{layer}.attention.self.value"), [d, d]),
                (format!("{layer}.attention.output.dense"), [d, d]),
                (format!("{layer}.intermediate.dense"), [f, d]),
                (format!("{layer}.output.dense"), [d, f]),
            ]);
        }
        // Name, shape, centre and spread of the values.
        let mut drawn = vec![
            ("embeddings.word_embeddings.weight".to_string(), vec![VOCAB.len(), d], 0.0, 1.0),
            ("embeddings.position_embeddings.weight".to_string(), vec![POSITIONS, d], 0.0, 0.2),
            ("embeddings.token_type_embeddings.weight".to_string(), vec![2, d], 0.0, 0.1),
        ];
        for name in norms {
            drawn.push((format!("{name}.LayerNorm.weight"), vec![d], 1.0, 0.1));
            drawn.push((format!("{name}.LayerNorm.bias"), vec![d], 0.0, 0.1));
        }
        for (name, [rows, cols]) in linears {
            let spread = 2.0 / (cols as f32).sqrt();
            drawn.push((format!("{name}.weight"), vec![rows, cols], 0.0, spread));
            drawn.push((format!("{name}.bias"), vec![rows], 0.0, 0.1));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut tensors = BTreeMap::new();
        for (name, shape, centre, spread) in drawn {
            let len = shape.iter().product();
            let draw = |_| centre + rng.random_range(-spread..spread);
            let values: Vec<f32> = (0..len).map(draw).collect();
            tensors.insert(format!("{prefix}{name}"), stored(dtype, &shape, &values));
        }
        let positions = (0..POSITIONS as i64).flat_map(i64::to_le_bytes).collect();
        let positions = Stored { dtype: Dtype::I64, shape: vec![1, POSITIONS], bytes: positions };
        tensors.insert(format!("{prefix}embeddings.position_ids"), positions);
        Self { config: config(), tokenizer: tokenizer(), tensors }
    }

    /// Writes one weight file.
    pub fn write(&self, folder: &Path) {
        self.write_small_files(folder);
        write_safetensors(&folder.join("model.safetensors"), self.tensors.iter());
    }

    /// Writes `shards` weight files and their index, the tensors dealt out one by one.
    pub fn write_sharded(&self, folder: &Path, shards: usize) {
        self.write_small_files(folder);
        let name = |shard: usize| format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        for shard in 0..shards {
            let tensors = self.tensors.iter().skip(shard).step_by(shards);
            write_safetensors(&folder.join(name(shard)), tensors);
        }
        let weight_map: BTreeMap<&String, String> =
            self.tensors.keys().enumerate().map(|(i, tensor)| (tensor, name(i % shards))).collect();
        let total_size: usize = self.tensors.values().map(|tensor| tensor.bytes.len()).sum();
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
        write_json(&folder.join("model.safetensors.index.json"), &index);
    }

    fn write_small_files(&self, folder: &Path) {
        std::fs::create_dir_all(folder.join("1_Pooling")).unwrap();
        write_json(&folder.join("config.json"), &self.config);
        write_json(&folder.join("tokenizer.json"), &self.tokenizer);
        let pooling =
            json!({ "word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": true });
        write_json(&folder.join("1_Pooling/config.json"), &pooling);
        std::fs::write(folder.join("LICENSE"), "Made in code.\n").unwrap();
        std::fs::write(folder.join("README.md"), "# A model card\n").unwrap();
    }
}

/// Opens a folder and reads everything that the encoder needs of it.
pub fn load(path: &Path) -> moefy::Result<()> {
    let folder = Folder::open(path)?;
    let (names, config) = (folder.names(), folder.config());
    let mut tensors = names.embeddings(config);
    for layer in 0..folder.num_layers() {
        tensors.extend(names.outside_ffn(layer, config));
        folder.ffn(layer)?;
    }
    for (name, shape) in tensors {
        match shape[..] {
            [len] => folder.vector(&name, len)?,
            [rows, cols] => folder.matrix(&name, [rows, cols])?,
            _ => unreachable!("vectors and matrices only"),
        };
    }
    Ok(())
}

/// Stores values in a format, rounding to nearest.
pub fn stored(dtype: DType, shape: &[usize], values: &[f32]) -> Stored {
    let values = values.iter();
    let (dtype, bytes) = match dtype {
        DType::F32 => (Dtype::F32, values.flat_map(|v| v.to_le_bytes()).collect()),
        DType::F16 => (Dtype::F16, values.flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
        DType::BF16 => {
            (Dtype::BF16, values.flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect())
        }
    };
    Stored { dtype, shape: shape.to_vec(), bytes }
}

/// Writes a safetensors file with the usual metadata.
pub fn write_safetensors<'a>(file: &Path, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) {
    let views = tensors
        .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), file).unwrap();
}

/// Every tensor of a folder's weight files.
pub fn read_tensors(folder: &Path) -> BTreeMap<String, Stored> {
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(path).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
            let stored = Stored {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                bytes: view.data().to_vec(),
            };
            assert!(tensors.insert(name.to_string(), stored).is_none(), "{name} comes twice");
        }
    }
    tensors
}

pub fn write_json(file: &Path, value: &Value) {
    std::fs::write(file, serde_json::to_string_pretty(value).unwrap()).unwrap();
}

pub fn read_json(file: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn config() -> Value {
    json!({
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "a key that nobody knows": [1, { "b": null }],
        "type_vocab_size": 2,
        "vocab_size": VOCAB.len(),
    })
}

fn tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> =
        VOCAB.iter().enumerate().map(|(id, token)| (token.to_string(), id.into())).collect();
    let special = |id: usize| {
        json!({ "id": id, "content": VOCAB[id], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true })
    };
    let marker = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let sequence = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (0..5).map(special).collect::<Vec<_>>(),
        "normalizer": { "type": "BertNormalizer", "clean_text": true,
                        "handle_chinese_chars": true, "strip_accents": null, "lowercase": true },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [marker("[CLS]"), sequence("A"), marker("[SEP]")],
            "pair": [marker("[CLS]"), sequence("A"), marker("[SEP]"),
                     { "Sequence": { "id": "B", "type_id": 1 } },
                     { "SpecialToken": { "id": "[SEP]", "type_id": 1 } }],
            "special_tokens": {
                "[CLS]": { "id": "[CLS]", "ids": [2], "tokens": ["[CLS]"] },
                "[SEP]": { "id": "[SEP]", "ids": [3], "tokens": ["[SEP]"] },
            },
        },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": { "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 100, "vocab": vocab },
    })
}
