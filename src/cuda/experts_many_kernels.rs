//! The kernels of [`experts`](super::experts) for many tokens, and what a block of each has in shared memory.

use super::driver::Function;
use super::experts::{Variants, variants};
use super::experts_masked;
use super::experts_sums;
use super::kernels::{Modules, PerDType};
use crate::abi::{MOEFY_EXPERTS_RESIDENT_SLOTS, MOEFY_MAX_EXPERTS};
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

pub(super) struct Kernels {
    pub(super) hidden: Variants,
    pub(super) output: PerDType,
    pub(super) output_stages: usize,
    pub(super) sum: PerDType,
    /// On Hopper, of f16 and of bf16.
    pub(super) wide: Option<[Wide; 2]>,
}

/// Both products by whole warpgroups.
pub(super) struct Wide {
    pub(super) hidden: [Function; 4],
    /// Where the copy engine can bring the weights.
    pub(super) engine_hidden: [Function; 4],
    /// The second product of few pairs, in the order of their slots.
    pub(super) sums: [Function; 2],
    /// The second product of many.
    pub(super) token_output: Function,
    /// Both in one launch, for narrow experts.
    pub(super) fused: [Function; 3],
    /// The first product where a block keeps an expert's weights.
    pub(super) resident_hidden: [Function; 3],
    /// All experts, for many pairs of those.
    pub(super) masked: experts_masked::OfType,
}

const WIDE_MODULES: [&str; 4] = [
    "sm90_experts_many_hidden",
    "sm90_experts_many_token_output",
    "sm90_experts_many_fused",
    "sm90_experts_many_resident_hidden",
];
/// Threads of a block, input rows of a block of the first kernel, and its stages.
pub(super) const WIDE_THREADS: u32 = 384;
pub(super) const WIDE_ROWS: [usize; 4] = [32, 64, 128, 256];
const WIDE_STAGES: [usize; 4] = [8, 8, 6, 4];
/// Tokens and columns of a tile of the second product that goes by tokens, neurons of a stage, and bytes of all stages.
pub(super) const TOKEN_TILE: [usize; 2] = [128, 256];
pub(super) const TOKEN_DEPTH: usize = 64;
const TOKEN_STAGES_BYTES: usize = 192 << 10;
/// What a block has on every device that has these kernels, less what is the kernel's own.
pub(super) const WIDE_SHARED_BYTES: usize = 226 << 10;
/// Both products in one launch: threads of a block, pairs of its tile, neurons of a group at most, and its stages.
pub(super) const FUSED_THREADS: u32 = 512;
const FUSED_PAIRS: usize = 192;
pub(super) const FUSED_ROWS: [usize; 3] = [32, 64, 128];
const FUSED_STAGES: [usize; 3] = [7, 6, 5];

macro_rules! fused {
    ($dtype:literal) => {
        [
            concat!("moefy_experts_many_fused_", $dtype, "_32"),
            concat!("moefy_experts_many_fused_", $dtype, "_64"),
            concat!("moefy_experts_many_fused_", $dtype, "_128"),
        ]
    };
}

/// The first product where a block keeps an expert's rows of w_in, so many at most: threads of a block, tokens of its tile and
/// elements of each in a stage.
pub(super) const RESIDENT_THREADS: u32 = 512;
const RESIDENT_TOKENS: usize = 64;
const RESIDENT_DEPTH: usize = 128;
pub(super) const RESIDENT_ROWS: [usize; 3] = [32, 64, 128];

macro_rules! resident_hidden {
    ($dtype:literal) => {
        [
            concat!("moefy_experts_many_resident_hidden_", $dtype, "_32"),
            concat!("moefy_experts_many_resident_hidden_", $dtype, "_64"),
            concat!("moefy_experts_many_resident_hidden_", $dtype, "_128"),
        ]
    };
}

