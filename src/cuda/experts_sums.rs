//! The second product of [`experts`](super::experts) for many tokens, on Hopper: summed where it is multiplied.

use super::driver::{Function, RawStream, matrix_map};
use super::experts::Launch;
use super::kernels::Modules;
use crate::abi::{
    MOEFY_EXPERTS_SUMS_COLUMNS, MOEFY_EXPERTS_SUMS_HIDDEN_SLOTS,
    MOEFY_EXPERTS_SUMS_MORE_HIDDEN_SLOTS, MOEFY_EXPERTS_SUMS_MORE_WEIGHT_SLOTS,
    MOEFY_EXPERTS_SUMS_THREADS, MOEFY_EXPERTS_SUMS_WEIGHT_SLOTS, moefy_experts_params,
    moefy_experts_sums_params, moefy_tensor_map,
};
use crate::dtype::DType;
use crate::error::Result;

/// Pairs of a job. Tokens of a block are a multiple of it, and so many at most.
const TOKENS_STEP: usize = 64;
const MAX_TOKENS: usize = 512;
/// The most rows of a box of the copy engine, and where those of pairs differ.
const BOX_ROWS: u32 = 64;
const BOX_STEP: u32 = 8;
/// Neurons of a stage; a job has two stages at most.
const DEPTH: usize = 64;
const COLUMNS: usize = MOEFY_EXPERTS_SUMS_COLUMNS as usize;
/// What a block has on every device that has this kernel, less what is the kernel's own.
const MAX_SHARED_BYTES: usize = 226 << 10;

/// Slots of the kernels: the second one has more stages under way.
const SLOTS: [u32; 2] = [
    MOEFY_EXPERTS_SUMS_HIDDEN_SLOTS + MOEFY_EXPERTS_SUMS_WEIGHT_SLOTS,
    MOEFY_EXPERTS_SUMS_MORE_HIDDEN_SLOTS + MOEFY_EXPERTS_SUMS_MORE_WEIGHT_SLOTS,
];

/// The kernels of a type, in the order of their slots.
pub(super) fn load(modules: &Modules, names: [&'static str; 2]) -> Result<[Function; 2]> {
    let load = |name| modules.function("sm90_experts_many_sums", name, MAX_SHARED_BYTES);
    Ok([load(names[0])?, load(names[1])?])
}

/// Slots, y of the tokens of a block in f32, and four words for each job that can be.
fn shared_bytes(kernel: usize, block_tokens: usize, num_slices: usize) -> usize {
    let slots = SLOTS[kernel] as usize * BOX_ROWS as usize * DEPTH * 2;
    slots + block_tokens * COLUMNS * 4 + num_slices * (block_tokens / TOKENS_STEP) * 16
}

/// Of all neurons: as many as a job has, or what is left of an expert.
fn slices(num_experts: usize, expert_width: usize, shared: usize, rank: usize) -> usize {
    let width = if expert_width > DEPTH { 2 * DEPTH } else { DEPTH };
    num_experts * expert_width.div_ceil(width) + shared.div_ceil(width) + rank.div_ceil(width)
}

/// Jobs for an expert that has so many pairs in the mean, one at least: how often it has more than each multiple of a job's, where
/// numbers of pairs are about normally distributed.
fn jobs_of(pairs: f64) -> f64 {
    if pairs > 10.0 * TOKENS_STEP as f64 {
        return pairs / TOKENS_STEP as f64 + 0.5;
    }
    let exceeds = |least: f64| 1.0 / (1.0 + (1.7 * (least - pairs) / pairs.sqrt().max(1.0)).exp());
    let more = (1..).map(|jobs| exceeds((jobs * TOKENS_STEP) as f64));
    1.0 + more.take_while(|&share| share > 0.01).sum::<f64>()
}

/// Sizes of the launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    dtype: DType,
    d_model: usize,
    /// Rows of w_out.
    rows: usize,
    shared: usize,
    rank: usize,
    num_tokens: usize,
    block_tokens: usize,
    /// Blocks that share the columns of the same tokens.
    num_across: usize,
    multiprocessors: usize,
    /// Which one has room beside y.
    kernel: usize,
    pub(super) shared_bytes: usize,
}

