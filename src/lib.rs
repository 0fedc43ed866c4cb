//! moefy turns the dense feed-forward layers of a pretrained Transformer into mixtures of experts
//! (MoEfication), routes every token to as many experts as it needs (dynamic-k), and skips the
//! rest.
//!
//! | module | what |
//! |---|---|
//! | [`convert`] | makes a mixture of experts of a dense layer |
//! | [`cpu`] | runs it on the CPU |
//! | [`cuda`] | NVIDIA GPUs: one wrapper per kernel, for engines with streams and graphs of their own |
//! | [`eval`] | quality, density, cost and speed against the dense model |
//! | [`ffn`] | one layer as data: dense weights, partition, experts, router, selection |
//! | [`model`] | model folders: reading, converting, restoring; encoders that run them |
//! | [`reference`](mod@reference) | the mathematics as plain f64 loops: the specification |
#![warn(missing_docs)]

pub mod abi;
pub mod convert;
pub mod cpu;
pub mod cuda;
pub mod dtype;
pub mod error;
pub mod eval;
pub mod ffn;
pub mod model;
pub mod reference;
pub mod tensor;

pub use dtype::DType;
pub use error::{Error, Result};
pub use tensor::{Tensor, TensorRef};
