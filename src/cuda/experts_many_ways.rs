//! Which way the pairs of many tokens go, by what each way costs on an H100 (kernels/NOTES.md).

use super::experts::Launch;
use super::experts_many::MAX_ROWS_BYTES;
use super::experts_many_kernels::{
    FUSED_ROWS, RESIDENT_ROWS, TOKEN_DEPTH, TOKEN_TILE, WIDE_SHARED_BYTES, resident_shared_bytes,
    token_output_shared_bytes,
};
use super::{experts_masked, experts_sums};
use crate::dtype::DType;

/// Both products in one launch: wider tokens were not measured.
const FUSED_MAX_D_MODEL: usize = 1024;

/// How many pairs go which way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ways {
    /// The kernel that does both products in one launch while there are fewer pairs than `min_token_pairs`, if that is best:
    /// whole rows of all their outputs have room then.
    pub(super) fused: Option<usize>,
    /// The kernel that does the first product of those where a block keeps the weights of an expert, if that is best.
    pub(super) resident: Option<usize>,
    /// From so many pairs on, the second product goes by tiles of tokens.
    pub(super) min_token_pairs: usize,
    /// Then the first one too: all experts under masks.
    pub(super) masked: Option<experts_masked::Shape>,
    /// So many can have outputs. With the rows of all tokens not fewer with more tokens: a workspace serves fewer tokens too.
    pub(super) pairs_with_rows: usize,
}

impl Ways {
    /// What is best where so many pairs are expected of `max_pairs` that there could be. `None` where the sizes overflow.
    pub(super) fn new(launch: &Launch, max_pairs: usize, expected_pairs: f64) -> Option<Self> {
        let room = (MAX_ROWS_BYTES / row_bytes(launch)?).checked_sub(rows_of_all(launch)?);
        let by_tokens = Cost::of_token_output(launch);
        // Masks go on where lists end early.
        let has_all = max_pairs >= launch.num_tokens.checked_mul(launch.num_experts)?;
        let masked = experts_masked::Shape::new(launch).filter(|_| has_all);
        let is_bounded = |room| masked.is_some() || by_tokens.is_some() || max_pairs <= room;
        let narrow = fused_size(launch).zip(room).filter(|&(_, room)| is_bounded(room));
        let Some((size, room)) = narrow else {
            let by_pairs = Cost::of_pairs(launch);
            let min_token_pairs =
                by_tokens.map_or(usize::MAX, |by_tokens| by_pairs.pairs_up_to(by_tokens));
            return Some(Self {
                fused: None,
                resident: None,
                min_token_pairs,
                masked: None,
                pairs_with_rows: max_pairs.min(min_token_pairs),
            });
        };
        // Outputs of so many pairs may have no room. Who keeps sums needs none, but the copy engine counts rows of h by signed
        // numbers.
        let is_better = |resident: &Resident| {
            expected_pairs > room as f64
                || resident.us(expected_pairs) < fused_us(launch, size, expected_pairs)
        };
        let resident =
            Resident::new(launch).filter(is_better).filter(|_| max_pairs <= i32::MAX as usize);
        let by_tiles = match masked {
            Some(shape) => Some(Cost { base: shape.us, of_pair: 0.0 }),
            None if resident.is_some() || max_pairs <= room => None,
            None => by_tokens
                .map(|by_tokens| Cost::of_all(launch) + Cost::of_hidden(launch) + by_tokens),
        };
        let min_token_pairs = match (by_tiles, &resident) {
            (Some(by_tiles), Some(resident)) => {
                pairs_up_to(max_pairs, |pairs| resident.us(pairs) < by_tiles.us(pairs))
            }
            (Some(by_tiles), None) => {
                let is_less = |pairs| fused_us(launch, size, pairs) < by_tiles.us(pairs);
                pairs_up_to(max_pairs, is_less).min(room)
            }
            (None, _) => usize::MAX,
        };
        Some(Self {
            fused: resident.is_none().then_some(size),
            resident: resident.map(|resident| resident.size),
            min_token_pairs,
            masked,
            pairs_with_rows: max_pairs.min(room),
        })
    }
}

/// Which kernel can do both products in one launch.
pub(super) fn fused_size(launch: &Launch) -> Option<usize> {
    let widest = launch.expert_width.max(launch.shared).max(launch.rank);
    let can = launch.is_wide && launch.halves == 1 && launch.d_model <= FUSED_MAX_D_MODEL;
    FUSED_ROWS.iter().position(|&rows| can && widest <= rows)
}

/// Two launches for narrow experts, of which the first keeps weights and the second sums.
struct Resident {
    /// Which kernel does the first product.
    size: usize,
    first: Cost,
    num_experts: usize,
    expert_width: usize,
    second: experts_sums::Shape,
}

