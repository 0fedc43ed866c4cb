//! What stands in for the driver in a build without the feature `cuda`: nothing of it can exist.

use std::convert::Infallible;
use std::ffi::c_void;

use bytemuck::Pod;

use super::Properties;
use crate::abi::moefy_tensor_map;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A stream of the driver: a `CUstream`, or a `cudaStream_t`, which is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(pub *mut c_void);

#[derive(Clone)]
pub(super) struct Context(Infallible);

impl Context {
    pub(super) fn open(_: usize) -> Result<Self> {
        let problem = "this build lacks the crate's feature `cuda`".into();
        Err(Error::NoGpu { problem })
    }

    pub(super) fn properties(&self) -> Result<Properties> {
        match self.0 {}
    }

    pub(super) fn bind(&self) -> Result<()> {
        match self.0 {}
    }

    pub(super) fn load_module(&self, _: &str, _: &'static [u8], _: bool) -> Result<Module> {
        match self.0 {}
    }

    pub(super) fn device_of(&self, _: u64) -> Result<Option<i32>> {
        match self.0 {}
    }

    pub(super) fn free_bytes(&self) -> Result<usize> {
        match self.0 {}
    }

    pub(super) fn allocate(&self, _: usize) -> Result<u64> {
        match self.0 {}
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        match self.0 {}
    }

    pub(super) unsafe fn copy_to_host_beside(&self, _: &mut [u8], _: u64) -> Result<()> {
        match self.0 {}
    }

    pub(super) unsafe fn free(&self, _: u64) {
        match self.0 {}
    }

    pub(super) unsafe fn clear(&self, _: u64, _: usize) -> Result<()> {
        match self.0 {}
    }

    pub(super) unsafe fn copy_to_device(&self, _: u64, _: &[u8]) -> Result<()> {
        match self.0 {}
    }

    pub(super) unsafe fn copy_to_host(&self, _: &mut [u8], _: u64) -> Result<()> {
        match self.0 {}
    }
}

pub(super) struct Stream(Infallible);

impl Stream {
    pub(super) fn new(context: &Context) -> Result<Self> {
        match context.0 {}
    }

    pub(super) fn raw(&self) -> RawStream {
        match self.0 {}
    }

    pub(super) fn wait(&self) -> Result<()> {
        match self.0 {}
    }

    pub(super) fn capture(&self, _: impl FnOnce() -> Result<()>) -> Result<Option<Graph>> {
        match self.0 {}
    }
}

pub(super) struct Branch(Infallible);

impl Branch {
    pub(super) fn new(context: &Context) -> Result<Self> {
        match context.0 {}
    }

    pub(super) fn run(
        &self,
        _: RawStream,
        _: impl FnOnce(RawStream) -> Result<()>,
        _: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.0 {}
    }
}

pub(super) struct Graph(Infallible);

impl Graph {
    pub(super) fn launch(&self) -> Result<()> {
        match self.0 {}
    }
}

pub(super) struct Module(Infallible);

impl Module {
    pub(super) fn function(&self, _: &'static str, _: usize) -> Result<Function> {
        match self.0 {}
    }

    pub(super) fn function_of_large_clusters(
        &self,
        _: &'static str,
        _: usize,
        _: u32,
        _: u32,
    ) -> Result<Option<Function>> {
        match self.0 {}
    }

    pub(super) fn function_with_all_shared(
        &self,
        _: &'static str,
        _: usize,
    ) -> Result<(Function, usize)> {
        match self.0 {}
    }
}

#[derive(Clone, Copy)]
pub(super) struct Function(Infallible);

impl Function {
    pub(super) unsafe fn launch<P: Pod>(
        &self,
        _: RawStream,
        _: [u32; 3],
        _: u32,
        _: usize,
        _: &P,
    ) -> Result<()> {
        match self.0 {}
    }

    pub(super) unsafe fn launch_clusters<P: Pod>(
        &self,
        _: RawStream,
        _: [u32; 3],
        _: u32,
        _: u32,
        _: usize,
        _: &P,
    ) -> Result<()> {
        match self.0 {}
    }
}

/// Only what has a kernel asks for it.
pub(super) fn matrix_map(
    _: DType,
    _: u64,
    _: [u32; 2],
    _: u64,
    _: u32,
) -> Result<moefy_tensor_map> {
    unreachable!("there is no device")
}

/// Only what has a kernel asks for it.
pub(super) fn tensor_map<const N: usize>(
    _: DType,
    _: u64,
    _: [u64; N],
    _: &[u64],
    _: [u32; N],
) -> Result<moefy_tensor_map> {
    unreachable!("there is no device")
}
