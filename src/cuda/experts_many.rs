//! The kernels of [`experts`](super::experts) for many tokens: expert by expert.

use super::driver::RawStream;
use super::experts::{Launch, THREADS, Variants, variants};
use super::kernels::Modules;
use super::workspace::Layout;
use crate::abi::{MOEFY_MAX_EXPERTS, moefy_experts_params};
use crate::dtype::DType;
use crate::error::Result;

/// Tokens of a block.
const TOKENS: usize = 128;
/// Bytes of a row of a tile in shared memory.
const ROW_BYTES: usize = 128;
/// Input rows of a block of the first kernel: of the variants small to large.
const ROWS: [usize; 3] = [32, 64, 128];
/// Columns of y of a block of the second kernel.
const COLUMNS: usize = 64;

pub(super) struct Kernels {
    hidden: Variants,
    combine: Variants,
    combine_stages: usize,
}

impl Kernels {
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Self> {
        let max_experts = MOEFY_MAX_EXPERTS as usize;
        let shared = |bytes: usize| bytes.min(max_shared_bytes);
        let combine_stages = if combine_shared_bytes(3, 0) <= max_shared_bytes { 3 } else { 2 };
        let combine_names = match combine_stages {
            2 => variants!("moefy_experts_many_combine_", "2", ["2", "2", "2"]),
            _ => variants!("moefy_experts_many_combine_", "3", ["3", "3", "3"]),
        };
        Ok(Self {
            hidden: Variants::load(
                modules,
                "experts_many_hidden",
                variants!("moefy_experts_many_hidden_", "64", ["32", "64", "128"]),
                [0, 1, 2].map(|size| shared(hidden_shared_bytes(size, max_experts))),
            )?,
            combine: Variants::load(
                modules,
                "experts_many_combine",
                combine_names,
                [shared(combine_shared_bytes(combine_stages, max_experts)); 3],
            )?,
            combine_stages,
        })
    }
}

fn hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    let stages = if ROWS[size] == 128 { 3 } else { 4 };
    stages * (TOKENS + ROWS[size]) * ROW_BYTES + (num_experts + 3) * 4
}

fn combine_shared_bytes(stages: usize, num_experts: usize) -> usize {
    let stage = ROW_BYTES * COLUMNS + TOKENS * ROW_BYTES + TOKENS * 4;
    TOKENS * COLUMNS * 4 + stages * stage + (num_experts + 2) * 8
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    dtype: DType,
    hidden_blocks: usize,
    combine_blocks: [usize; 2],
    num_experts: usize,
    max_pairs: usize,
    hidden_stride: usize,
    hidden_shared: usize,
    hidden_linear: usize,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where the sizes overflow.
    pub(super) fn new(launch: &Launch, max_pairs: usize) -> Option<Self> {
        let Launch { dtype, num_tokens, .. } = *launch;
        let size = match (dtype, launch.expert_width * launch.halves) {
            (DType::F32, _) => 1,
            (_, ..=32) => 0,
            (_, ..=64) => 1,
            _ => 2,
        };
        let hidden_stride = launch.expert_width.checked_next_multiple_of(8)?;
        let hidden_shared = max_pairs.checked_mul(hidden_stride)?;
        let of_tokens = |width: usize| num_tokens.checked_mul(width.checked_next_multiple_of(8)?);
        let hidden_linear = hidden_shared.checked_add(of_tokens(launch.shared)?)?;
        let mut layout = Layout::default();
        layout.place(hidden_linear.checked_add(of_tokens(launch.rank)?)?, dtype.bytes())?;
        Some(Self {
            size,
            dtype,
            hidden_blocks: 2 * launch.multiprocessors,
            combine_blocks: [launch.d_model.div_ceil(COLUMNS), num_tokens.div_ceil(TOKENS)],
            num_experts: launch.num_experts,
            max_pairs,
            hidden_stride,
            hidden_shared,
            hidden_linear,
            bytes: layout.bytes(),
        })
    }

    /// Bytes of shared memory that a block of the second kernel needs.
    pub(super) fn shared_bytes(&self, kernels: &Kernels) -> usize {
        combine_shared_bytes(kernels.combine_stages, self.num_experts)
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        kernels: &Kernels,
        stream: RawStream,
        params: &moefy_experts_params,
        workspace: u64,
    ) -> Result<()> {
        let params = moefy_experts_params {
            hidden: workspace,
            hidden_stride: self.hidden_stride as u64,
            hidden_shared: self.hidden_shared as u64,
            hidden_linear: self.hidden_linear as u64,
            max_pairs: self.max_pairs as u32,
            ..*params
        };
        let hidden = kernels.hidden.get(self.dtype, self.size);
        let combine = kernels.combine.get(self.dtype, self.size);
        let grid = [self.hidden_blocks as u32, 1, 1];
        let [across, down] = self.combine_blocks.map(|blocks| blocks as u32);
        let shared = hidden_shared_bytes(self.size, self.num_experts);
        // SAFETY: the caller's promise.
        unsafe {
            hidden.launch(stream, grid, THREADS, shared, &params)?;
            let shared = self.shared_bytes(kernels);
            combine.launch(stream, [across, down, 1], THREADS, shared, &params)
        }
    }
}
