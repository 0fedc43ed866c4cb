//! [`experts`](super::experts) for many tokens, expert by expert: sizes, places in the workspace, and launches.

use super::driver::{Function, RawStream, tensor_map};
use super::experts::{Launch, THREADS};
use super::experts_many_kernels::{
    FUSED_ROWS, FUSED_THREADS, Kernels, RESIDENT_ROWS, RESIDENT_THREADS, TOKEN_DEPTH, WIDE_ROWS,
    WIDE_THREADS, Wide, fused_shared_bytes, hidden_shared_bytes, output_shared_bytes,
    resident_shared_bytes, token_output_shared_bytes, wide_hidden_shared_bytes,
};
use super::experts_many_ways::{Ways, fused_size, row_bytes, rows_of_all};
use super::experts_sums;
use super::workspace::Layout;
use crate::abi::{
    MOEFY_EXPERTS_MANY_SLAB, MOEFY_EXPERTS_MANY_SUM_COLUMNS, moefy_experts_engine_params,
    moefy_experts_fused_params, moefy_experts_params, moefy_tensor_map,
};
use crate::dtype::DType;
use crate::error::Result;

/// Room for outputs of pairs that wait for their sums, unless 256 columns of every pair that could be take more.
pub(super) const MAX_ROWS_BYTES: usize = 448 << 20;
/// Blocks of the kernel that sums for each multiprocessor.
const SUM_BLOCKS: usize = 4;
/// Sums of outputs of pairs of more tokens fill the chip for so long that what is launched behind them begins late
/// (kernels/NOTES.md).
const SUMS_BESIDE_TOKENS: usize = 4096;

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    size: usize,
    wide_size: usize,
    /// Whether the copy engine can bring the weights of the first product.
    has_engine: bool,
    d_ff: usize,
    halves: usize,
    rank: usize,
    ways: Ways,
    /// The second product of few pairs, where it keeps its sums.
    sums: Option<experts_sums::Shape>,
    dtype: DType,
    multiprocessors: usize,
    num_tokens: usize,
    d_model: usize,
    num_experts: usize,
    max_pairs: usize,
    hidden_stride: usize,
    hidden_shared: usize,
    hidden_linear: usize,
    /// Launches of the second product, where it is one of its own, and of the sums.
    num_slabs: usize,
    rows: u64,
    rows_bytes: usize,
    pair_rows: u64,
    pub(super) bytes: usize,
}

