//! The kernels of [`experts`](super::experts) for many tokens: expert by expert.

use super::driver::RawStream;
use super::experts::{Launch, THREADS, Variants, variants};
use super::kernels::{Modules, PerDType};
use super::workspace::Layout;
use crate::abi::{MOEFY_EXPERTS_MANY_COLUMNS, MOEFY_MAX_EXPERTS, moefy_experts_params};
use crate::dtype::DType;
use crate::error::Result;

/// Tokens of a block of the first kernel.
const TOKENS: usize = 128;
/// Bytes of a row of a tile in shared memory.
const ROW_BYTES: usize = 128;
/// Input rows of a block of the first kernel: of the variants small to large.
const ROWS: [usize; 3] = [32, 64, 128];
/// Rows of a tile of the second kernel, its stages where shared memory allows it and elsewhere, and bytes of one.
const PAIRS: usize = 128;
const OUTPUT_STAGES: [usize; 2] = [5, 2];
const OUTPUT_STAGE_BYTES: usize = (PAIRS + MOEFY_EXPERTS_MANY_COLUMNS as usize) * ROW_BYTES;
/// Outputs of pairs that wait for their sums are at most so many bytes, whatever the masks select ...
const MAX_SLAB_BYTES: usize = 448 << 20;
/// ... and about as many as the second-level cache keeps, if the pairs are as many as expected.
const CACHED_BYTES: usize = 24 << 20;

pub(super) struct Kernels {
    hidden: Variants,
    output: PerDType,
    output_stages: usize,
    sum: PerDType,
}

impl Kernels {
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Self> {
        let max_experts = MOEFY_MAX_EXPERTS as usize;
        let shared = |bytes: usize| bytes.min(max_shared_bytes);
        let fits = |&stages: &usize| output_shared_bytes(stages, 0) <= max_shared_bytes;
        let output_stages = OUTPUT_STAGES.into_iter().find(fits).unwrap_or(OUTPUT_STAGES[1]);
        let output_names = match output_stages {
            2 => [
                "moefy_experts_many_output_f32_2",
                "moefy_experts_many_output_f16_2",
                "moefy_experts_many_output_bf16_2",
            ],
            _ => [
                "moefy_experts_many_output_f32_5",
                "moefy_experts_many_output_f16_5",
                "moefy_experts_many_output_bf16_5",
            ],
        };
        let per_dtype = |names, bytes| modules.per_dtype("experts_many_output", names, bytes);
        Ok(Self {
            hidden: Variants::load(
                modules,
                "experts_many_hidden",
                variants!("moefy_experts_many_hidden_", "64", ["32", "64", "128"]),
                [0, 1, 2].map(|size| shared(hidden_shared_bytes(size, max_experts))),
            )?,
            output: per_dtype(
                output_names,
                shared(output_shared_bytes(output_stages, max_experts)),
            )?,
            output_stages,
            sum: per_dtype(
                [
                    "moefy_experts_many_sum_f32",
                    "moefy_experts_many_sum_f16",
                    "moefy_experts_many_sum_bf16",
                ],
                0,
            )?,
        })
    }
}

fn hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    let stages = if ROWS[size] == 128 { 3 } else { 4 };
    stages * (TOKENS + ROWS[size]) * ROW_BYTES + (num_experts + 3) * 4
}

fn output_shared_bytes(stages: usize, num_experts: usize) -> usize {
    stages * OUTPUT_STAGE_BYTES + (num_experts + 3) * 4
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    dtype: DType,
    multiprocessors: usize,
    num_tokens: usize,
    d_model: usize,
    num_experts: usize,
    max_pairs: usize,
    hidden_stride: usize,
    hidden_shared: usize,
    hidden_linear: usize,
    slab: usize,
    rows: u64,
    pair_rows: u64,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where the sizes overflow.
    pub(super) fn new(launch: &Launch, max_pairs: usize) -> Option<Self> {
        let Launch { dtype, num_tokens, d_model, .. } = *launch;
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
        let always = usize::from(launch.shared > 0) + usize::from(launch.rank > 0);
        let num_rows = max_pairs.checked_add(num_tokens.checked_mul(always)?)?;
        let slab = slab(num_rows, num_tokens, d_model, dtype.bytes());
        let mut layout = Layout::default();
        layout.place(hidden_linear.checked_add(of_tokens(launch.rank)?)?, dtype.bytes())?;
        let rows = layout.place(num_rows.checked_mul(slab)?, dtype.bytes())?;
        let pair_rows = layout.place(num_tokens.checked_mul(launch.num_experts)?, 4)?;
        Some(Self {
            size,
            dtype,
            multiprocessors: launch.multiprocessors,
            num_tokens,
            d_model,
            num_experts: launch.num_experts,
            max_pairs,
            hidden_stride,
            hidden_shared,
            hidden_linear,
            slab,
            rows,
            pair_rows,
            bytes: layout.bytes(),
        })
    }

    /// Bytes of shared memory that a block of the kernels needs at most.
    pub(super) fn shared_bytes(&self, kernels: &Kernels) -> usize {
        output_shared_bytes(kernels.output_stages, self.num_experts)
            .max(hidden_shared_bytes(self.size, self.num_experts))
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
        let mut params = moefy_experts_params {
            hidden: workspace,
            hidden_stride: self.hidden_stride as u64,
            hidden_shared: self.hidden_shared as u64,
            hidden_linear: self.hidden_linear as u64,
            max_pairs: self.max_pairs as u32,
            rows: workspace + self.rows,
            pair_rows: workspace + self.pair_rows,
            slab: self.slab as u32,
            ..*params
        };
        let hidden = kernels.hidden.get(self.dtype, self.size);
        let (output, sum) = (kernels.output.get(self.dtype), kernels.sum.get(self.dtype));
        let grid = [2 * self.multiprocessors as u32, 1, 1];
        let warps = [(self.num_tokens as u32).div_ceil(THREADS / 32), 1, 1];
        let shared = hidden_shared_bytes(self.size, self.num_experts);
        // SAFETY: the caller's promise.
        unsafe {
            hidden.launch(stream, grid, THREADS, shared, &params)?;
            let shared = output_shared_bytes(kernels.output_stages, self.num_experts);
            for first_column in (0..self.d_model).step_by(self.slab) {
                params.first_column = first_column as u32;
                let grid = [self.multiprocessors as u32, 1, 1];
                output.launch(stream, grid, THREADS, shared, &params)?;
                sum.launch(stream, warps, THREADS, 0, &params)?;
            }
        }
        Ok(())
    }
}

/// Columns of a slab. A quarter of the pairs that could be is what a layer is made sparse for.
fn slab(num_rows: usize, num_tokens: usize, d_model: usize, element: usize) -> usize {
    let tile = MOEFY_EXPERTS_MANY_COLUMNS as usize;
    let columns = |bytes: usize, rows: usize| bytes / (rows.max(1) * element) / tile * tile;
    let expected = (num_rows / 4).max(num_tokens);
    let cached = columns(CACHED_BYTES, expected).max(2 * tile);
    let bounded = columns(MAX_SLAB_BYTES, num_rows).max(tile);
    cached.min(bounded).min(d_model.next_multiple_of(8))
}