macro_rules! wide_hidden {
    ($dtype:literal) => {
        [wide_hidden!("wide", $dtype), wide_hidden!("engine", $dtype)]
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
        [hidden, engine_hidden]: [[&'static str; 4]; 2],
        (sums, token_output): ([&'static str; 2], &'static str),
        fused: [&'static str; 3],
        resident: [&'static str; 3],
        hidden_masked: [&'static str; 3],
        output_masked: [&'static str; 2],
    ) -> Result<Self> {
        let most = MOEFY_MAX_EXPERTS as usize;
        let load = |names: [&'static str; 4]| -> Result<[Function; 4]> {
            let load = |size: usize| {
                let bytes = wide_hidden_shared_bytes(size, most);
                modules.function(WIDE_MODULES[0], names[size], bytes)
            };
            Ok([load(0)?, load(1)?, load(2)?, load(3)?])
        };
        let load_fused = |size: usize| {
            modules.function(WIDE_MODULES[2], fused[size], fused_shared_bytes(size, most))
        };
        let load_resident =
            |size: usize| modules.function(WIDE_MODULES[3], resident[size], WIDE_SHARED_BYTES);
        Ok(Self {
            hidden: load(hidden)?,
            engine_hidden: load(engine_hidden)?,
            sums: experts_sums::load(modules, sums)?,
            token_output: modules.function(WIDE_MODULES[1], token_output, WIDE_SHARED_BYTES)?,
            fused: [load_fused(0)?, load_fused(1)?, load_fused(2)?],
            resident_hidden: [load_resident(0)?, load_resident(1)?, load_resident(2)?],
            masked: experts_masked::OfType::load(modules, hidden_masked, output_masked)?,
        })
    }
}

pub(super) fn wide_hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    WIDE_STAGES[size] * (TOKENS + WIDE_ROWS[size]) * ROW_BYTES + list_bytes(num_experts)
}

pub(super) fn fused_shared_bytes(size: usize, num_experts: usize) -> usize {
    FUSED_STAGES[size] * (FUSED_PAIRS + FUSED_ROWS[size]) * ROW_BYTES + list_bytes(num_experts)
}

/// Weights of `rows` neurons, slots for stages of tokens, and a word for each expert.
pub(super) fn resident_shared_bytes(rows: usize, d_model: usize, num_experts: usize) -> usize {
    let stages = d_model.div_ceil(RESIDENT_DEPTH);
    let slots = stages.min(MOEFY_EXPERTS_RESIDENT_SLOTS as usize);
    (stages * rows + slots * RESIDENT_TOKENS) * RESIDENT_DEPTH * 2 + list_bytes(num_experts)
}

/// Its lists beside the stages: five words and a bit for each expert, a bit for every stage, and what says which is the last.
pub(super) fn token_output_shared_bytes(num_experts: usize, num_neurons: usize) -> usize {
    let bits = |count: usize| count.div_ceil(32) * 4;
    TOKEN_STAGES_BYTES
        + num_experts * 20
        + bits(num_experts)
        + bits(num_neurons.div_ceil(TOKEN_DEPTH))
        + 16
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
                Wide::load(
                    modules,
                    wide_hidden!("f16"),
                    (
                        ["moefy_experts_many_sums_f16", "moefy_experts_many_sums_more_f16"],
                        "moefy_experts_many_token_output_f16",
                    ),
                    fused!("f16"),
                    resident_hidden!("f16"),
                    [
                        "moefy_experts_masked_hidden_f16",
                        "moefy_experts_masked_hidden_early_f16",
                        "moefy_experts_masked_hidden_halves_f16",
                    ],
                    ["moefy_experts_masked_output_f16_128", "moefy_experts_masked_output_f16_192"],
                )?,
                Wide::load(
                    modules,
                    wide_hidden!("bf16"),
                    (
                        ["moefy_experts_many_sums_bf16", "moefy_experts_many_sums_more_bf16"],
                        "moefy_experts_many_token_output_bf16",
                    ),
                    fused!("bf16"),
                    resident_hidden!("bf16"),
                    [
                        "moefy_experts_masked_hidden_bf16",
                        "moefy_experts_masked_hidden_early_bf16",
                        "moefy_experts_masked_hidden_halves_bf16",
                    ],
                    [
                        "moefy_experts_masked_output_bf16_128",
                        "moefy_experts_masked_output_bf16_192",
                    ],
                )?,
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

    pub(super) fn is_wide(&self, dtype: DType) -> bool {
        self.wide(dtype).is_some()
    }

    /// Those of a type that run all experts under masks, where the device has them.
    pub(super) fn masked(&self, dtype: DType) -> Option<&experts_masked::OfType> {
        self.wide(dtype).map(|wide| &wide.masked)
    }

    /// Of a type, where the device has them.
    pub(super) fn wide(&self, dtype: DType) -> Option<&Wide> {
        let [f16, bf16] = self.wide.as_ref()?;
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(f16),
            DType::BF16 => Some(bf16),
        }
    }
}

pub(super) fn hidden_shared_bytes(size: usize, num_experts: usize) -> usize {
    let stages = if ROWS[size] == 128 { 3 } else { 4 };
    stages * (TOKENS + ROWS[size]) * ROW_BYTES + list_bytes(num_experts)
}

pub(super) fn output_shared_bytes(stages: usize, num_experts: usize) -> usize {
    stages * OUTPUT_STAGE_BYTES + list_bytes(num_experts)
}
