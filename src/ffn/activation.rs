//! The activation φ of a feed-forward layer.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// φ, applied element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// max(0, z); 0 for NaN
    Relu,
    /// z/2 · (1 + erf(z/√2)), the exact GELU
    Gelu,
    /// z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))
    GeluTanh,
    /// z / (1 + e^−z), also called swish
    Silu,
    /// z
    Identity,
}

impl Activation {
    /// Every activation, in the order of the documentation.
    pub const ALL: [Self; 5] = [Self::Relu, Self::Gelu, Self::GeluTanh, Self::Silu, Self::Identity];

    /// The activation that a Hugging Face `hidden_act` names.
    ///
    /// # Errors
    /// For a name that is none of the known ones; the error lists them.
    pub fn from_hf_name(name: &str) -> Result<Self> {
        Ok(match name {
            "relu" => Self::Relu,
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Self::GeluTanh,
            "silu" | "swish" => Self::Silu,
            "linear" | "identity" => Self::Identity,
            other => {
                return Err(Error::argument(
                    "ffn",
                    "activation",
                    "one of relu, gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, silu, swish, \
                     linear, identity",
                    format!("`{other}`"),
                ));
            }
        })
    }

    /// φ(z) in f64: the definition that every other path is tested against.
    pub fn apply(self, z: f64) -> f64 {
        match self {
            Self::Relu => z.max(0.0),
            Self::Gelu => 0.5 * z * (1.0 + libm::erf(z * std::f64::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (z + 0.044715 * z * z * z);
                0.5 * z * (1.0 + inner.tanh())
            }
            Self::Silu => z / (1.0 + (-z).exp()),
            Self::Identity => z,
        }
    }
}
