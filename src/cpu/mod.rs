//! The CPU backend: f32 activations in and out, f32 arithmetic, weights widened to f32 once.
//! Experts that no token selects cost nothing.
//!
//! Work runs on rayon's current pool. Every output element is computed by one thread in an order
//! that the code fixes, so results do not depend on the number of threads.

mod linear;

pub use linear::{Matrix, MatrixMut, gemm, linear};
