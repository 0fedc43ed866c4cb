//! The launches of [`experts`](super::experts) for many tokens, expert by expert.

use bytemuck::Pod;

use super::driver::{Function, RawStream, tensor_map};
use super::experts::THREADS;
use super::experts_many::Shape;
use super::experts_many_kernels::{
    FUSED_ROWS, FUSED_THREADS, Kernels, RESIDENT_ROWS, RESIDENT_THREADS, TOKEN_DEPTH, WIDE_ROWS,
    WIDE_THREADS, Wide, fused_shared_bytes, hidden_shared_bytes, output_shared_bytes,
    resident_shared_bytes, token_output_shared_bytes, wide_hidden_shared_bytes,
};
use crate::abi::{
    MOEFY_EXPERTS_MANY_SUM_COLUMNS, moefy_experts_engine_params, moefy_experts_fused_params,
    moefy_experts_params, moefy_tensor_map,
};
use crate::error::Result;

/// Blocks of the kernel that sums for each multiprocessor.
const SUM_BLOCKS: usize = 4;
/// Sums of outputs of pairs of more tokens fill the chip for so long that what is launched behind them begins late
/// (kernels/NOTES.md).
const SUMS_BESIDE_TOKENS: usize = 4096;

/// Where one run goes, and with what.
struct Run<'a> {
    shape: &'a Shape,
    kernels: &'a Kernels,
    wide: Option<&'a Wide>,
    stream: RawStream,
    params: moefy_experts_params,
}

impl Shape {
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
            min_token_pairs: u32::try_from(self.ways.min_token_pairs).unwrap_or(u32::MAX),
            fused: self.ways.fused.is_some().into(),
            ..*params
        };
        let run = Run { shape: self, kernels, wide: kernels.wide(self.dtype), stream, params };
        let many_first = self.ways.fused.is_some() && self.num_tokens > SUMS_BESIDE_TOKENS;
        // SAFETY: the caller's promise.
        unsafe {
            run.first_product()?;
            if many_first {
                run.for_many_pairs()?;
            }
            run.second_product()?;
            if many_first { Ok(()) } else { run.for_many_pairs() }
        }
    }

    /// Whether there could be so many pairs that they go another way. The device knows: what they do not need ends at once.
    fn may_be_many(&self) -> bool {
        self.max_pairs >= self.ways.min_token_pairs
    }
}