impl Resident {
    /// `None` where no kernel can.
    fn new(launch: &Launch) -> Option<Self> {
        let in_groups = [launch.expert_width, launch.d_ff].iter().all(|n| n.is_multiple_of(8));
        let can = launch.is_wide && launch.halves == 1 && launch.rank == 0 && in_groups;
        let size = RESIDENT_ROWS.iter().position(|&rows| {
            let bytes = resident_shared_bytes(rows, launch.d_model, launch.num_experts);
            can && launch.expert_width <= rows && bytes <= WIDE_SHARED_BYTES
        })?;
        let second = experts_sums::Shape::new(launch)?;
        let first = Cost::of_resident(launch, size);
        let Launch { num_experts, expert_width, .. } = *launch;
        Some(Self { size, first, num_experts, expert_width, second })
    }

    fn us(&self, pairs: f64) -> f64 {
        self.first.us(pairs) + self.second.us(self.num_experts, self.expert_width, pairs)
    }
}

/// The fewest pairs for which this is false, or one more than there can be. It stays false with more of them.
fn pairs_up_to(max_pairs: usize, is_less: impl Fn(f64) -> bool) -> usize {
    let (mut low, mut high) = (0, max_pairs + 1);
    while low < high {
        let middle = low.midpoint(high);
        if is_less(middle as f64) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
}

/// Bytes of a row of y.
pub(super) fn row_bytes(launch: &Launch) -> Option<usize> {
    launch.d_model.checked_next_multiple_of(8)?.checked_mul(launch.dtype.bytes())
}

/// Rows of y of what all tokens run: the shared and the linear neurons.
pub(super) fn rows_of_all(launch: &Launch) -> Option<usize> {
    launch.num_tokens.checked_mul(groups_of_all(launch))
}

fn groups_of_all(launch: &Launch) -> usize {
    usize::from(launch.shared > 0) + usize::from(launch.rank > 0)
}

/// Microseconds on an H100 (kernels/NOTES.md).
#[derive(Clone, Copy, Debug)]
struct Cost {
    base: f64,
    of_pair: f64,
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { base: self.base + other.base, of_pair: self.of_pair + other.of_pair }
    }
}

impl Cost {
    fn us(self, pairs: f64) -> f64 {
        self.base + pairs * self.of_pair
    }

    /// Up to how many pairs it is less than another that grows more slowly.
    fn pairs_up_to(self, other: Self) -> usize {
        ((other.base - self.base).max(0.0) / (self.of_pair - other.of_pair)) as usize
    }

    /// Of the first product where weights stay: bytes of token rows, and of weights for each block or expert.
    fn of_resident(launch: &Launch, size: usize) -> Self {
        let of_pair = (launch.d_model * launch.dtype.bytes()) as f64 / 6.9e6;
        let kept = RESIDENT_ROWS[size] * launch.num_experts.max(launch.multiprocessors);
        let of_all = launch.num_tokens * launch.shared.div_ceil(RESIDENT_ROWS[size]);
        Self { base: 6.0 + (kept + of_all) as f64 * of_pair, of_pair }
    }

    /// Of the launches of two kernels, and of what all tokens run there.
    fn of_all(launch: &Launch) -> Self {
        let (d_model, neurons) =
            (launch.d_model as f64, launch.halves * launch.shared + launch.rank);
        let outputs = if neurons > 0 { d_model * launch.dtype.bytes() as f64 / 1e6 } else { 0.0 };
        let of_token = neurons as f64 * d_model / 2e8 + outputs;
        Self { base: 44.0 + launch.num_tokens as f64 * of_token, of_pair: 0.0 }
    }

    /// Of the first product: tiles of 128 tokens, of which each expert leaves half of one empty; each reads its tokens and its
    /// weights.
    fn of_hidden(launch: &Launch) -> Self {
        let row = (launch.d_model * launch.dtype.bytes()) as f64;
        let of_expert = (launch.halves * launch.expert_width) as f64;
        let tokens_again = (of_expert / 256.0).max(1.0);
        let of_pair = row * (tokens_again + of_expert / 128.0) / 6.2e6;
        Self { base: (64 * launch.num_experts) as f64 * of_pair, of_pair }
    }

    /// Of the second product of few pairs. Outputs of pairs: a byte of y of a pair, written, read and added. Where it keeps its
    /// sums: for a block of tokens and each expert its weights, and 64 pairs are the least.
    fn of_pairs(launch: &Launch) -> Self {
        if !launch.is_wide {
            let row = (launch.d_model * launch.dtype.bytes()) as f64;
            return Self { base: 15.0, of_pair: row / 1.02e6 };
        }
        let stages = launch.expert_width.div_ceil(TOKEN_DEPTH) as f64;
        let columns = launch.d_model as f64 / 64.0;
        let rounds = columns / launch.multiprocessors as f64;
        let (of_weights, of_job) = (rounds * 0.05 * stages, rounds * 0.125 * (1.0 + stages));
        let experts = (launch.num_tokens.div_ceil(512) * launch.num_experts) as f64;
        Self { base: 8.0 + experts * (of_weights + 0.4 * of_job), of_pair: of_job / 64.0 }
    }