impl Shape {
    /// `None` for more experts than there are lists for.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let Launch { dtype, d_model, d_ff, shared, rank, num_tokens, num_experts, .. } = *launch;
        let slices = slices(num_experts, launch.expert_width, shared, rank);
        let pieces = d_model.div_ceil(COLUMNS);
        let blocks = |block_tokens: usize| num_tokens.div_ceil(block_tokens).max(1);
        let across = |block_tokens: usize| (launch.multiprocessors / blocks(block_tokens)).max(1);
        // More tokens in a block read weights less often, but are fewer blocks (kernels/NOTES.md).
        let cost = |&block_tokens: &usize| {
            let rounds = blocks(block_tokens).div_ceil(launch.multiprocessors);
            rounds * pieces.div_ceil(across(block_tokens)) * (300 + block_tokens)
        };
        let fits = |kernel, tokens| shared_bytes(kernel, tokens, slices) <= MAX_SHARED_BYTES;
        let sizes = (TOKENS_STEP..=MAX_TOKENS).step_by(TOKENS_STEP);
        let block_tokens = sizes.filter(|&tokens| fits(0, tokens)).min_by_key(cost)?;
        let kernel = usize::from(fits(1, block_tokens));
        Some(Self {
            dtype,
            d_model,
            rows: d_ff + rank,
            shared,
            rank,
            num_tokens,
            block_tokens,
            num_across: across(block_tokens).min(pieces),
            multiprocessors: launch.multiprocessors,
            kernel,
            shared_bytes: shared_bytes(kernel, block_tokens, slices),
        })
    }

    /// Microseconds for so many pairs, on an H100 (kernels/NOTES.md): of each piece of columns the jobs, in which a second stage
    /// takes half as long as all else, and what it takes to store. Measured with experts of one stage and nothing shared.
    pub(super) fn us(&self, num_experts: usize, expert_width: usize, pairs: f64) -> f64 {
        let blocks = self.num_tokens.div_ceil(self.block_tokens);
        let rounds = (blocks * self.num_across).div_ceil(self.multiprocessors);
        let pieces = rounds * self.d_model.div_ceil(COLUMNS).div_ceil(self.num_across);
        let of_expert = pairs / (blocks * num_experts).max(1) as f64;
        let jobs = jobs_of(of_expert);
        // With more slots less of a job is waiting.
        let of_job = [0.21, 0.19][self.kernel] + 0.0012 * of_expert / jobs;
        let stages = 1.0 + 0.5 * f64::from(u8::from(expert_width > DEPTH));
        let of_experts = num_experts as f64 * (jobs * of_job * stages + 0.03);
        let of_shared =
            (self.shared.div_ceil(DEPTH) * self.block_tokens / TOKENS_STEP) as f64 * 0.27;
        let of_piece = of_experts + of_shared + 0.0065 * self.block_tokens as f64;
        9.0 + pieces as f64 * of_piece
    }

    /// # Safety
    /// The addresses in `params` must be what the kernel expects, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        kernels: &[Function; 2],
        stream: RawStream,
        params: &moefy_experts_params,
    ) -> Result<()> {
        let element = self.dtype.bytes() as u64;
        let map = |matrix: u64, rows: usize, columns: usize, box_rows: u32| {
            if rows == 0 || columns == 0 {
                return Ok(bytemuck::Zeroable::zeroed());
            }
            let sizes = [rows as u32, columns as u32];
            matrix_map(self.dtype, matrix, sizes, columns as u64, box_rows)
        };
        let of_tokens = |first: u64, width: usize| {
            let width = width.next_multiple_of(8);
            map(params.hidden + first * element, self.num_tokens, width, BOX_ROWS)
        };
        let pairs = params.max_pairs as usize;
        let mut hidden: [moefy_tensor_map; (BOX_ROWS / BOX_STEP) as usize] =
            bytemuck::Zeroable::zeroed();
        for (map_of_pairs, box_rows) in
            hidden.iter_mut().zip((BOX_STEP..).step_by(BOX_STEP as usize))
        {
            *map_of_pairs = map(params.hidden, pairs, params.hidden_stride as usize, box_rows)?;
        }
        let params = moefy_experts_sums_params {
            hidden,
            hidden_shared: of_tokens(params.hidden_shared, self.shared)?,
            hidden_linear: of_tokens(params.hidden_linear, self.rank)?,
            w_out: map(params.neurons.w_out, self.rows, self.d_model, BOX_ROWS)?,
            experts: *params,
            block_tokens: self.block_tokens as u32,
            num_across: self.num_across as u32,
            reserved: [0; 2],
        };
        let blocks = self.num_tokens.div_ceil(self.block_tokens) * self.num_across;
        // SAFETY: the caller's promise.
        unsafe {
            kernels[self.kernel].launch(
                stream,
                [blocks as u32, 1, 1],
                MOEFY_EXPERTS_SUMS_THREADS,
                self.shared_bytes,
                &params,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::MOEFY_MAX_EXPERTS;

    #[test]
    fn every_number_of_experts_has_room() {
        let most = MOEFY_MAX_EXPERTS as usize;
        assert!(shared_bytes(0, TOKENS_STEP, most) <= MAX_SHARED_BYTES);
    }
}
