//! The kernel of [`experts`](super::experts) for one token of 16 bits, where a row is wide and a block can have enough shared
//! memory: both products in one launch.

use super::driver::{Function, RawStream};
use super::experts::{Launch, VECTOR_BYTES};
use super::kernels::{Half, Modules, half_names};
use super::{Device, add_shares};
use crate::abi::{MOEFY_EXPERTS_ONE_ROWS, moefy_experts_params};
use crate::dtype::DType;
use crate::error::Result;

/// Threads of a block of the variants, each of which takes a vector of every row, and how many blocks a multiprocessor has.
const THREADS: [usize; 2] = [256, 512];
const RESIDENT: [usize; 2] = [2, 1];
/// Narrower rows leave most threads without a vector.
const MIN_D_MODEL: usize = 1025;

/// Every device has them, but a block cannot have the shared memory of all of them everywhere.
pub(super) struct Kernels(Option<Half<{ THREADS.len() }>>);

impl Kernels {
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Self> {
        let names = half_names!("moefy_experts_one": "256", "512");
        let module = modules.module("experts_one").expect("the build compiles every module");
        let load = |name| module.function_with_all_shared(name, max_shared_bytes).map(Some);
        Half::load(names, load).map(Self)
    }
}

/// A launch, and places in the workspace.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    kernel: Function,
    dtype: DType,
    threads: usize,
    blocks: usize,
    shared_bytes: usize,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where these sizes are not for this kernel, or the device is not.
    pub(super) fn new(device: &Device, launch: &Launch) -> Option<Self> {
        let Launch { dtype, d_model, multiprocessors, .. } = *launch;
        let variants = device.experts.one.0.as_ref()?.of(dtype)?;
        let vector = VECTOR_BYTES / dtype.bytes();
        let enough = |threads: &usize| d_model <= threads * vector;
        let which = THREADS.iter().position(enough)?;
        let (kernel, available) = variants[which];
        let shared_bytes = MOEFY_EXPERTS_ONE_ROWS as usize * THREADS[which] * VECTOR_BYTES;
        let fits = launch.num_tokens == 1
            && d_model >= MIN_D_MODEL
            && d_model.is_multiple_of(vector)
            && shared_bytes <= available;
        let blocks = (multiprocessors * RESIDENT[which]).min(launch.d_ff + launch.rank);
        let bytes = blocks * d_model * size_of::<f32>();
        fits.then_some(Self { kernel, dtype, threads: THREADS[which], blocks, shared_bytes, bytes })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        stream: RawStream,
        params: &moefy_experts_params,
        workspace: u64,
    ) -> Result<()> {
        let params = moefy_experts_params { partials: workspace, ..*params };
        let shares = add_shares::of_experts(&params, self.blocks);
        let (grid, threads) = ([self.blocks as u32, 1, 1], self.threads as u32);
        // SAFETY: the caller's promise.
        unsafe {
            self.kernel.launch(stream, grid, threads, self.shared_bytes, &params)?;
            device.add_shares.launch(stream, self.dtype, &shares)
        }
    }
}