    /// Of the same by tiles of tokens, where that is possible: a stage of a round of tiles, and to find the rows of an expert
    /// in it, and to begin and end a tile as so many stages.
    fn of_token_output(launch: &Launch) -> Option<Self> {
        const STAGE_US: f64 = 0.65;
        const EXPERT_US: f64 = 0.14;
        const TILE_STAGES: usize = 8;
        let neurons = launch.d_ff + launch.rank;
        let fits = token_output_shared_bytes(launch.num_experts, neurons) <= WIDE_SHARED_BYTES;
        let is_aligned = [launch.expert_width, launch.shared].iter().all(|n| n.is_multiple_of(8));
        let across = launch.d_model.div_ceil(TOKEN_TILE[1]);
        let tiles = launch.num_tokens.div_ceil(TOKEN_TILE[0]) * across;
        let stages =
            tiles.div_ceil(launch.multiprocessors) * (neurons.div_ceil(TOKEN_DEPTH) + TILE_STAGES);
        let experts_of_stage = TOKEN_DEPTH as f64 / launch.expert_width.max(1) as f64;
        let base = stages as f64 * (STAGE_US + EXPERT_US * experts_of_stage);
        (launch.is_wide && fits && is_aligned).then_some(Self { base, of_pair: 0.0 })
    }
}

/// What both products take for so many pairs, of `max_pairs` that there could be.
pub(super) fn products_us(launch: &Launch, max_pairs: usize, pairs: f64) -> f64 {
    if launch.dtype == DType::F32 {
        return f32_products_us(launch, pairs);
    }
    let Some(ways) = Ways::new(launch, max_pairs, pairs) else { return f64::INFINITY };
    // Weights are read at least once.
    let read_us = |rows: usize| (rows * launch.d_model * launch.dtype.bytes()) as f64 / 2.9e6;
    let in_us = read_us(launch.halves * launch.d_ff + launch.rank);
    let out_us = read_us(launch.d_ff + launch.rank);
    let by_tokens = || Cost::of_token_output(launch).map_or(f64::INFINITY, |cost| cost.base);
    let goes_by_tiles = pairs >= ways.min_token_pairs as f64;
    if let Some(masked) = ways.masked.filter(|_| goes_by_tiles) {
        return masked.us.max(in_us + out_us);
    }
    if let Some(resident) = ways.resident.and_then(|_| Resident::new(launch)) {
        return resident.us(pairs).max(in_us + out_us);
    }
    let second_us = match ways.fused {
        Some(size) if !goes_by_tiles => return fused_us(launch, size, pairs).max(in_us + out_us),
        Some(_) => by_tokens(),
        None => by_tokens().min(Cost::of_pairs(launch).us(pairs)),
    };
    Cost::of_all(launch).base + Cost::of_hidden(launch).us(pairs).max(in_us) + second_us.max(out_us)
}

/// Of f32: multiply-adds without tensor cores, with what tiles leave empty, and the launches.
fn f32_products_us(launch: &Launch, pairs: f64) -> f64 {
    let factors = (launch.halves + 1) as f64 * launch.d_model as f64;
    let of_experts =
        (pairs + 40.0 * launch.num_experts as f64) * factors * launch.expert_width as f64;
    let of_token = factors * launch.shared as f64 + 2.0 * (launch.rank * launch.d_model) as f64;
    90.0 + (of_experts + launch.num_tokens as f64 * of_token) / 1.25e7
}

