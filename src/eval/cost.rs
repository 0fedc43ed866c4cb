//! What a model costs: multiply-adds counted from shapes and executed experts.

use serde::Serialize;

use crate::model::Ffn;

/// Multiply-adds of one FFN, as a function of the executed experts.
#[derive(Clone, Copy, Debug)]
pub struct FfnCost {
    d_ff: usize,
    shared: usize,
    expert_width: usize,
    /// Of the dense FFN, for one token.
    dense: f64,
    /// Router and compensation, for one token.
    fixed: f64,
}

impl From<&Ffn> for FfnCost {
    fn from(ffn: &Ffn) -> Self {
        match ffn {
            Ffn::Dense(dense) => Self {
                d_ff: dense.d_ff(),
                shared: dense.d_ff(),
                expert_width: 0,
                dense: dense.macs_per_token() as f64,
                fixed: 0.0,
            },
            Ffn::Moe(moe) => Self {
                d_ff: moe.d_ff(),
                shared: moe.shared(),
                expert_width: moe.expert_width(),
                dense: moe.neurons().macs_per_token() as f64,
                fixed: moe.macs_per_token(0.0)
                    - moe.density(0.0) * moe.neurons().macs_per_token() as f64,
            },
        }
    }
}

/// What a layer's FFN did for a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Executed {
    /// Nothing but b2.
    Nothing,
    /// Every neuron, without a router.
    Everything,
    /// This many (token, expert) pairs, and the shared neurons.
    Pairs(usize),
}

/// Sums over tokens and layers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    neurons: f64,
    dense_neurons: f64,
    ffn: f64,
    dense_ffn: f64,
    attention: f64,
}

impl Cost {
    /// Adds one layer's FFN over a batch.
    pub fn add_ffn(&mut self, ffn: &FfnCost, executed: Executed, num_tokens: usize) {
        let tokens = num_tokens as f64;
        let all = tokens * ffn.d_ff as f64;
        let (neurons, fixed) = match executed {
            Executed::Nothing => (0.0, 0.0),
            Executed::Everything => (all, 0.0),
            Executed::Pairs(pairs) => {
                let routed = (pairs * ffn.expert_width) as f64;
                (routed + tokens * ffn.shared as f64, tokens * ffn.fixed)
            }
        };
        self.neurons += neurons;
        self.dense_neurons += all;
        self.ffn += neurons / ffn.d_ff as f64 * ffn.dense + fixed;
        self.dense_ffn += tokens * ffn.dense;
    }

    /// Adds one layer's attention: four projections \[d, d\], and two products of a token with
    /// every token of its sequence.
    pub fn add_attention(&mut self, d_model: usize, lengths: impl Iterator<Item = usize>) {
        let d = d_model as f64;
        self.attention += lengths
            .map(|length| length as f64)
            .map(|length| length * (4.0 * d * d + 2.0 * length * d))
            .sum::<f64>();
    }

    /// ρ, over all layers.
    pub fn density(&self) -> f64 {
        self.neurons / self.dense_neurons
    }

    pub fn flops_saved(&self) -> FlopsSaved {
        let saved = self.dense_ffn - self.ffn;
        FlopsSaved { model: saved / (self.dense_ffn + self.attention), ffn: saved / self.dense_ffn }
    }
}

/// Shares of the dense model's multiply-adds that do not run; what the router costs is taken off.
/// The model counts projections, attention and FFNs, not the (cheap) embeddings and norms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FlopsSaved {
    /// Of the whole model.
    pub model: f64,
    /// Of its FFNs.
    pub ffn: f64,
}
