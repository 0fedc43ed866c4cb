//! The kernels of [`experts`](super::experts) for many tokens: expert by expert.

use super::driver::{Function, RawStream};
use super::experts::{Launch, THREADS, Variants, variants};
use super::kernels::{Modules, PerDType};
use super::workspace::Layout;
use crate::abi::{
    MOEFY_EXPERTS_MANY_SLAB, MOEFY_MAX_EXPERTS, moefy_experts_paired_params, moefy_experts_params,
};
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
const OUTPUT_STAGE_BYTES: usize = 2 * PAIRS * ROW_BYTES;
/// Outputs of pairs that wait for their sums are at most so many bytes, whatever the masks select.
const MAX_ROWS_BYTES: usize = 448 << 20;
/// Columns that a warp of the kernel that sums takes at once, and blocks that keep a multiprocessor busy.
const SUM_COLUMNS: usize = 512;
const SUM_BLOCKS: usize = 8;

pub(super) struct Kernels {
    hidden: Variants,
    output: PerDType,
    output_stages: usize,
    sum: PerDType,
    /// On Hopper, of f16 and of bf16.
    wide: Option<[Wide; 2]>,
}

/// Both products by whole warpgroups.
struct Wide {
    hidden: [Function; 4],
    /// Where two blocks share the weights.
    paired: [Function; 4],
    output: Function,
}

const WIDE_MODULES: [&str; 2] = ["sm90_experts_many_hidden", "sm90_experts_many_output"];
/// Threads of a block, input rows of a block of the first kernel, its stages, and bytes of those of the second.
const WIDE_THREADS: u32 = 384;
const WIDE_ROWS: [usize; 4] = [32, 64, 128, 256];
const WIDE_STAGES: [usize; 4] = [8, 8, 6, 4];
const WIDE_OUTPUT_BYTES: usize = 192 << 10;
/// From so many tokens on an expert has enough of them for two blocks.
const PAIRED_TOKENS: usize = 4096;

macro_rules! wide_hidden {
    ($dtype:literal) => {
        [wide_hidden!("wide", $dtype), wide_hidden!("paired", $dtype)]
    };
    ($kind:literal, $dtype:literal) => {
        [
            concat!("moefy_experts_many_", $kind, "_hidden_", $dtype, "_32"),
            concat!("moefy_experts_many_", $kind, "_hidden_", $dtype, "_64"),
            concat!("moefy_experts_many_", $kind, "_hidden_", $dtype, "_128"),
            concat!("moefy_experts_many_", $kind, "_hidden_", $dtype, "_256"),
        ]
    };
}

impl Wide {
    fn load(
        modules: &Modules,
        [hidden, paired]: [[&'static str; 4]; 2],
        output: &'static str,
    ) -> Result<Self> {
        let most = MOEFY_MAX_EXPERTS as usize;
        let load = |names: [&'static str; 4]| -> Result<[Function; 4]> {
            let load = |size: usize| {
                let bytes = wide_hidden_shared_bytes(size, most);
                modules.function(WIDE_MODULES[0], names[size], bytes)
            };
            Ok([load(0)?, load(1)?, load(2)?, load(3)?])
        };
        let bytes = wide_output_shared_bytes(most);
        Ok(Self {
            hidden: load(hidden)?,
            paired: load(paired)?,
            output: modules.function(WIDE_MODULES[1], output, bytes)?,
        })
    }
}

fn wide_hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    WIDE_STAGES[size] * (TOKENS + WIDE_ROWS[size]) * ROW_BYTES + list_bytes(num_experts)
}

fn wide_output_shared_bytes(num_experts: usize) -> usize {
    WIDE_OUTPUT_BYTES + list_bytes(num_experts)
}

/// Of the first tiles of the experts and other groups.
fn list_bytes(num_experts: usize) -> usize {
    (num_experts + 3) * 4
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
        let wide = || -> Result<[Wide; 2]> {
            Ok([
                Wide::load(modules, wide_hidden!("f16"), "moefy_experts_many_wide_output_f16")?,
                Wide::load(modules, wide_hidden!("bf16"), "moefy_experts_many_wide_output_bf16")?,
            ])
        };
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
            wide: modules.module(WIDE_MODULES[0]).map(|_| wide()).transpose()?,
        })
    }

    /// Of a type, where the device has them.
    fn wide(&self, dtype: DType) -> Option<&Wide> {
        let [f16, bf16] = self.wide.as_ref()?;
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(f16),
            DType::BF16 => Some(bf16),
        }
    }
}

fn hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    let stages = if ROWS[size] == 128 { 3 } else { 4 };
    stages * (TOKENS + ROWS[size]) * ROW_BYTES + list_bytes(num_experts)
}

