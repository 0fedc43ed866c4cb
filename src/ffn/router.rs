//! Routers as data: how a token's expert scores come about.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The two published forms of the two-layer router, both d_model → hidden → E without biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MlpKind {
    /// r = |W2 relu(W1 x)| (D2DMoE, arXiv 2310.04361, section 3.2).
    D2dMoe,
    /// r = sigmoid(W2 tanh(W1 x/‖x‖)) (MoEfication, arXiv 2110.01786, section 3.3).
    Moefication,
}

/// Maps a token x to one score r\[e\] ≥ 0 per expert. Scores are computed and compared in f32,
/// whatever the format of the router's weights.
#[derive(Clone, Debug, PartialEq)]
pub enum Router {
    /// r = |W x|, W \[E, d_model\].
    Linear {
        /// W.
        w: Tensor,
    },
    /// Two layers.
    Mlp {
        /// Which activations, and whether the input is normalised.
        kind: MlpKind,
        /// W1 \[hidden, d_model\].
        w1: Tensor,
        /// W2 \[E, hidden\].
        w2: Tensor,
    },
    /// r = max(0, cos(x, c_e)), c \[E, d_model\]; 0 where x or c_e is zero.
    Centroid {
        /// One centroid per expert.
        centroids: Tensor,
    },
}

impl Router {
    /// Checks the weights against the layer they will route.
    ///
    /// # Errors
    /// On any shape that does not fit, or a value that is NaN or infinite.
    pub fn check(&self, num_experts: usize, d_model: usize) -> Result<()> {
        let named = match self {
            Self::Linear { w } => vec![("weight", w, [num_experts, d_model])],
            Self::Centroid { centroids } => vec![("centroids", centroids, [num_experts, d_model])],
            Self::Mlp { w1, w2, .. } => {
                let hidden = w1.shape()[0];
                if hidden == 0 {
                    return Err(Error::argument("router", "w1", "at least one hidden unit", 0));
                }
                vec![("w1", w1, [hidden, d_model]), ("w2", w2, [num_experts, hidden])]
            }
        };
        for (name, tensor, shape) in named {
            if tensor.shape() != shape {
                let got = format!("{:?}", tensor.shape());
                return Err(Error::argument("router", name, format!("of shape {shape:?}"), got));
            }
            if let Some(([r, c], value)) = tensor.first_non_finite() {
                let got = format!("{value} at [{r}, {c}]");
                return Err(Error::argument("router", name, "finite everywhere", got));
            }
        }
        Ok(())
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        match self {
            Self::Linear { w: t } | Self::Mlp { w2: t, .. } | Self::Centroid { centroids: t } => {
                t.shape()[0]
            }
        }
    }

    /// Element format of the weights.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Linear { w: t } | Self::Mlp { w1: t, .. } | Self::Centroid { centroids: t } => {
                t.dtype()
            }
        }
    }

    /// The same router with its weights rounded to another element type.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        match self {
            Self::Linear { w } => Self::Linear { w: w.to_dtype(dtype) },
            Self::Mlp { kind, w1, w2 } => {
                Self::Mlp { kind: *kind, w1: w1.to_dtype(dtype), w2: w2.to_dtype(dtype) }
            }
            Self::Centroid { centroids } => Self::Centroid { centroids: centroids.to_dtype(dtype) },
        }
    }

    /// Multiply-adds of one token.
    pub fn macs_per_token(&self) -> u64 {
        (match self {
            Self::Linear { w } => w.len(),
            Self::Mlp { w1, w2, .. } => w1.len() + w2.len(),
            Self::Centroid { centroids } => centroids.len(),
        }) as u64
    }
}
