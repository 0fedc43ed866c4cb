//! The operations of a Transformer that are not its FFNs.

mod attention;
mod embed_tokens;
mod norm;
mod pool;
mod rotary;

pub use attention::{AttentionInputs, attention};
pub use embed_tokens::{EmbeddingTables, embed_tokens};
pub use norm::{NormInputs, norm};
pub use pool::pool;
pub use rotary::rotary;

use super::kernels::{Modules, PerDType};
use super::view::{Arguments, Format, View};
use crate::dtype::DType;
use crate::error::Result;

/// Bytes that the kernels load at a time.
const VECTOR_BYTES: usize = 16;

pub(super) struct Kernels {
    attention: attention::Kernels,
    embed_tokens: PerDType,
    norm: norm::Kernels,
    pool: PerDType,
    rotary: PerDType,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self {
            attention: attention::Kernels::load(modules)?,
            embed_tokens: embed_tokens::load(modules)?,
            norm: norm::Kernels::load(modules)?,
            pool: pool::load(modules)?,
            rotary: rotary::load(modules)?,
        })
    }
}

impl Arguments<'_> {
    /// The element type of activations.
    fn float(&self, name: &str, view: View) -> Result<DType> {
        match view.format {
            Format::Float(dtype) => Ok(dtype),
            Format::Word => Err(self.error(name, "of type f32, f16 or bf16", view.format)),
        }
    }

    /// A width that vectors of eight fill.
    fn width(&self, name: &str, width: usize, most: usize) -> Result<u32> {
        if width == 0 || !width.is_multiple_of(8) || width > most {
            return Err(self.error(name, format!("a multiple of 8 up to {most}"), width));
        }
        Ok(width as u32)
    }

    /// The address of a matrix without gaps whose rows are loaded in vectors.
    fn rows(&self, name: &str, view: View, dtype: DType, shape: [usize; 2]) -> Result<u64> {
        self.dense(name, view, Format::Float(dtype), shape)?;
        self.strided(name, view, Format::Float(dtype), shape, VECTOR_BYTES)
    }
}
