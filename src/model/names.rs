//! The names of a BERT-family encoder's tensors: the one place that knows them.

use super::Config;

/// Weight and bias of a linear layer or a layer norm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightBias {
    /// The name of the weight: \[out, in\] of a linear layer, \[d_model\] of a layer norm.
    pub weight: String,
    /// The name of the bias.
    pub bias: String,
}

/// How a file names its tensors. Checkpoints differ in a prefix (a bare encoder has none, one with
/// a task head has "bert." or "roberta.") and in how old ones call the tensors of a layer norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    prefix: &'static str,
    norm: [&'static str; 2],
}

impl Names {
    const PREFIXES: [&'static str; 3] = ["", "bert.", "roberta."];

    /// The scheme of a file; `has` says whether it holds a tensor. Where it holds none of the known
    /// names, the scheme is the plain one, whose tensors are then reported missing.
    pub fn detect(has: impl Fn(&str) -> bool) -> Self {
        let plain = Self { prefix: "", norm: ["weight", "bias"] };
        let prefixed = Self::PREFIXES.map(|prefix| Self { prefix, ..plain });
        let names = prefixed.into_iter().find(|names| has(&names.word_embeddings()));
        let names = names.unwrap_or(plain);
        let old = Self { norm: ["gamma", "beta"], ..names };
        if has(&old.embedding_norm().weight) { old } else { names }
    }

    /// \[vocab_size, hidden_size\]
    pub fn word_embeddings(&self) -> String {
        self.embedding("word_embeddings")
    }

    /// \[max_position_embeddings, hidden_size\]
    pub fn position_embeddings(&self) -> String {
        self.embedding("position_embeddings")
    }

    /// \[type_vocab_size, hidden_size\]
    pub fn token_type_embeddings(&self) -> String {
        self.embedding("token_type_embeddings")
    }

    /// The norm after the sum of the embeddings.
    pub fn embedding_norm(&self) -> WeightBias {
        self.norm(&format!("{}embeddings", self.prefix))
    }

    /// \[hidden_size, hidden_size\]
    pub fn query(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "attention.self.query")
    }

    /// \[hidden_size, hidden_size\]
    pub fn key(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "attention.self.key")
    }

    /// \[hidden_size, hidden_size\]
    pub fn value(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "attention.self.value")
    }

    /// \[hidden_size, hidden_size\], after the heads are joined.
    pub fn attention_output(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "attention.output.dense")
    }

    /// The norm after attention and its residual.
    pub fn attention_norm(&self, layer: usize) -> WeightBias {
        self.norm(&format!("{}.attention.output", self.layer(layer)))
    }

    /// W1 \[intermediate_size, hidden_size\] and b1.
    pub fn ffn_input(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "intermediate.dense")
    }

    /// W2 \[hidden_size, intermediate_size\] and b2.
    pub fn ffn_output(&self, layer: usize) -> WeightBias {
        self.weight_bias(layer, "output.dense")
    }

    /// The norm after the FFN and its residual.
    pub fn ffn_norm(&self, layer: usize) -> WeightBias {
        self.norm(&format!("{}.output", self.layer(layer)))
    }

    /// A tensor of a MoEfied FFN, such as `w_in` or `router.w1`; all of a layer's with `part` "".
    pub fn moefy(&self, layer: usize, part: &str) -> String {
        format!("{}.moefy.{part}", self.layer(layer))
    }

    /// Name and shape of every tensor of the embeddings.
    pub fn embeddings(&self, config: &Config) -> Vec<(String, Vec<usize>)> {
        let d = config.hidden_size;
        let norm = self.embedding_norm();
        vec![
            (self.word_embeddings(), vec![config.vocab_size, d]),
            (self.position_embeddings(), vec![config.max_position_embeddings, d]),
            (self.token_type_embeddings(), vec![config.type_vocab_size, d]),
            (norm.weight, vec![d]),
            (norm.bias, vec![d]),
        ]
    }

    /// Name and shape of every tensor of a layer outside its FFN.
    pub fn outside_ffn(&self, layer: usize, config: &Config) -> Vec<(String, Vec<usize>)> {
        let d = config.hidden_size;
        let attention = [self.query(layer), self.key(layer), self.value(layer)];
        let linears = attention.into_iter().chain([self.attention_output(layer)]);
        let norms = [self.attention_norm(layer), self.ffn_norm(layer)].into_iter();
        let shaped = linears.map(|n| (n, vec![d, d])).chain(norms.map(|n| (n, vec![d])));
        shaped.flat_map(|(n, dims)| [(n.weight, dims), (n.bias, vec![d])]).collect()
    }

    /// Name and shape of the tensors of a dense FFN.
    pub fn dense_ffn(&self, layer: usize, config: &Config) -> [(String, Vec<usize>); 4] {
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let [input, output] = [self.ffn_input(layer), self.ffn_output(layer)];
        [
            (input.weight, vec![f, d]),
            (input.bias, vec![f]),
            (output.weight, vec![d, f]),
            (output.bias, vec![d]),
        ]
    }

    fn embedding(&self, name: &str) -> String {
        format!("{}embeddings.{name}.weight", self.prefix)
    }

    fn layer(&self, layer: usize) -> String {
        format!("{}encoder.layer.{layer}", self.prefix)
    }

    fn weight_bias(&self, layer: usize, name: &str) -> WeightBias {
        let path = format!("{}.{name}", self.layer(layer));
        WeightBias { weight: format!("{path}.weight"), bias: format!("{path}.bias") }
    }

    fn norm(&self, path: &str) -> WeightBias {
        let [weight, bias] = self.norm;
        WeightBias {
            weight: format!("{path}.LayerNorm.{weight}"),
            bias: format!("{path}.LayerNorm.{bias}"),
        }
    }
}