/// Safety of all: as for [`Shape::launch`].
impl Run<'_> {
    /// The first product, or both in one launch.
    unsafe fn first_product(&self) -> Result<()> {
        let Shape { ways, num_experts, .. } = *self.shape;
        if let Some((wide, size)) = self.wide.zip(ways.fused) {
            let shared = fused_shared_bytes(size, num_experts);
            let params = moefy_experts_fused_params {
                w_in: self.rows_of(self.params.neurons.w_in, FUSED_ROWS[size])?,
                w_out: self.rows_of(self.params.neurons.w_out, FUSED_ROWS[size])?,
                experts: self.params,
                reserved: [0; 3],
            };
            // SAFETY: the caller's promise.
            unsafe { self.persistent(&wide.fused[size], FUSED_THREADS, shared, &params)? };
        }
        let is_all_fused =
            ways.fused.is_some() && (ways.masked.is_some() || !self.shape.may_be_many());
        if is_all_fused { Ok(()) } else { unsafe { self.hidden() } }
    }

    /// h of all pairs.
    unsafe fn hidden(&self) -> Result<()> {
        let Shape { ways, num_experts, d_model, dtype, size, wide_size, .. } = *self.shape;
        let of_w_in = |rows: usize| -> Result<_> {
            let weights = self.groups_of_w_in(rows)?;
            Ok(moefy_experts_engine_params { weights, experts: self.params, reserved: [0; 3] })
        };
        // SAFETY: the caller's promise.
        unsafe {
            let Some(wide) = self.wide else {
                let shared = hidden_shared_bytes(size, num_experts);
                let blocks = 2 * self.shape.multiprocessors as u32;
                let kernel = self.kernels.hidden.get(dtype, size);
                return kernel.launch(self.stream, [blocks, 1, 1], THREADS, shared, &self.params);
            };
            if let Some(size) = ways.resident {
                let (kernel, rows) = (&wide.resident_hidden[size], RESIDENT_ROWS[size]);
                let shared = resident_shared_bytes(rows, d_model, num_experts);
                return self.persistent(kernel, RESIDENT_THREADS, shared, &of_w_in(rows)?);
            }
            let shared = wide_hidden_shared_bytes(wide_size, num_experts);
            if self.shape.has_engine {
                let (kernel, params) =
                    (&wide.engine_hidden[wide_size], of_w_in(WIDE_ROWS[wide_size])?);
                self.persistent(kernel, WIDE_THREADS, shared, &params)
            } else {
                self.persistent(&wide.hidden[wide_size], WIDE_THREADS, shared, &self.params)
            }
        }
    }

    /// What has something to do where there are many pairs: all experts under masks, or the second product by tiles of tokens.
    /// Whoever is ahead lets these begin when the lists are there, so that their blocks see that there are few before that one
    /// has ended.
    unsafe fn for_many_pairs(&self) -> Result<()> {
        let Some(wide) = self.wide.filter(|_| self.shape.may_be_many()) else { return Ok(()) };
        if let Some(masked) = self.shape.ways.masked {
            // SAFETY: the caller's promise.
            return unsafe { masked.launch(&wide.masked, self.stream, &self.params) };
        }
        let Shape { num_experts, d_ff, rank, .. } = *self.shape;
        let shared = token_output_shared_bytes(num_experts, d_ff + rank);
        let params = moefy_experts_engine_params {
            weights: self.rows_of(self.params.neurons.w_out, TOKEN_DEPTH)?,
            experts: self.params,
            reserved: [0; 3],
        };
        // SAFETY: the caller's promise.
        unsafe { self.persistent(&wide.token_output, WIDE_THREADS, shared, &params) }
    }

    /// The second product of few pairs, or the sums of what one launch left.
    unsafe fn second_product(&self) -> Result<()> {
        let Shape { sums, dtype, d_model, num_tokens, multiprocessors, num_slabs, .. } =
            *self.shape;
        if let Some((wide, sums)) = self.wide.zip(sums) {
            // SAFETY: the caller's promise.
            return unsafe { sums.launch(&wide.sums, self.stream, &self.params) };
        }
        // A warp for each piece of a token, or for several where that would be more than run at a time.
        let pieces = d_model.div_ceil(MOEFY_EXPERTS_MANY_SUM_COLUMNS as usize);
        let blocks = (num_tokens * pieces).div_ceil(THREADS as usize / 32);
        let blocks = blocks.min(multiprocessors * SUM_BLOCKS) as u32;
        for slab in 0..num_slabs {
            let params = moefy_experts_params { slab: slab as u32, ..self.params };
            // SAFETY: the caller's promise.
            unsafe {
                if self.wide.is_none() {
                    let stages = self.kernels.output_stages;
                    let shared = output_shared_bytes(stages, self.shape.num_experts);
                    self.persistent(self.kernels.output.get(dtype), THREADS, shared, &params)?;
                }
                let sum = self.kernels.sum.get(dtype);
                sum.launch(self.stream, [blocks, 1, 1], THREADS, 0, &params)?;
            }
        }
        Ok(())
    }

    /// A block for each multiprocessor.
    unsafe fn persistent<P: Pod>(
        &self,
        kernel: &Function,
        threads: u32,
        shared: usize,
        params: &P,
    ) -> Result<()> {
        let grid = [self.shape.multiprocessors as u32, 1, 1];
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(self.stream, grid, threads, shared, params) }
    }

    /// w_in \[halves · d_ff, d_model\] by groups of eight neurons, each with gate and up rows.
    fn groups_of_w_in(&self, rows: usize) -> Result<moefy_tensor_map> {
        let Shape { dtype, d_model, d_ff, halves, .. } = *self.shape;
        let row = (d_model * dtype.bytes()) as u64;
        let groups = rows / (8 * halves);
        tensor_map(
            dtype,
            self.params.neurons.w_in,
            [d_model as u64, 8, halves as u64, (d_ff / 8) as u64],
            &[row, row * d_ff as u64, row * 8],
            [64, 8, halves as u32, groups as u32],
        )
    }

    /// w_out, or w_in without a GLU: \[d_ff + rank, d_model\], so many neurons at a time.
    fn rows_of(&self, weights: u64, neurons: usize) -> Result<moefy_tensor_map> {
        let Shape { dtype, d_model, d_ff, rank, .. } = *self.shape;
        let (row, rows) = ((d_model * dtype.bytes()) as u64, (d_ff + rank) as u64);
        tensor_map(
            dtype,
            weights,
            [d_model as u64, rows, 1, 1],
            &[row, row * rows, row * rows],
            [64, neurons as u32, 1, 1],
        )
    }
}