/// One kernel for both products, and the sums: rounds of tiles, which bring an expert's weights. An expert has one at least, where
/// there are pairs for it, and leaves half of one empty. Each output of a pair is written and read, and y. With what ends at once.
fn fused_us(launch: &Launch, size: usize, pairs: f64) -> f64 {
    const TILE_TOKENS: usize = 192;
    let (d_model, experts) = (launch.d_model as f64, launch.num_experts as f64);
    let of_all = groups_of_all(launch);
    let of_experts = (pairs / TILE_TOKENS as f64 + experts / 2.0).max(experts).min(pairs);
    let tiles = of_experts + (of_all * launch.num_tokens.div_ceil(TILE_TOKENS)) as f64;
    let rounds = (tiles / launch.multiprocessors as f64).ceil();
    let outputs = pairs + (of_all * launch.num_tokens) as f64;
    let of_round = 8.7e-3 + 6e-5 * FUSED_ROWS[size] as f64;
    7.7 + d_model * (rounds * of_round + 1.4e-6 * launch.num_tokens as f64 + 1.1e-6 * outputs)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cuda) fn launch(
        num_tokens: usize,
        d_model: usize,
        num_experts: usize,
        expert_width: usize,
    ) -> Launch {
        Launch {
            dtype: DType::BF16,
            num_tokens,
            d_model,
            d_ff: num_experts * expert_width,
            num_experts,
            expert_width,
            shared: 0,
            rank: 0,
            halves: 1,
            multiprocessors: 132,
            is_wide: true,
        }
    }

    /// What the tests on a GPU count on.
    #[test]
    fn more_pairs_than_outputs_have_room_for_go_in_two_launches() {
        for (num_tokens, d_model, num_experts, expert_width) in
            [(1, 8, 1, 8), (60, 64, 24, 16), (99, 392, 40, 64), (150, 1000, 3, 32)]
        {
            let launch = launch(num_tokens, d_model, num_experts, expert_width);
            let pairs = num_tokens * num_experts;
            let ways = |expected: f64| Ways::new(&launch, pairs - 1, expected).expect("sizes fit");
            let (few, many) = (ways(0.0), ways((1u64 << 40) as f64));
            assert_eq!((few.fused.is_some(), few.resident), (true, None));
            assert_eq!((many.fused, many.resident.is_some()), (None, true));
        }
    }

    /// On an H100, bf16, random routing at a density: `experts_us` of `moefy bench ffn --path expert-major`.
    #[test]
    fn estimates_are_near_what_was_measured() {
        for (num_tokens, d_model, num_experts, expert_width, density, us) in [
            (512, 768, 24, 128, 0.05, 20.4),
            (512, 768, 24, 128, 0.2, 21.5),
            (2048, 768, 24, 128, 0.05, 23.7),
            (2048, 768, 24, 128, 0.1, 24.5),
            (2048, 768, 24, 128, 0.2, 30.1),
            (8192, 768, 24, 128, 0.05, 37.6),
            (8192, 768, 24, 128, 0.1, 45.7),
            (8192, 768, 24, 128, 0.2, 81.0),
            (8192, 768, 24, 128, 1.0, 181.1),
            (2048, 768, 48, 64, 0.2, 32.4),
            (4096, 768, 48, 64, 0.05, 29.8),
            (4096, 768, 48, 64, 0.1, 34.7),
            (4096, 768, 48, 64, 0.2, 50.1),
            (8192, 768, 48, 64, 0.1, 54.1),
            (8192, 768, 48, 64, 0.2, 88.0),
            (8192, 768, 48, 64, 0.3, 105.3),
            (2048, 768, 96, 32, 0.05, 27.0),
            (2048, 768, 96, 32, 0.1, 42.8),
            (4096, 768, 96, 32, 0.05, 46.1),
            (4096, 768, 96, 32, 0.1, 50.9),
            (2048, 768, 96, 32, 0.4, 58.2),
            (4096, 768, 96, 32, 0.4, 88.9),
            (8192, 768, 96, 32, 0.03, 53.6),
            (8192, 768, 96, 32, 0.1, 91.8),
            (8192, 768, 96, 32, 0.2, 157.5),
            (2048, 1024, 64, 64, 0.1, 34.1),
            (2048, 1024, 64, 64, 0.2, 44.1),
            (4096, 1024, 64, 64, 0.1, 46.7),
            (4096, 1024, 64, 64, 0.2, 73.6),
            (4096, 1024, 64, 64, 0.4, 132.4),
            (8192, 1024, 64, 64, 0.05, 68.2),
            (8192, 1024, 64, 64, 0.1, 78.8),
            (8192, 1024, 64, 64, 0.2, 125.6),
            (8192, 1024, 64, 64, 0.3, 197.2),
            (8192, 1024, 64, 64, 0.6, 275.6),
            (512, 4096, 112, 128, 0.1, 190.7),
            (2048, 4096, 112, 128, 0.1, 293.8),
            (2048, 4096, 112, 128, 0.2, 467.1),
            (2048, 4096, 112, 128, 0.3, 624.2),
            (8192, 4096, 112, 128, 0.1, 978.7),
            (8192, 4096, 112, 128, 0.2, 1674.3),
            (8192, 4096, 112, 128, 0.3, 2313.1),
            (8192, 4096, 112, 128, 0.4, 2983.9),
        ] {
            let halves = if d_model == 4096 { 2 } else { 1 };
            let launch =
                Launch { halves, ..launch(num_tokens, d_model, num_experts, expert_width) };
            let max_pairs = num_tokens * num_experts;
            let estimate = products_us(&launch, max_pairs, max_pairs as f64 * density);
            assert!(
                (estimate / us - 1.0).abs() < 0.15,
                "{launch:?} {density}: {estimate} for {us}"
            );
        }
    }
}
