//! The tokens of a batch that are padding.

use super::Device;
use super::driver::{Function, RawStream};
use super::kernels::Modules;
use crate::abi::{moefy_clear_invalid_params, moefy_split_valid_params};
use crate::error::Result;

pub(super) struct Kernels {
    clear_invalid: Function,
    split_valid: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self {
            clear_invalid: modules.function("padding", "moefy_clear_invalid", 0)?,
            split_valid: modules.function("padding", "moefy_split_valid", 0)?,
        })
    }
}

/// # Safety
/// The addresses must be what the kernel expects, and the context must be bound.
pub(super) unsafe fn clear_invalid(
    device: &Device,
    stream: RawStream,
    params: &moefy_clear_invalid_params,
) -> Result<()> {
    let blocks = device.properties().multiprocessors as u32;
    // SAFETY: the caller's promise.
    unsafe { device.padding.clear_invalid.launch(stream, [blocks, 1, 1], 256, 0, params) }
}

/// # Safety
/// The addresses must be what the kernel expects, and the context must be bound.
pub(super) unsafe fn split_valid(
    device: &Device,
    stream: RawStream,
    params: &moefy_split_valid_params,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { device.padding.split_valid.launch(stream, [1, 1, 1], 256, 0, params) }
}
