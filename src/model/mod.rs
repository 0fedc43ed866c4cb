//! Model folders in the Hugging Face layout, and what moefy makes of them.
//!
//! A converted folder is a Hugging Face folder again: `config.json` keeps every key and gains a
//! `moefy` object ([`MoefyConfig`]), and the four tensors of each converted FFN give way to those
//! below `….moefy.`, with F neurons in expert order:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `w_in`, `b_in` | \[F, d\], \[F\] | rows of W1, elements of b1 |
//! | `w_out`, `b_out` | \[F, d\], \[d\] | columns of W2, as rows; b2 |
//! | `labels` | \[F\], i32 | the expert of each *original* neuron; E for a shared one |
//! | `router.weight` | \[E, d\] | [`Router::Linear`](crate::ffn::Router::Linear) |
//! | `router.w1`, `router.w2` | \[h, d\], \[E, h\] | [`Router::Mlp`](crate::ffn::Router::Mlp) |
//! | `router.centroids` | \[E, d\] | [`Router::Centroid`](crate::ffn::Router::Centroid) |
//! | `compensation.*` | | [`Compensation`](crate::ffn::Compensation) |
//!
//! All other tensors and files are carried over as they are.
//!
//! An [`Encoder`] is a folder's model on a [`Backend`]; [`embed`] turns token sequences into sentence
//! embeddings with it.

mod backend;
mod batch;
mod config;
mod embed;
mod encoder;
mod ffn_tensors;
mod folder;
pub mod format;
mod names;
mod output;
mod random;
mod replacements;
mod shards;
#[cfg(feature = "cli")]
mod tokenizer;
mod weights_out;
mod write;

pub use backend::{Backend, Embeddings, FfnRun, LayerNorm, Linear};
pub use batch::{BATCH_TOKENS, Batch, batches, batches_in_order};
pub use config::{Architecture, Config};
pub use embed::embed;
pub(crate) use encoder::Surroundings;
pub use encoder::{DeviceBatch, Encoder, MaskObserver, Workspace};
pub use folder::{Ffn, Folder};
pub use format::MoefyConfig;
pub use names::{Names, WeightBias};
pub use output::Output;
pub use random::EncoderShape;
#[cfg(feature = "cli")]
pub use tokenizer::Tokenizer;
pub use write::{Conversion, ConvertedLayer, restore, retune, round, write_moefied};