impl Shape {
    /// For so many pairs that there could be and so many expected ones, which the bytes do not depend on. `None` where the
    /// sizes overflow.
    pub(super) fn new(launch: &Launch, max_pairs: usize, expected_pairs: f64) -> Option<Self> {
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
        let ways = Ways::new(launch, max_pairs, expected_pairs)?;
        let sums = if launch.is_wide && ways.fused.is_none() {
            Some(experts_sums::Shape::new(launch)?)
        } else {
            None
        };
        // The copy engine counts rows of h by signed numbers.
        if sums.is_some() && max_pairs > i32::MAX as usize {
            return None;
        }
        let is_narrow = fused_size(launch).is_some();
        let num_rows = ways.pairs_with_rows.checked_add(rows_of_all(launch)?)?;
        let row_bytes = row_bytes(launch)?;
        let least = (MOEFY_EXPERTS_MANY_SLAB as usize * dtype.bytes()).min(row_bytes);
        let all_bytes = num_rows.checked_mul(row_bytes)?;
        let rows_bytes = match sums {
            // A workspace serves fewer tokens too, and other expectations, and those go in one launch: as much as that needs.
            Some(_) if is_narrow => {
                let rows = max_pairs.checked_add(rows_of_all(launch)?)?;
                rows.min(MAX_ROWS_BYTES / row_bytes.max(1)) * row_bytes
            }
            Some(_) => 0,
            // Room for all columns, or for some of them: at least one slab's.
            None => all_bytes.min(MAX_ROWS_BYTES.max(num_rows.checked_mul(least)?)),
        };
        let slab = rows_bytes / num_rows.max(1) / least * least;
        let hidden_bytes =
            hidden_linear.checked_add(of_tokens(launch.rank)?)?.checked_mul(dtype.bytes())?;
        let mut layout = Layout::default();
        // What goes in one launch has no h, and what goes by tiles of tokens no outputs of pairs. There is room for either, also
        // where one of them is never needed: fewer tokens must not need more.
        let rows = if is_narrow {
            layout.place(hidden_bytes.max(rows_bytes), 1)?
        } else {
            layout.place(hidden_bytes, 1)?;
            layout.place(rows_bytes, 1)?
        };
        let pair_rows = layout.place(num_tokens.checked_mul(launch.num_experts)?, 4)?;
        Some(Self {
            size,
            wide_size,
            has_engine: launch.rank == 0
                && [launch.expert_width, launch.d_ff].iter().all(|n| n.is_multiple_of(8)),
            d_ff: launch.d_ff,
            halves: launch.halves,
            rank: launch.rank,
            ways,
            sums,
            dtype,
            multiprocessors: launch.multiprocessors,
            num_tokens,
            d_model,
            num_experts: launch.num_experts,
            max_pairs,
            hidden_stride,
            hidden_shared,
            hidden_linear,
            num_slabs: match sums {
                Some(_) => 0,
                None if rows_bytes == all_bytes => 1,
                None => row_bytes.div_ceil(slab),
            },
            rows,
            rows_bytes,
            pair_rows,
            bytes: layout.bytes(),
        })
    }

