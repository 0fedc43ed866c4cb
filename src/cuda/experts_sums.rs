//! The second product of [`experts`](super::experts) for many tokens, on Hopper: summed where it is multiplied.

use super::driver::{Function, RawStream, matrix_map};
use super::experts::Launch;
use super::kernels::Modules;
use crate::abi::{
    MOEFY_EXPERTS_SUMS_COLUMNS, MOEFY_EXPERTS_SUMS_STAGES, moefy_experts_params,
    moefy_experts_sums_params, moefy_tensor_map,
};
use crate::dtype::DType;
use crate::error::Result;

/// Of a block: four warpgroups, and a warp for each stage.
const THREADS: u32 = 512 + MOEFY_EXPERTS_SUMS_STAGES * 32;
/// Pairs of a job. Tokens of a block are a multiple of it, and so many at most.
const TOKENS_STEP: usize = 64;
const MAX_TOKENS: usize = 512;
/// Rows of a box of the copy engine.
const BOX_ROWS: u32 = 64;
const COLUMNS: usize = MOEFY_EXPERTS_SUMS_COLUMNS as usize;
/// What a block has on every device that has this kernel, less what is the kernel's own.
const MAX_SHARED_BYTES: usize = 226 << 10;

/// The kernel of a type.
pub(super) fn load(modules: &Modules, name: &'static str) -> Result<Function> {
    modules.function("sm90_experts_many_sums", name, MAX_SHARED_BYTES)
}

/// Stages, y of the tokens of a block in f32, and two words for each job that can be.
fn shared_bytes(block_tokens: usize, num_experts: usize) -> usize {
    const STAGES_BYTES: usize = MOEFY_EXPERTS_SUMS_STAGES as usize * 2 * 64 * 128;
    STAGES_BYTES + block_tokens * COLUMNS * 4 + (num_experts + 2) * (block_tokens / TOKENS_STEP) * 8
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
    num_lanes: usize,
    pub(super) shared_bytes: usize,
}

impl Shape {
    /// `None` for more experts than there are lists for.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let Launch { dtype, d_model, d_ff, shared, rank, num_tokens, num_experts, .. } = *launch;
        let across = d_model.div_ceil(COLUMNS);
        let blocks = |block_tokens: usize| num_tokens.div_ceil(block_tokens).max(1);
        let lanes = |block_tokens: usize| (launch.multiprocessors / blocks(block_tokens)).max(1);
        // More tokens in a block read weights less often, but are fewer blocks (kernels/NOTES.md).
        let cost = |&block_tokens: &usize| {
            let rounds = blocks(block_tokens).div_ceil(launch.multiprocessors);
            rounds * across.div_ceil(lanes(block_tokens)) * (300 + block_tokens)
        };
        let fits = |&tokens: &usize| shared_bytes(tokens, num_experts) <= MAX_SHARED_BYTES;
        let sizes = (TOKENS_STEP..=MAX_TOKENS).step_by(TOKENS_STEP).filter(fits);
        let block_tokens = sizes.min_by_key(cost)?;
        Some(Self {
            dtype,
            d_model,
            rows: d_ff + rank,
            shared,
            rank,
            num_tokens,
            block_tokens,
            num_lanes: lanes(block_tokens).min(across),
            shared_bytes: shared_bytes(block_tokens, num_experts),
        })
    }

    /// # Safety
    /// The addresses in `params` must be what the kernel expects, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        kernel: &Function,
        stream: RawStream,
        params: &moefy_experts_params,
    ) -> Result<()> {
        let element = self.dtype.bytes() as u64;
        let map = |matrix: u64, rows: usize, columns: usize| -> Result<moefy_tensor_map> {
            if rows == 0 || columns == 0 {
                return Ok(bytemuck::Zeroable::zeroed());
            }
            let sizes = [rows as u32, columns as u32];
            matrix_map(self.dtype, matrix, sizes, columns as u64, BOX_ROWS)
        };
        let of_tokens = |first: u64, width: usize| {
            let width = width.next_multiple_of(8);
            map(params.hidden + first * element, self.num_tokens, width)
        };
        let pairs = params.max_pairs as usize;
        let params = moefy_experts_sums_params {
            hidden: map(params.hidden, pairs, params.hidden_stride as usize)?,
            hidden_shared: of_tokens(params.hidden_shared, self.shared)?,
            hidden_linear: of_tokens(params.hidden_linear, self.rank)?,
            w_out: map(params.neurons.w_out, self.rows, self.d_model)?,
            experts: *params,
            block_tokens: self.block_tokens as u32,
            num_lanes: self.num_lanes as u32,
            reserved: [0; 3],
        };
        let blocks = self.num_tokens.div_ceil(self.block_tokens) * self.num_lanes;
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream, [blocks as u32, 1, 1], THREADS, self.shared_bytes, &params) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::MOEFY_MAX_EXPERTS;

    #[test]
    fn every_number_of_experts_has_room() {
        let most = MOEFY_MAX_EXPERTS as usize;
        assert!(shared_bytes(TOKENS_STEP, most) <= MAX_SHARED_BYTES);
    }
}
