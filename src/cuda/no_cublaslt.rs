//! What stands in for cuBLASLt in a build without the feature `cuda`: nothing of it can exist.

use std::convert::Infallible;

use super::Device;
use super::driver::RawStream;
use crate::dtype::DType;
use crate::error::{Error, Result};

pub(super) const WORKSPACE_BYTES: usize = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    Nothing,
    Bias,
    Relu,
    ReluBias,
    GeluTanh,
    GeluTanhBias,
}

#[expect(dead_code, reason = "nothing reads it here")]
#[derive(Clone, Copy, Debug)]
pub(super) struct ProductShape {
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) out_stride: usize,
    pub(super) depth: usize,
    pub(super) depth_major: bool,
    pub(super) epilogue: Epilogue,
}

#[expect(dead_code, reason = "nothing reads it here")]
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    pub(super) tokens: usize,
    pub(super) weights: u64,
    pub(super) input: u64,
    pub(super) out: u64,
    pub(super) workspace: u64,
}

pub(super) struct CublasLt(Infallible);

impl CublasLt {
    pub(super) fn open() -> Result<Self> {
        Err(Error::NoGpu { problem: "this build lacks the crate's feature `cuda`".into() })
    }
}

pub(super) struct Timer(Infallible);

impl Timer {
    pub(super) fn new(_: &Device) -> Result<Self> {
        CublasLt::open().map(|library| match library.0 {})
    }
}

pub(super) struct Product(Infallible);

impl Product {
    pub(super) unsafe fn tune(
        library: &CublasLt,
        _: &Timer,
        _: &ProductShape,
        _: u64,
        _: &Operands,
    ) -> Result<Self> {
        match library.0 {}
    }

    pub(super) fn with_bias(&self, _: u64) -> Result<Self> {
        match self.0 {}
    }

    pub(super) unsafe fn run(&self, _: &CublasLt, _: RawStream, _: &Operands) -> Result<()> {
        match self.0 {}
    }
}
