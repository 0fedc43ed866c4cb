//! [`experts`](super::experts) for many tokens, expert by expert: sizes, and places in the workspace.

use super::experts::Launch;
use super::experts_many_kernels::{
    Kernels, WIDE_ROWS, fused_shared_bytes, hidden_shared_bytes, output_shared_bytes,
    wide_hidden_shared_bytes,
};
use super::experts_many_ways::{Ways, fused_size, row_bytes, rows_of_all};
use super::experts_sums;
use super::workspace::Layout;
use crate::abi::MOEFY_EXPERTS_MANY_SLAB;
use crate::dtype::DType;

/// Room for outputs of pairs that wait for their sums, unless 256 columns of every pair that could be take more.
pub(super) const MAX_ROWS_BYTES: usize = 448 << 20;

/// Sizes of the launches and places in the workspace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) size: usize,
    pub(super) wide_size: usize,
    /// Whether the copy engine can bring the weights of the first product.
    pub(super) has_engine: bool,
    pub(super) d_ff: usize,
    pub(super) halves: usize,
    pub(super) rank: usize,
    pub(super) ways: Ways,
    /// The second product of few pairs, where it keeps its sums.
    pub(super) sums: Option<experts_sums::Shape>,
    pub(super) dtype: DType,
    pub(super) multiprocessors: usize,
    pub(super) num_tokens: usize,
    pub(super) d_model: usize,
    pub(super) num_experts: usize,
    pub(super) max_pairs: usize,
    pub(super) hidden_stride: usize,
    pub(super) hidden_shared: usize,
    pub(super) hidden_linear: usize,
    /// Launches of the second product, where it is one of its own, and of the sums.
    pub(super) num_slabs: usize,
    pub(super) rows: u64,
    pub(super) rows_bytes: usize,
    pub(super) pair_rows: u64,
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
