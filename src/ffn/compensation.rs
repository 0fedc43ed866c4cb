//! What stands in for the experts that a token skips.

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A correction that is always on when present; its cost counts.
#[derive(Clone, Debug, PartialEq)]
pub enum Compensation {
    /// A skipped neuron contributes its mean: every neuron's activation becomes h − μ, and W2 μ is
    /// added once per token. With all experts selected the layer is still the dense FFN.
    Mean {
        /// μ \[d_ff\] in expert order: the mean activation over the calibration tokens that skip
        /// the neuron's expert; 0 for shared neurons. Which tokens skip is as it was when the layer
        /// was converted: a threshold that all layers share is found afterwards.
        mean: Tensor,
    },
    /// y gains U (V x) + c: a low-rank regression on what selection skips. With all experts
    /// selected the layer is the dense FFN plus this term.
    Linear {
        /// Uᵀ \[rank, d_model\].
        u: Tensor,
        /// V \[rank, d_model\].
        v: Tensor,
        /// c \[d_model\].
        c: Tensor,
    },
}

impl Compensation {
    /// Checks the tensors against the layer.
    ///
    /// # Errors
    /// On any shape that does not fit, or a value that is NaN or infinite.
    pub fn check(&self, d_ff: usize, d_model: usize) -> Result<()> {
        let named = match self {
            Self::Mean { mean } => vec![("mean", mean, [1, d_ff])],
            Self::Linear { u, v, c } => {
                let rank = v.shape()[0];
                vec![("u", u, [rank, d_model]), ("v", v, [rank, d_model]), ("c", c, [1, d_model])]
            }
        };
        for (name, tensor, shape) in named {
            if tensor.shape() != shape {
                let got = format!("{:?}", tensor.shape());
                let expected = format!("of shape {shape:?}");
                return Err(Error::argument("compensation", name, expected, got));
            }
            if let Some(([r, c], value)) = tensor.first_non_finite() {
                let got = format!("{value} at [{r}, {c}]");
                return Err(Error::argument("compensation", name, "finite everywhere", got));
            }
        }
        Ok(())
    }

    /// Multiply-adds of one token.
    pub fn macs_per_token(&self) -> u64 {
        match self {
            Self::Mean { .. } => 0,
            Self::Linear { u, v, .. } => (u.len() + v.len()) as u64,
        }
    }
}
