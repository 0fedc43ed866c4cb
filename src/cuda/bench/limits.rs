//! What the machine can do at best, as measured.

use std::sync::Arc;

use cudarc::driver::{CudaStream, sys};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::graph::TimedGraph;
use crate::abi::moefy_read_bandwidth_params;
use crate::cuda::cublaslt::{
    CublasLt, Epilogue, Operands, Product, ProductShape, Timer, WORKSPACE_BYTES,
};
use crate::cuda::driver::cannot;
use crate::cuda::read_bandwidth::{num_threads, read_bandwidth};
use crate::cuda::synthetic::random;
use crate::cuda::{Buffer, Device};
use crate::dtype::DType;
use crate::error::Result;

/// Bytes that are copied and read: far more than any cache holds.
const BYTES: usize = 1 << 30;
/// Rows and columns of the product.
const SIDE: usize = 8192;
/// Repetitions, of which the fastest counts.
const REPETITIONS: usize = 6;

/// What the machine can do at best, as measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Read from memory.
    pub read_bytes_per_second: f64,
    /// Read and written by a copy from memory to memory.
    pub copy_bytes_per_second: f64,
    /// A large product of the element type.
    pub flops_per_second: f64,
}

impl Limits {
    /// Measures them, for products of `dtype`.
    ///
    /// # Errors
    /// When cuBLASLt is missing or the device has too little memory.
    pub fn measure(device: &Arc<Device>, dtype: DType) -> Result<Self> {
        let stream = device.cudarc_context().new_stream().map_err(cannot("create a stream"))?;
        Ok(Self {
            read_bytes_per_second: BYTES as f64 / read_seconds(device, &stream)?,
            copy_bytes_per_second: 2.0 * BYTES as f64 / copy_seconds(device, &stream)?,
            flops_per_second: 2.0 * (SIDE as f64).powi(3)
                / product_seconds(device, &stream, dtype)?,
        })
    }
}

fn read_seconds(device: &Device, stream: &Arc<CudaStream>) -> Result<f64> {
    let (data, folded) =
        (Buffer::new(device, BYTES)?, Buffer::new(device, 4 * num_threads(device))?);
    let params = moefy_read_bandwidth_params {
        data: data.address(),
        folded: folded.address(),
        data_bytes: BYTES as u64,
    };
    // SAFETY: the buffers have these sizes and outlive the graph.
    best(&TimedGraph::capture(stream, 1, |stream, _| unsafe {
        read_bandwidth(device, stream, &params)
    })?)
}

fn copy_seconds(device: &Device, stream: &Arc<CudaStream>) -> Result<f64> {
    let [from, to] = [Buffer::new(device, BYTES)?, Buffer::new(device, BYTES)?];
    let [from_address, to_address] = [&from, &to].map(Buffer::address);
    best(&TimedGraph::capture(stream, 1, |stream, _| {
        // SAFETY: both buffers have this size and outlive the graph.
        unsafe { sys::cuMemcpyDtoDAsync_v2(to_address, from_address, BYTES, stream.0.cast()) }
            .result()
            .map_err(cannot("copy on the device"))
    })?)
}

fn product_seconds(device: &Device, stream: &Arc<CudaStream>, dtype: DType) -> Result<f64> {
    let matrix = random(&mut ChaCha8Rng::seed_from_u64(0), [SIDE, SIDE], 1.0, dtype);
    let matrix = Buffer::from_slice(device, matrix.as_bytes())?;
    let out = Buffer::new(device, matrix.bytes())?;
    let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
    let library = CublasLt::open()?;
    let shape = ProductShape {
        dtype,
        rows: SIDE,
        out_stride: SIDE,
        depth: SIDE,
        depth_major: false,
        epilogue: Epilogue::Nothing,
        multiprocessors: 0,
    };
    let operands = Operands {
        tokens: SIDE,
        weights: matrix.address(),
        input: matrix.address(),
        out: out.address(),
        workspace: workspace.address(),
    };
    // SAFETY: the buffers have the shape's sizes and outlive the graph.
    unsafe {
        let product = Product::tune(&library, &Timer::new(device)?, &shape, 0, &operands)?;
        best(&TimedGraph::capture(stream, 1, |stream, _| product.run(&library, stream, &operands))?)
    }
}

fn best(graph: &TimedGraph) -> Result<f64> {
    Ok(graph.times(REPETITIONS)?.into_iter().fold(f64::INFINITY, f64::min) / 1e6)
}
