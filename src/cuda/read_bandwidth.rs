//! How fast memory can be read.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use crate::abi::moefy_read_bandwidth_params;
use crate::error::Result;

/// Threads of a block, and blocks of a multiprocessor: as many as it holds.
const BLOCK: [usize; 2] = [512, 4];

pub(super) struct Kernels {
    read: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self { read: modules.function("read_bandwidth", "moefy_read_bandwidth", 0)? })
    }
}

/// Threads that read, each of which writes a word.
pub(super) fn num_threads(device: &Device) -> usize {
    device.properties().multiprocessors * BLOCK[0] * BLOCK[1]
}

/// # Safety
/// The addresses must be what the kernel expects, and the context must be bound.
pub(super) unsafe fn read_bandwidth(
    device: &Device,
    stream: RawStream,
    params: &moefy_read_bandwidth_params,
) -> Result<()> {
    let grid = [(device.properties().multiprocessors * BLOCK[1]) as u32, 1, 1];
    // SAFETY: the caller's promise.
    unsafe { device.read_bandwidth.read.launch(stream, grid, BLOCK[0] as u32, 0, params) }
}