    /// Bytes of shared memory that a block of the kernels needs at most.
    pub(super) fn shared_bytes(&self, kernels: &Kernels) -> usize {
        let fused = self.ways.fused.map_or(0, |size| fused_shared_bytes(size, self.num_experts));
        match kernels.wide(self.dtype) {
            Some(_) => wide_hidden_shared_bytes(self.wide_size, self.num_experts)
                .max(self.sums.map_or(0, |sums| sums.shared_bytes))
                .max(fused),
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
            min_token_pairs: u32::try_from(self.ways.min_token_pairs).unwrap_or(u32::MAX),
            fused: self.ways.fused.is_some().into(),
            ..*params
        };
        let blocks = self.multiprocessors as u32;
        let experts = self.num_experts;
        // Kernel, blocks, threads, and bytes of shared memory of the first product, and of the second one pair by pair.
        let (hidden, output) = match kernels.wide(self.dtype) {
            Some(wide) => {
                let kernel = &wide.hidden[self.wide_size];
                let shared = wide_hidden_shared_bytes(self.wide_size, experts);
                ((kernel, blocks, WIDE_THREADS, shared), None)
            }
            None => {
                let shared = hidden_shared_bytes(self.size, experts);
                let hidden =
                    (kernels.hidden.get(self.dtype, self.size), 2 * blocks, THREADS, shared);
                let shared = output_shared_bytes(kernels.output_stages, experts);
                (hidden, Some((kernels.output.get(self.dtype), blocks, THREADS, shared)))
            }
        };
        let run = |(kernel, blocks, threads, shared): (&Function, u32, u32, usize), params: &_| {
            // SAFETY: the caller's promise.
            unsafe { kernel.launch(stream, [blocks, 1, 1], threads, shared, params) }
        };
        // A warp for each piece of a token, or for several where that would be more than run at a time.
        let pieces = self.d_model.div_ceil(MOEFY_EXPERTS_MANY_SUM_COLUMNS as usize);
        let sum_blocks = (self.num_tokens * pieces).div_ceil(THREADS as usize / 32);
        let sum_blocks = sum_blocks.min(self.multiprocessors * SUM_BLOCKS) as u32;
        let wide = kernels.wide(self.dtype);
        // The device knows how many pairs there are: what they do not need ends at once.
        let may_go_by_tokens = self.max_pairs >= self.ways.min_token_pairs;
        let masked = self.ways.masked.filter(|_| may_go_by_tokens);
        let may_go_by_tiles = masked.is_none() && may_go_by_tokens;
        let goes_in_two = self.ways.fused.is_none() || may_go_by_tiles;
        if let Some((wide, size)) = wide.zip(self.ways.fused) {
            let map = |weights| self.map_of_rows(weights, FUSED_ROWS[size]);
            let params = moefy_experts_fused_params {
                w_in: map(params.neurons.w_in)?,
                w_out: map(params.neurons.w_out)?,
                experts: params,
                reserved: [0; 3],
            };
            let (kernel, shared) = (&wide.fused[size], fused_shared_bytes(size, experts));
            // SAFETY: the caller's promise.
            unsafe { kernel.launch(stream, [blocks, 1, 1], FUSED_THREADS, shared, &params)? };
        }
        let of_w_in = |rows: usize| -> Result<_> {
            let weights = self.map_of_w_in(params.neurons.w_in, rows)?;
            Ok(moefy_experts_engine_params { weights, experts: params, reserved: [0; 3] })
        };
        match (wide, self.ways.resident) {
            (Some(wide), Some(size)) => {
                let rows = RESIDENT_ROWS[size];
                let shared = resident_shared_bytes(rows, self.d_model, experts);
                let (kernel, params) = (&wide.resident_hidden[size], of_w_in(rows)?);
                let grid = [blocks, 1, 1];
                // SAFETY: the caller's promise.
                unsafe { kernel.launch(stream, grid, RESIDENT_THREADS, shared, &params)? };
            }
            _ if !goes_in_two => {}
            (Some(wide), None) if self.has_engine => {
                let (kernel, params) =
                    (&wide.engine_hidden[self.wide_size], of_w_in(WIDE_ROWS[self.wide_size])?);
                let (grid, shared) = ([blocks, 1, 1], hidden.3);
                // SAFETY: the caller's promise.
                unsafe { kernel.launch(stream, grid, WIDE_THREADS, shared, &params)? };
            }
            _ => run(hidden, &params)?,
        }
        // What has something to do where there are many pairs: whoever is ahead lets it begin when the lists are there, so that its
        // blocks see that there are few before that one has ended.
        let for_many = || {
            let tiles = wide.filter(|_| may_go_by_tiles);
            // SAFETY: the caller's promise.
            tiles.map_or(Ok(()), |wide| unsafe { self.launch_tiles(wide, stream, &params) })?;
            let masked = wide.zip(masked);
            // SAFETY: the caller's promise.
            masked.map_or(Ok(()), |(wide, masked)| unsafe {
                masked.launch(&wide.masked, stream, &params)
            })
        };
        let for_many_first = self.ways.fused.is_some() && self.num_tokens > SUMS_BESIDE_TOKENS;
        if for_many_first {
            for_many()?;
        }
        if let Some((wide, sums)) = wide.zip(self.sums) {
            // SAFETY: the caller's promise.
            unsafe { sums.launch(&wide.sums, stream, &params)? };
        }
        for slab in 0..self.num_slabs {
            let params = moefy_experts_params { slab: slab as u32, ..params };
            if let Some(output) = output {
                run(output, &params)?;
            }
            // SAFETY: the caller's promise.
            unsafe {
                kernels.sum.get(self.dtype).launch(
                    stream,
                    [sum_blocks, 1, 1],
                    THREADS,
                    0,
                    &params,
                )?
            };
        }
        if for_many_first { Ok(()) } else { for_many() }
    }

    /// The second product by tiles of tokens.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    unsafe fn launch_tiles(
        &self,
        wide: &Wide,
        stream: RawStream,
        params: &moefy_experts_params,
    ) -> Result<()> {
        let params = moefy_experts_engine_params {
            weights: self.map_of_rows(params.neurons.w_out, TOKEN_DEPTH)?,
            experts: *params,
            reserved: [0; 3],
        };
        let shared = token_output_shared_bytes(self.num_experts, self.d_ff + self.rank);
        let grid = [self.multiprocessors as u32, 1, 1];
        // SAFETY: the caller's promise.
        unsafe { wide.token_output.launch(stream, grid, WIDE_THREADS, shared, &params) }
    }
}