fn output_shared_bytes(stages: usize, num_experts: usize) -> usize {
    stages * OUTPUT_STAGE_BYTES + list_bytes(num_experts)
}

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    wide_size: usize,
    /// d_model, d_ff and gate with up, where the copy engine can bring the weights.
    paired: Option<[usize; 3]>,
    dtype: DType,
    multiprocessors: usize,
    num_tokens: usize,
    d_model: usize,
    num_experts: usize,
    max_pairs: usize,
    hidden_stride: usize,
    hidden_shared: usize,
    hidden_linear: usize,
    /// Launches of the second product.
    num_slabs: usize,
    rows: u64,
    rows_bytes: usize,
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
        let wide_size = wide_size(launch.expert_width * launch.halves);
        let hidden_stride = launch.expert_width.checked_next_multiple_of(8)?;
        let hidden_shared = max_pairs.checked_mul(hidden_stride)?;
        let of_tokens = |width: usize| num_tokens.checked_mul(width.checked_next_multiple_of(8)?);
        let hidden_linear = hidden_shared.checked_add(of_tokens(launch.shared)?)?;
        let always = usize::from(launch.shared > 0) + usize::from(launch.rank > 0);
        let num_rows = max_pairs.checked_add(num_tokens.checked_mul(always)?)?;
        let row_bytes = d_model.checked_next_multiple_of(8)?.checked_mul(dtype.bytes())?;
        let least = (MOEFY_EXPERTS_MANY_SLAB as usize * dtype.bytes()).min(row_bytes);
        // Room for all columns, or for some of them: at least one slab's.
        let rows_bytes =
            num_rows.checked_mul(row_bytes)?.min(MAX_ROWS_BYTES.max(num_rows.checked_mul(least)?));
        let slab = rows_bytes / num_rows.max(1) / least * least;
        let mut layout = Layout::default();
        layout.place(hidden_linear.checked_add(of_tokens(launch.rank)?)?, dtype.bytes())?;
        let rows = layout.place(rows_bytes, 1)?;
        let pair_rows = layout.place(num_tokens.checked_mul(launch.num_experts)?, 4)?;
        Some(Self {
            size,
            wide_size,
            paired: (num_tokens >= PAIRED_TOKENS
                && launch.rank == 0
                && [launch.expert_width, launch.d_ff].iter().all(|n| n.is_multiple_of(8)))
            .then_some([d_model, launch.d_ff, launch.halves]),
            dtype,
            multiprocessors: launch.multiprocessors,
            num_tokens,
            d_model,
            num_experts: launch.num_experts,
            max_pairs,
            hidden_stride,
            hidden_shared,
            hidden_linear,
            num_slabs: if rows_bytes == num_rows * row_bytes {
                1
            } else {
                row_bytes.div_ceil(slab)
            },
            rows,
            rows_bytes,
            pair_rows,
            bytes: layout.bytes(),
        })
    }

    /// Bytes of shared memory that a block of the kernels needs at most.
    pub(super) fn shared_bytes(&self, kernels: &Kernels) -> usize {
        match kernels.wide(self.dtype) {
            Some(_) => wide_output_shared_bytes(self.num_experts)
                .max(wide_hidden_shared_bytes(self.wide_size, self.num_experts)),
            None => output_shared_bytes(kernels.output_stages, self.num_experts)
                .max(hidden_shared_bytes(self.size, self.num_experts)),
        }
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
            rows: workspace + self.rows,
            rows_bytes: self.rows_bytes as u64,
            pair_rows: workspace + self.pair_rows,
            ..*params
        };
        let blocks = self.multiprocessors as u32;
        let experts = self.num_experts;
        // Kernel, blocks, threads, and bytes of shared memory of each product.
        let (hidden, output) = match kernels.wide(self.dtype) {
            Some(wide) => (
                (
                    &wide.hidden[self.wide_size],
                    blocks,
                    WIDE_THREADS,
                    wide_hidden_shared_bytes(self.wide_size, experts),
                ),
                (&wide.output, blocks, WIDE_THREADS, wide_output_shared_bytes(experts)),
            ),
            None => (
                (
                    kernels.hidden.get(self.dtype, self.size),
                    2 * blocks,
                    THREADS,
                    hidden_shared_bytes(self.size, experts),
                ),
                (
                    kernels.output.get(self.dtype),
                    blocks,
                    THREADS,
                    output_shared_bytes(kernels.output_stages, experts),
                ),
            ),
        };
        let run = |(kernel, blocks, threads, shared): (&Function, u32, u32, usize), params: &_| {
            // SAFETY: the caller's promise.
            unsafe { kernel.launch(stream, [blocks, 1, 1], threads, shared, params) }
        };
        // Where a block for each token and step would be more than run at a time, a block takes several tokens.
        let across = self.d_model.div_ceil(SUM_COLUMNS).min(SUM_BLOCKS);
        let down = self.num_tokens.div_ceil(THREADS as usize / 32);
        let most = (self.multiprocessors * SUM_BLOCKS).div_ceil(across);
        let warps = [down.min(most) as u32, across as u32, 1];
        match (kernels.wide(self.dtype), self.paired) {
            (Some(wide), Some(sizes)) => {
                let kernel = &wide.paired[self.wide_size];
                let groups = WIDE_ROWS[self.wide_size] / 2 / (8 * sizes[2]);
                let params = moefy_experts_paired_params {
                    w_in: kernel.tensor_map(self.dtype, params.neurons.w_in, sizes, groups)?,
                    experts: params,
                    reserved: [0; 5],
                };
                let shared = wide_hidden_shared_bytes(self.wide_size, experts);
                // SAFETY: the caller's promise.
                unsafe {
                    kernel.launch(stream, [blocks & !1, 1, 1], WIDE_THREADS, shared, &params)?
                };
            }
            _ => run(hidden, &params)?,
        }
        for slab in 0..self.num_slabs {
            let params = moefy_experts_params { slab: slab as u32, ..params };
            run(output, &params)?;
            // SAFETY: the caller's promise.
            unsafe { kernels.sum.get(self.dtype).launch(stream, warps, THREADS, 0, &params)? };
        }
        Ok(())
    }
}

/// Which rows of a block: few beyond the expert's, and each block reads its tokens once more, which takes as long as 32
/// rows.
fn wide_size(rows: usize) -> usize {
    let cost = |&size: &usize| rows.div_ceil(WIDE_ROWS[size]) * (WIDE_ROWS[size] + 32);
    (0..WIDE_ROWS.len()).rev().min_by_key(cost).unwrap_or(0)
}
