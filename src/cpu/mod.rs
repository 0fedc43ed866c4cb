//! The CPU backend: f32 activations in and out, f32 arithmetic, weights widened to f32 once.
//! Experts that no token selects are neither read nor computed.
//!
//! Work runs on rayon's current pool. Every output element is summed in one order that neither the
//! number of threads nor the other tokens of the batch change.

mod activation;
mod buffer;
mod dense_ffn;
mod gates;
mod index;
mod kernels;
mod linear;
mod moe_ffn;
mod neurons;
mod router;
mod select;
mod transformer;
mod workspace;

pub use activation::activate;
pub(crate) use activation::activate_with_slope;
pub use dense_ffn::DenseFfn;
pub use linear::{Matrix, MatrixMut, gemm, linear};
pub use moe_ffn::{MoeFfn, Routed};
pub use router::router_scores;
pub use select::select;
pub use transformer::{Cpu, CpuBatch, CpuFfn, CpuFfnWorkspace};
pub use workspace::Workspace;

use crate::error::{Error, Result};

/// More tokens than this run through experts one batch after another, which bounds their workspace; the
/// router's grows with the tokens.
const TOKENS_AT_ONCE: usize = 1024;

/// T of x \[T, d_model\].
fn tokens_of(op: &'static str, x: &[f32], d_model: usize) -> Result<usize> {
    if d_model > 0 && x.len().is_multiple_of(d_model) {
        return Ok(x.len() / d_model);
    }
    let expected = format!("a whole number of tokens of {d_model} values");
    Err(Error::argument(op, "x", expected, format!("{} values", x.len())))
}

fn check_rows(
    op: &'static str,
    argument: &str,
    len: usize,
    rows: usize,
    cols: usize,
) -> Result<()> {
    // Both are counts of values in memory, or nearly: no overflow.
    if len == rows * cols {
        return Ok(());
    }
    let expected = format!("of {rows} x {cols} values");
    Err(Error::argument(op, argument, expected, format!("{len} values")))
}
