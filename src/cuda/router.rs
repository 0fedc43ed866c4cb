//! The weights of a router on a device.

use super::view::{Format, View};
use super::{Buffer, Device};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{MlpKind, Router};

/// The weights of a router on a device, without gaps, in the format of the tokens.
#[derive(Clone, Copy, Debug)]
pub enum RouterView {
    /// r = |W x|, W \[E, d_model\].
    Linear {
        /// W.
        w: View,
    },
    /// Two layers.
    Mlp {
        /// Which activations.
        kind: MlpKind,
        /// W1 \[hidden, d_model\].
        w1: View,
        /// W2 \[E, hidden\].
        w2: View,
    },
    /// r = max(0, cos(x, c_e)).
    Centroid {
        /// c \[E, d_model\].
        centroids: View,
        /// 1/‖c_e‖, or 0 where c_e is zero, f32 \[1, E\].
        inverse_norms: View,
    },
}

impl RouterView {
    /// E.
    pub fn num_experts(&self) -> usize {
        match self {
            Self::Linear { w } | Self::Mlp { w2: w, .. } | Self::Centroid { centroids: w, .. } => {
                w.shape[0]
            }
        }
    }

    /// Width of a token.
    pub fn d_model(&self) -> usize {
        self.first().shape[1]
    }

    /// Weights of the first layer.
    pub(super) fn first(&self) -> View {
        match *self {
            Self::Linear { w } | Self::Mlp { w1: w, .. } | Self::Centroid { centroids: w, .. } => w,
        }
    }

    /// Width of the hidden layer; 0 where there is none.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Mlp { w1, .. } => w1.shape[0],
            _ => 0,
        }
    }
}

/// The weights of a router, on a device.
pub struct DeviceRouter {
    view: RouterView,
    /// What `view` leads to.
    _buffers: Vec<Buffer>,
}

impl DeviceRouter {
    /// Copies a router to the device, its weights rounded to `dtype`, the format of the tokens.
    ///
    /// # Errors
    /// When the device has too little memory.
    pub fn new(device: &Device, router: &Router, dtype: DType) -> Result<Self> {
        let mut buffers = Vec::new();
        let mut upload = |tensor: &crate::Tensor, dtype| {
            let buffer = Buffer::from_slice(device, tensor.to_dtype(dtype).as_bytes())?;
            let view = View::matrix(buffer.address(), Format::Float(dtype), tensor.shape());
            buffers.push(buffer);
            Ok(view)
        };
        let view = match router {
            Router::Linear { w } => RouterView::Linear { w: upload(w, dtype)? },
            Router::Mlp { kind, w1, w2 } => {
                RouterView::Mlp { kind: *kind, w1: upload(w1, dtype)?, w2: upload(w2, dtype)? }
            }
            Router::Centroid { centroids } => {
                let rounded = centroids.to_dtype(dtype).to_f64();
                let inverse_norm = |row: &[f64]| {
                    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
                    if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 }
                };
                let width = centroids.shape()[1].max(1);
                let inverse_norms = rounded.chunks_exact(width).map(inverse_norm).collect();
                RouterView::Centroid {
                    centroids: upload(centroids, dtype)?,
                    inverse_norms: upload(
                        &crate::Tensor::vector::<f32>(inverse_norms),
                        DType::F32,
                    )?,
                }
            }
        };
        Ok(Self { view, _buffers: buffers })
    }

    /// The weights, valid as long as `self`.
    pub fn view(&self) -> RouterView {
        self.view
    }
}
