//! The mathematics as plain f64 loops, one file per operation. This is the specification: every
//! other path is tested against it. Weights enter exactly as stored; nothing in between is rounded,
//! except the scores, which selection compares in f32.

mod attention;
mod dense_ffn;
mod embed_tokens;
mod experts;
mod layer_norm;
mod linear;
mod pool;
mod rms_norm;
mod rotary;
mod route_index;
mod router_scores;
mod select;
mod token_tiles;
mod transformer;

pub use attention::{Heads, attention, grouped_attention};
pub use dense_ffn::dense_ffn;
pub use embed_tokens::embed_tokens;
pub use experts::experts;
pub use layer_norm::layer_norm;
pub use linear::linear;
pub use pool::pool;
pub use rms_norm::rms_norm;
pub use rotary::rotary;
pub use route_index::{RouteIndex, route_index};
pub use router_scores::router_scores;
pub use select::{Selected, select};
pub use token_tiles::{TokenTiles, token_tiles};
pub use transformer::{Reference, ReferenceBatch};

use crate::ffn::{ExpertMask, MoeFfn};
use crate::tensor::Tensor;

/// A MoEfied FFN from end to end: scores, selection, experts. x \[T, d_model\] → y \[T, d_model\]
/// and S(t).
pub fn moe_ffn(ffn: &MoeFfn, x: &[f64]) -> (Vec<f64>, ExpertMask) {
    let scores = router_scores(ffn.router(), x, ffn.d_model());
    let scores_f32: Vec<f32> = scores.iter().map(|&r| r as f32).collect();
    let mask = select(&ffn.selection(), &scores_f32, ffn.num_experts()).mask;
    (experts(ffn, x, &mask, Some(&scores)), mask)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The vector, or zeros where there is none.
fn optional(vector: Option<&Tensor>, len: usize) -> Vec<f64> {
    vector.map_or_else(|| vec![0.0; len], Tensor::to_f64)
}
