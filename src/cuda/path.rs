//! Which way a layer is computed.

use super::MoeFfn;
use super::dense::DenseLayer;
#[cfg(feature = "cuda")]
use super::plan::Stage;
use super::view::View;
use crate::error::Result;

/// Most tokens for which a choice streams the union of their experts.
pub(super) const MAX_FEW_TOKENS: usize = 8;
/// What that must save on reading weights to be chosen, in microseconds: routing, more launches and
/// shorter reads than a dense product cost about as much (measured on an H200; kernels/NOTES.md).
const FEW_OVERHEAD_US: f64 = 80.0;
/// Bytes that a GPU with HBM3 reads in a microsecond.
const BYTES_PER_US: f64 = 4e6;

/// A way to compute the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// `few`: streams the union of the tokens' experts.
    Few,
    /// `expert-major`: each expert with its own tokens.
    ExpertMajor,
    /// `dense-exact`: the original FFN.
    DenseExact,
    /// `dense-masked`: the function of the experts, computed densely.
    DenseMasked,
}

impl Path {
    /// Every path.
    pub const ALL: [Self; 4] = [Self::Few, Self::ExpertMajor, Self::DenseExact, Self::DenseMasked];

    /// Its name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Few => "few",
            Self::ExpertMajor => "expert-major",
            Self::DenseExact => "dense-exact",
            Self::DenseMasked => "dense-masked",
        }
    }

    /// Where a run can be stopped to see what each part costs; a path of one piece has no such place.
    #[cfg(feature = "cuda")]
    pub(super) fn stages(self) -> &'static [Stage] {
        match self {
            Self::Few | Self::ExpertMajor => &[Stage::Route, Stage::Index],
            Self::DenseMasked => &[Stage::Route],
            _ => &[],
        }
    }
}

/// What runs where the dense products are faster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The original FFN, without a router: at least as accurate as the sparse one.
    #[default]
    Exact,
    /// The sparse layer's own function: one function at every number of tokens.
    Masked,
}

/// What a plan may choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanOptions {
    /// Always this path; `None` chooses by the number of tokens.
    pub path: Option<Path>,
    /// What a choice may fall back to.
    pub fallback: Fallback,
    /// Calibrated mean density, if it is known: what a choice by the number of tokens goes by.
    pub density: Option<f64>,
    /// Whether to count what selection does.
    pub statistics: bool,
}

/// What a run reads.
#[derive(Clone, Copy, Debug)]
pub struct FfnInputs {
    /// \[num_tokens, d_model\], without gaps, aligned to 16 bytes, of the weights' element type.
    pub x: View,
    /// u32 \[1, 1\]: rows at and beyond it are padding and come back as zeros.
    pub num_valid_tokens: Option<View>,
    /// f32 \[num_tokens, num_experts\]: selection reads these scores instead of the router's, which
    /// runs all the same. For measurements under imposed routing.
    pub scores: Option<View>,
    /// One word that gains status bits; see [`SelectOutputs`](super::SelectOutputs) and
    /// [`RouteIndexOutputs`](super::RouteIndexOutputs).
    pub status: Option<View>,
}

impl FfnInputs {
    /// Nothing but tokens.
    pub fn new(x: View) -> Self {
        Self { x, num_valid_tokens: None, scores: None, status: None }
    }
}

impl MoeFfn {
    /// The path for so many tokens.
    pub(super) fn path(&self, num_tokens: usize, options: &PlanOptions) -> Path {
        match (options.path, options.fallback) {
            (Some(path), _) => path,
            (None, _) if self.is_worth_streaming(num_tokens, options) => Path::Few,
            (None, Fallback::Exact) => Path::DenseExact,
            (None, Fallback::Masked) => Path::DenseMasked,
        }
    }

    /// Whether the experts that nobody needs are worth the overhead, if tokens route independently.
    fn is_worth_streaming(&self, num_tokens: usize, options: &PlanOptions) -> bool {
        let neurons = self.neurons();
        let skipped = (1.0 - options.density.unwrap_or(1.0)).powi(num_tokens.min(1 << 20) as i32);
        let rows = neurons.w_in.shape[0] + neurons.w_out.shape[0];
        let bytes = (rows * neurons.d_model() * self.dtype().bytes()) as f64;
        num_tokens <= MAX_FEW_TOKENS && skipped * bytes > FEW_OVERHEAD_US * BYTES_PER_US
    }

    /// What cuBLASLt has to do for at most so many tokens, if anything.
    pub(super) fn dense_layer_of(
        &self,
        max_tokens: usize,
        options: &PlanOptions,
    ) -> Result<Option<DenseLayer>> {
        match self.path(max_tokens, options) {
            _ if max_tokens == 0 => Ok(None),
            Path::DenseExact => self.exact().map(Some),
            Path::DenseMasked => self.masked().map(Some),
            Path::Few | Path::ExpertMajor => Ok(None),
        }
    }
}
