//! Dense products, as cuBLASLt is asked for them.

use crate::dtype::DType;

/// What follows a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    Nothing,
    Bias,
    Relu,
    ReluBias,
    GeluTanh,
    GeluTanhBias,
}

/// out \[tokens, rows\] = epilogue(input \[tokens, depth\] · weightsᵀ); weights are \[rows, depth\], stored as
/// \[depth, rows\] where `depth_major`. Only the rows of `out` may lie apart.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "nothing multiplies"))]
#[derive(Clone, Copy, Debug)]
pub(super) struct ProductShape {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) out_stride: usize,
    pub(super) depth: usize,
    pub(super) depth_major: bool,
    pub(super) epilogue: Epilogue,
    /// So many are left to it; 0 for all.
    pub(super) multiprocessors: u32,
}

/// What a product is run on.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "nothing multiplies"))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) tokens: usize,
    pub(super) weights: u64,
    pub(super) input: u64,
    pub(super) out: u64,
    /// At least [`WORKSPACE_BYTES`](super::cublaslt::WORKSPACE_BYTES).
    pub(super) workspace: u64,
}
