//! What routing did over a sample of tokens, as data.

use serde::{Deserialize, Serialize};

/// Mean share of the experts that at least one token of a block of n consecutive tokens selects
/// (U_n), over all full blocks of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnionShares {
    /// U_8.
    pub u8: f64,
    /// U_16.
    pub u16: f64,
    /// U_64.
    pub u64: f64,
    /// U_128.
    pub u128: f64,
}

/// Routing of one layer over a sample of tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingStatistics {
    /// Tokens in the sample.
    pub num_tokens: usize,
    /// ρ: executed neurons / d_ff, shared ones included.
    pub density: f64,
    /// Mean number of experts of a token.
    pub mean_k: f64,
    /// Largest number of experts of a token.
    pub max_k: usize,
    /// Per expert, the share of the tokens that select it.
    pub hotness: Vec<f64>,
    /// Unions of neighbours in the text.
    pub union_text_order: UnionShares,
    /// Unions after ordering the tokens by their rarest active expert.
    pub union_rarest_first: UnionShares,
}