impl Shape {
    /// w_in \[halves · d_ff, d_model\] by groups of eight neurons, each with gate and up rows.
    fn map_of_w_in(&self, w_in: u64, rows: usize) -> Result<moefy_tensor_map> {
        let row = (self.d_model * self.dtype.bytes()) as u64;
        let groups = rows / (8 * self.halves);
        tensor_map(
            self.dtype,
            w_in,
            [self.d_model as u64, 8, self.halves as u64, (self.d_ff / 8) as u64],
            &[row, row * self.d_ff as u64, row * 8],
            [64, 8, self.halves as u32, groups as u32],
        )
    }

    /// w_out, or w_in without a GLU: \[d_ff + rank, d_model\], so many neurons at a time.
    fn map_of_rows(&self, weights: u64, neurons: usize) -> Result<moefy_tensor_map> {
        let (row, rows) =
            ((self.d_model * self.dtype.bytes()) as u64, (self.d_ff + self.rank) as u64);
        tensor_map(
            self.dtype,
            weights,
            [self.d_model as u64, rows, 1, 1],
            &[row, row * rows, row * rows],
            [64, neurons as u32, 1, 1],
        )
    }
}

/// Which rows of a block: few beyond the expert's, and each block reads its tokens once more, which takes as long as 32
/// rows.
fn wide_size(rows: usize) -> usize {
    let cost = |&size: &usize| rows.div_ceil(WIDE_ROWS[size]) * (WIDE_ROWS[size] + 32);
    (0..WIDE_ROWS.len()).rev().min_by_key(cost).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::experts_many_ways::tests::launch;
    use super::*;

    /// The kernel does not ask whether there is room.
    #[test]
    fn outputs_of_what_goes_in_one_launch_have_room() {
        let mut seen = Vec::new();
        for num_experts in [1, 24, 96, 448] {
            for (expert_width, shared, rank) in [(32, 0, 0), (20, 64, 0), (64, 128, 3)] {
                for d_model in [1000, 768, 1008] {
                    let mut bytes = 0;
                    for num_tokens in [
                        1,
                        512,
                        2048,
                        4096,
                        5632,
                        5633,
                        8192,
                        115_200,
                        115_201,
                        237_056,
                        244_737,
                        1 << 20,
                    ] {
                        let launch = launch(num_tokens, d_model, num_experts, expert_width);
                        let launch = Launch { d_ff: launch.d_ff + shared, shared, rank, ..launch };
                        let all = num_tokens * num_experts;
                        let shape = Shape::new(&launch, all, 0.0).expect("sizes fit");
                        let expecting_all =
                            Shape::new(&launch, all, all as f64).expect("sizes fit");
                        assert_eq!(shape.bytes, expecting_all.bytes);
                        assert!(shape.bytes >= bytes, "fewer tokens need more: {launch:?}");
                        bytes = shape.bytes;
                        let Ways { fused, min_token_pairs, .. } = shape.ways;
                        seen.push((fused, shape.max_pairs >= min_token_pairs));
                        if fused.is_none() {
                            continue;
                        }
                        let most = shape.max_pairs.min(min_token_pairs);
                        let rows = most + rows_of_all(&launch).expect("few");
                        let needed = rows * 2 * d_model;
                        assert!(needed <= shape.rows_bytes && shape.rows_bytes <= MAX_ROWS_BYTES);
                        assert_eq!(shape.num_slabs, 1);
                    }
                }
            }
        }
        for kind in
            [(Some(0), false), (Some(0), true), (Some(1), false), (Some(2), true), (None, false)]
        {
            assert!(seen.contains(&kind), "{kind:?}: {seen:?}");
        }
    }
}
