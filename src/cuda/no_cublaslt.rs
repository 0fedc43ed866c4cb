//! What stands in for cuBLASLt in a build without the feature `cuda`: nothing of it can exist.

use std::convert::Infallible;

use super::Device;
use super::driver::RawStream;
pub(super) use super::product::{Epilogue, Operands, ProductShape};
use crate::error::{Error, Result};

pub(super) const WORKSPACE_BYTES: usize = 0;

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

    pub(super) fn copies(&self, _: u64, _: usize) -> Result<Vec<u64>> {
        match self.0 {}
    }

    pub(super) fn fastest(
        &self,
        _: usize,
        _: f64,
        _: impl FnMut(usize, RawStream) -> Result<()>,
    ) -> Result<Option<usize>> {
        match self.0 {}
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

    pub(super) fn candidates(
        library: &CublasLt,
        _: &ProductShape,
        _: u64,
        _: usize,
    ) -> Result<Vec<Self>> {
        match library.0 {}
    }

    pub(super) fn with_bias(&self, _: u64) -> Result<Self> {
        match self.0 {}
    }

    pub(super) unsafe fn run(&self, _: &CublasLt, _: RawStream, _: &Operands) -> Result<()> {
        match self.0 {}
    }
}
