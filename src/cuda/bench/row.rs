//! One measurement as it is reported.

use serde::Serialize;

use crate::dtype::DType;
use crate::ffn::Activation;

/// What one measurement found; times are microseconds for one layer.
#[derive(Clone, Debug, Serialize)]
pub struct FfnRow {
    /// Width of a token.
    pub d_model: usize,
    /// Neurons.
    pub d_ff: usize,
    /// Whether the layer is gated.
    pub glu: bool,
    /// φ.
    pub activation: Activation,
    /// E.
    pub num_experts: usize,
    /// Neurons that every token runs.
    pub shared: usize,
    /// Of weights and activations.
    pub dtype: DType,
    /// "linear", or "d2dmoe-" and the hidden units.
    pub router: String,
    /// T.
    pub tokens: usize,
    /// "random", "random, top-k", or "trace:" and its name; a plan that was calibrated for another density says so.
    pub routing: String,
    /// Executed neurons / d_ff, as the routing has it: a path that runs more does not change it.
    pub density: f64,
    /// "exact" or "masked".
    pub fallback: &'static str,
    /// The path that ran.
    pub path: &'static str,
    /// Whether it was forced.
    pub path_forced: bool,
    /// Median time.
    pub us: f64,
    /// Median time of the dense layer, by turns with it.
    pub dense_us: f64,
    /// Median of the ratios of neighbouring pairs, dense to this.
    pub speedup: f64,
    /// Distance between the quartiles of those ratios, divided by their median.
    pub spread: f64,
    /// The time that executed bytes or operations need at best, whatever the path reads.
    pub bound_us: f64,
    /// bound_us / us.
    pub share_of_bound: f64,
    /// Weights of the union of the tokens' experts, of shared neurons and of the router; mean over the
    /// sets of weights. What the routing needs, also where a path reads more: the dense ones read all neurons, and so does
    /// [`Path::FewFused`](crate::cuda::Path::FewFused) where two to eight tokens of a narrow layer execute most of them.
    pub executed_bytes: usize,
    /// Router and selection. Of a path of one piece: those operations on their own.
    pub router_select_us: f64,
    /// Lists from masks; 0 where a path makes none of its own.
    pub index_us: f64,
    /// `us` less the two above. Of a path of one piece, all of `us`.
    pub experts_us: f64,
}
