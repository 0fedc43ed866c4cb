//! Which way a layer is computed.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::dense::DenseLayer;
use super::places::MAX_CHUNK;
#[cfg(feature = "cuda")]
use super::plan::Stage;
use super::router_select::Launches;
use super::view::View;
use super::{MoeFfn, Tuning, experts, experts_masked, ffn_few, token_tiles};
use crate::dtype::DType;
use crate::error::Result;
use crate::ffn::{Gate, Selection};

/// Most tokens for which a choice considers [`Path::Few`].
pub(super) const MAX_FEW_TOKENS: usize = 8;
/// Fewest tokens for which a choice goes expert by expert: with fewer, tiles are mostly empty.
pub(super) const MIN_MANY_TOKENS: usize = 512;

/// Paths with the fewest tokens that take them, ascending from 0: to choose one takes too long to do it in every run.
#[derive(Clone, Debug)]
pub(super) struct Paths(Vec<(usize, Path)>);

impl Paths {
    /// Numbers of tokens that are looked at one by one; from then on, as many go as the first of them.
    const STEP: usize = 64;

    pub(super) fn new(path_of: impl Fn(usize) -> Path) -> Self {
        let mut paths: Vec<(usize, Path)> = Vec::new();
        let steps = (1..=MAX_CHUNK / Self::STEP).map(|step| step * Self::STEP);
        for num_tokens in (0..Self::STEP).chain(steps) {
            let path = path_of(num_tokens);
            if paths.last().is_none_or(|last| last.1 != path) {
                paths.push((num_tokens, path));
            }
        }
        Self(paths)
    }

    /// More tokens than a chunk go in chunks.
    pub(super) fn get(&self, num_tokens: usize) -> Path {
        let Self(paths) = self;
        paths[paths.partition_point(|&(fewest, _)| fewest <= num_tokens) - 1].1
    }
}

/// Pre-activations up to which the router of a masked dense layer runs beside its first product: with more, either of them
/// fills the chip.
const MAX_BESIDE: usize = 4 << 20;

/// Tokens of a masked dense layer whose first product goes under masks (kernels/NOTES.md).
const UNDER_MASKS: RangeInclusive<usize> = 449..=2048;

/// A way to compute the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// `few-fused`: streams the union of the tokens' experts, with routing inside; f16 and bf16 on Hopper,
    /// up to 32 tokens. Where two to eight tokens of a narrow layer execute most neurons, it streams all of them, and what a
    /// token does not execute is multiplied by zero: a weight that is NaN or infinite, with which no layer is made, gives NaN
    /// then also where nobody selects its expert, as on `dense-masked`.
    FewFused,
    /// `few`: streams the union of the tokens' experts.
    Few,
    /// `expert-major`: each expert with its own tokens.
    ExpertMajor,
    /// `token-tile`: tokens whose masks are alike side by side, and each 128 of them over the union of their experts; f16
    /// and bf16 on Hopper. It pays where routing is correlated, and nothing here knows how much: a plan takes it only when
    /// it is told to.
    TokenTile,
    /// `dense-exact`: the original FFN.
    DenseExact,
    /// `dense-masked`: the function of the experts, computed densely: by cuBLASLt, with masks between its products, or with a
    /// first product that masks what it gives.
    DenseMasked,
}

impl Path {
    /// Every path.
    pub const ALL: [Self; 6] = [
        Self::FewFused,
        Self::Few,
        Self::ExpertMajor,
        Self::TokenTile,
        Self::DenseExact,
        Self::DenseMasked,
    ];

    /// Its name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::FewFused => "few-fused",
            Self::Few => "few",
            Self::ExpertMajor => "expert-major",
            Self::TokenTile => "token-tile",
            Self::DenseExact => "dense-exact",
            Self::DenseMasked => "dense-masked",
        }
    }

    /// Where a run can be stopped to see what each part costs; a path of one piece has no such place.
    #[cfg(feature = "cuda")]
    pub(super) fn stages(self) -> &'static [Stage] {
        match self {
            Self::ExpertMajor | Self::TokenTile => &[Stage::Route, Stage::Index],
            Self::Few | Self::DenseMasked => &[Stage::Route],
            _ => &[],
        }
    }
}

/// What runs where the dense products are faster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// The original FFN, without a router: at least as accurate as the sparse one.
    #[default]
    Exact,
    /// The sparse layer's own function: one function at every number of tokens.
    Masked,
}

impl Fallback {
    /// The path that it is.
    pub fn path(self) -> Path {
        match self {
            Self::Exact => Path::DenseExact,
            Self::Masked => Path::DenseMasked,
        }
    }

    /// Its name on the command line and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Masked => "masked",
        }
    }
}

/// What a plan may choose.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanOptions {
    /// Always this path; `None` chooses by the number of tokens.
    pub path: Option<Path>,
    /// What a choice may fall back to.
    pub fallback: Fallback,
    /// Mean density: what a choice by the number of tokens goes by. `None` is the layer's calibrated one and, where that is not
    /// known either, the most that selection can give, of top-k what it always gives.
    pub density: Option<f64>,
    /// Whether to count what selection does.
    pub statistics: bool,
}

/// What a run reads.
#[derive(Clone, Copy, Debug)]
pub struct FfnInputs {
    /// \[num_tokens, d_model\], without gaps, aligned to 16 bytes, of the weights' element type.
    pub x: View,
    /// u32 \[1, 1\]: rows at and beyond it are padding and come back as zeros.
    pub num_valid_tokens: Option<View>,
    /// f32 \[num_tokens, num_experts\]: selection reads these scores instead of the router's, which
    /// runs all the same. For measurements under imposed routing.
    pub scores: Option<View>,
    /// Instead of the layer's own; it must not be able to select more experts than that.
    pub selection: Option<Selection>,
    /// Receives S(t), u32 \[num_tokens, ⌈num_experts/32⌉\], on every path but `dense-exact`.
    pub mask: Option<View>,
    /// One word that gains status bits; see [`SelectOutputs`](super::SelectOutputs) and
    /// [`RouteIndexOutputs`](super::RouteIndexOutputs).
    pub status: Option<View>,
}

impl FfnInputs {
    /// Nothing but tokens.
    pub fn new(x: View) -> Self {
        Self { x, num_valid_tokens: None, scores: None, selection: None, mask: None, status: None }
    }
}

impl MoeFfn {
    /// The path for so many tokens. `many`: whether there is memory to go expert by expert by choice.
    pub(super) fn path(&self, num_tokens: usize, options: &PlanOptions, many: bool) -> Path {
        let tuning = self.device().tuning();
        options.path.unwrap_or_else(|| self.choose(tuning, num_tokens, options, many))
    }

    /// The same for all numbers of tokens.
    pub(super) fn paths(&self, options: &PlanOptions, many: bool) -> Paths {
        Paths::new(|num_tokens| self.path(num_tokens, options, many))
    }

    /// The path where none is forced, by a tuning where it has every time that matters: what was measured is
    /// never compared with an estimate.
    pub(super) fn choose(
        &self,
        tuning: Option<&Tuning>,
        num_tokens: usize,
        options: &PlanOptions,
        many: bool,
    ) -> Path {
        let dense = options.fallback.path();
        let sparse = self.sparse_paths(num_tokens, options, many);
        let measured = tuning.and_then(|tuning| tuning.layer(self.shape())).and_then(|layer| {
            let density = self.density(options);
            faster(sparse.clone(), dense, |path| layer.us(path, num_tokens, density))
        });
        let estimate = |path| Some(self.estimate_us(path, num_tokens, options));
        measured.or_else(|| faster(sparse, dense, estimate)).unwrap_or(dense)
    }

    /// What a choice may take instead of the dense path.
    pub(super) fn sparse_paths(
        &self,
        num_tokens: usize,
        options: &PlanOptions,
        many: bool,
    ) -> impl Iterator<Item = Path> + Clone {
        let fused = self.few_fused(num_tokens, options).map(|_| Path::FewFused);
        let few = (num_tokens <= MAX_FEW_TOKENS).then_some(Path::Few);
        let many = (many && num_tokens >= MIN_MANY_TOKENS).then_some(Path::ExpertMajor);
        fused.into_iter().chain(few).chain(many)
    }

    /// The density that a choice goes by: executed neurons of all, the shared ones included.
    fn density(&self, options: &PlanOptions) -> f64 {
        let neurons = self.neurons();
        let most = self.selection().most_experts(neurons.num_experts) * neurons.expert_width;
        let known = options.density.or(self.calibrated_density());
        known.unwrap_or((most + neurons.shared) as f64 / neurons.d_ff() as f64)
    }

    /// Of the neurons that experts have, those that a token executes.
    pub(super) fn routed_density(&self, options: &PlanOptions) -> f64 {
        let neurons = self.neurons();
        let executed = self.density(options) * neurons.d_ff() as f64 - neurons.shared as f64;
        let routed = (neurons.num_experts * neurons.expert_width) as f64;
        (executed / routed).clamp(0.0, 1.0)
    }

    /// Microseconds that a path takes, from measurements on an H100 (kernels/NOTES.md): good enough to
    /// choose by. Constants are microseconds, bytes and multiply-adds per microsecond.
    fn estimate_us(&self, path: Path, num_tokens: usize, options: &PlanOptions) -> f64 {
        let neurons = self.neurons();
        let element = self.dtype().bytes() as f64;
        let (tokens, d_model) = (num_tokens as f64, neurons.d_model() as f64);
        let [rows_in, rows_out] = [&neurons.w_in, &neurons.w_out].map(|w| w.shape[0] as f64);
        let all_us = (rows_in + rows_out) * d_model * element / 2.8e6;
        let density = self.routed_density(options);
        let union = union_of(density, num_tokens);
        let shared = neurons.shared as f64 / neurons.d_ff() as f64;
        let union_us = (shared + (1.0 - shared) * union) * all_us;
        let products_us =
            dense_products_us(self.dtype(), num_tokens, rows_in + rows_out, d_model, all_us);
        match path {
            Path::FewFused => {
                self.few_fused(num_tokens, options).map_or(f64::INFINITY, |shape| shape.us())
            }
            Path::Few => {
                experts::few_us(self.device(), neurons, self.dtype(), num_tokens, union_us)
            }
            Path::DenseExact => {
                // That of a GLU always is; the constants of the products were measured with it.
                let is_fused =
                    || self.exact().is_ok_and(|layer| layer.fused_activation().is_some());
                let apart_us = match neurons.glu || is_fused() {
                    true => 0.0,
                    false => activation_us(num_tokens, neurons.d_ff()),
                };
                products_us + apart_us
            }
            Path::DenseMasked if self.under_masks(num_tokens).is_some() => {
                products_us + 2.5 + 0.0055 * tokens
            }
            Path::DenseMasked => {
                let router_us = if self.routes_beside(num_tokens) {
                    3.0 + 0.005 * tokens
                } else {
                    router_us(self.dtype(), num_tokens, d_model)
                };
                // Either zeros are written over what a token does not run, or all of h is gone through, which does the
                // activation too.
                let masks_later =
                    self.masked().is_ok_and(|layer| layer.fused_activation().is_some());
                let mask_us = if masks_later {
                    3.5 + (1.0 - density) * tokens * rows_out * element / 3.7e6
                } else {
                    tokens * (rows_in + rows_out) * element / 2e6
                };
                products_us + router_us + mask_us
            }
            Path::TokenTile => f64::INFINITY,
            Path::ExpertMajor => {
                let chunk = num_tokens.min(MAX_CHUNK);
                let index_us =
                    router_us(self.dtype(), chunk, d_model) + lists_us(chunk, neurons.num_experts);
                tokens / chunk as f64 * (index_us + self.expert_major_us(chunk, density))
            }
        }
    }

    /// Both products of [`Path::ExpertMajor`].
    fn expert_major_us(&self, num_tokens: usize, density: f64) -> f64 {
        let neurons = self.neurons();
        let max_pairs = num_tokens * self.selection().most_experts(neurons.num_experts);
        let pairs = (num_tokens * neurons.num_experts) as f64 * density;
        experts::many_us(self.device(), neurons, self.dtype(), num_tokens, max_pairs, pairs)
    }

    /// The fused path for so many tokens, if it can do them.
    pub(super) fn few_fused(
        &self,
        num_tokens: usize,
        options: &PlanOptions,
    ) -> Option<ffn_few::Shape> {
        let neurons = self.neurons();
        let routed = (neurons.num_experts * neurons.expert_width) as f64;
        let union = union_of(self.routed_density(options), num_tokens);
        let sizes = ffn_few::Sizes {
            neurons,
            router: self.router().view(),
            dtype: self.dtype(),
            num_tokens,
            sorts: self.selection().sorts(),
            expected_neurons: (union * routed) as usize + neurons.shared + neurons.rank,
        };
        ffn_few::Shape::new(self.device(), &sizes)
    }

    /// The same for 1, 2, … tokens of a plan, where a choice or a caller may take it.
    pub(super) fn few_fused_shapes(
        &self,
        max_tokens: usize,
        options: &PlanOptions,
    ) -> Vec<Option<ffn_few::Shape>> {
        let may = options.path.is_none_or(|forced| forced == Path::FewFused);
        let most = if may { max_tokens.min(ffn_few::MAX_TOKENS) } else { 0 };
        (1..=most).map(|tokens| self.few_fused(tokens, options)).collect()
    }

    /// Whether the router of a masked dense layer runs beside its first product.
    pub(super) fn routes_beside(&self, num_tokens: usize) -> bool {
        num_tokens.saturating_mul(self.neurons().w_in.shape[0]) <= MAX_BESIDE
    }

    /// The first product under masks for so many tokens of [`Path::DenseMasked`], where it is faster than masks between two
    /// products of cuBLASLt: it can do this layer, and multiply while the router works.
    pub(super) fn under_masks(&self, num_tokens: usize) -> Option<experts_masked::Shape> {
        let (device, dtype) = (self.device(), self.dtype());
        let router = self.router().view();
        let selection = self.selection();
        let launches = || Launches::of(device, num_tokens, dtype, &router, &selection);
        let begins_with_tokens = UNDER_MASKS.contains(&num_tokens)
            && self.gate() == Gate::One
            && matches!(launches(), Ok(Launches::Block(_)));
        let launch = || experts::Launch::new(device, self.neurons(), dtype, num_tokens);
        begins_with_tokens.then(launch).and_then(|launch| experts_masked::Shape::new(&launch))
    }

    /// Whether a plan may take [`Path::DenseMasked`].
    pub(super) fn may_be_masked(&self, options: &PlanOptions) -> bool {
        options.path.map_or(options.fallback == Fallback::Masked, |path| path == Path::DenseMasked)
    }

    /// Whether tiles of tokens can do this layer.
    pub(super) fn token_tiles(&self) -> bool {
        let tiled = &self.device().experts.tiled;
        self.neurons().num_experts <= token_tiles::MAX_EXPERTS
            && tiled.as_ref().and_then(|kernels| kernels.of(self.dtype())).is_some()
    }

    /// What cuBLASLt has to do for at most so many tokens, if anything.
    pub(super) fn dense_layer_of(
        &self,
        max_tokens: usize,
        options: &PlanOptions,
    ) -> Result<Option<DenseLayer>> {
        match (options.path, options.fallback) {
            _ if max_tokens == 0 => Ok(None),
            (Some(Path::DenseExact), _) | (None, Fallback::Exact) => self.exact().map(Some),
            (Some(Path::DenseMasked), _) | (None, Fallback::Masked) => self.masked().map(Some),
            (Some(_), _) => Ok(None),
        }
    }
}

/// What of the experts some tokens together execute, if they route independently.
fn union_of(density: f64, num_tokens: usize) -> f64 {
    1.0 - (1.0 - density).powi(num_tokens.min(1 << 20) as i32)
}

/// Both products of a dense path with so many rows of weights, which take `read_us` from memory. Products of f32 are not done
/// by tensor cores.
fn dense_products_us(
    dtype: DType,
    num_tokens: usize,
    rows: f64,
    d_model: f64,
    read_us: f64,
) -> f64 {
    // Deeper first products are faster up to d 1024, beyond which the clock goes down (kernels/NOTES.md).
    let deeper = ((d_model - 768.0) / 256.0).clamp(0.0, 1.0);
    let rate = if dtype == DType::F32 { 2.4e7 } else { 3.6e8 + 2e7 * deeper };
    9.2 + (0.965 * read_us).max(num_tokens as f64 * rows * d_model / rate)
}

/// An activation that cuBLASLt cannot do with the first product.
fn activation_us(num_tokens: usize, d_ff: usize) -> f64 {
    /// Microseconds for each pre-activation, of f16.
    const OF_EACH_US: f64 = 2.2e-6;
    OF_EACH_US * (num_tokens * d_ff) as f64
}

/// A router for many tokens, and selection.
fn router_us(dtype: DType, num_tokens: usize, d_model: f64) -> f64 {
    if dtype == DType::F32 {
        return 0.06 * d_model * (num_tokens as f64 / 3700.0).max(1.0);
    }
    let inputs = num_tokens as f64 * d_model;
    if d_model <= 1024.0 { 6.0 + 0.75e-6 * inputs } else { 8.5 + 1e-6 * inputs }
}

/// Lists from masks.
fn lists_us(num_tokens: usize, num_experts: usize) -> f64 {
    2.0 + 4.2e-6 * (num_tokens * num_experts) as f64
}

/// The fastest of the sparse paths and the dense one, if the times of all of them are known.
fn faster(
    sparse: impl Iterator<Item = Path>,
    dense: Path,
    us: impl Fn(Path) -> Option<f64>,
) -> Option<Path> {
    // Where they are equal, the dense one needs no router.
    let mut best = (dense, 0.97 * us(dense)?);
    for path in sparse {
        let us = us(path)?;
        if us < best.1 {
            best = (path, us);
        }
    }
    Some(best.0)
}

#[cfg(test)]
mod tests {
    use super::super::experts_many_ways::{products_us, tests::launch};
    use super::*;

    /// On an H100, random routing at a density of .1: `us` of `moefy bench ffn`, by name; dense in f16 with an exact GELU, the
    /// other in bf16.
    #[test]
    fn estimates_are_near_what_was_measured() {
        let (d_model, num_experts, expert_width) = (768, 48, 64);
        let d_ff = num_experts * expert_width;
        for (num_tokens, dense, expert_major) in
            [(2048, 53.2, 37.3), (4096, 91.3, 46.1), (8192, 171.0, 72.0)]
        {
            let rows = 2 * d_ff;
            let read_us = (rows * d_model * DType::F16.bytes()) as f64 / 2.8e6;
            let of_dense =
                dense_products_us(DType::F16, num_tokens, rows as f64, d_model as f64, read_us)
                    + activation_us(num_tokens, d_ff);
            let launch = experts::Launch {
                dtype: DType::F16,
                ..launch(num_tokens, d_model, num_experts, expert_width)
            };
            let max_pairs = num_tokens * num_experts;
            let of_expert_major = router_us(DType::F16, num_tokens, d_model as f64)
                + lists_us(num_tokens, num_experts)
                + products_us(&launch, max_pairs, 0.1 * max_pairs as f64);
            for (estimate, us) in [(of_dense, dense), (of_expert_major, expert_major)] {
                assert!(
                    (estimate / us - 1.0_f64).abs() < 0.15,
                    "{num_tokens}: {estimate} for {us}"
                );
            }
        }
    }

    /// On an H100, f32, random routing: `us` of `moefy bench ffn`, by name.
    #[test]
    fn estimates_of_f32_are_near_what_was_measured() {
        for (num_tokens, d_model, num_experts, density, dense, expert_major) in [
            (2048, 768, 24, 0.1, 456.8, 276.2),
            (2048, 768, 24, 0.2, 460.5, 344.9),
            (8192, 768, 24, 0.1, 1682.1, 510.7),
            (8192, 768, 24, 0.4, 1682.1, 1463.6),
            (512, 4096, 112, 0.1, 4051.9, 1388.9),
            (512, 4096, 112, 0.4, 4112.3, 3679.6),
            (2048, 4096, 112, 0.2, 14523.9, 6625.8),
            (8192, 4096, 112, 0.2, 58950.0, 22580.2),
        ] {
            let halves = if d_model == 4096 { 2 } else { 1 };
            let rows = (halves + 1) * num_experts * 128;
            let of_dense =
                dense_products_us(DType::F32, num_tokens, rows as f64, d_model as f64, 0.0);
            let launch = experts::Launch {
                dtype: DType::F32,
                is_wide: false,
                halves,
                ..launch(num_tokens, d_model, num_experts, 128)
            };
            let max_pairs = num_tokens * num_experts;
            let of_expert_major = router_us(DType::F32, num_tokens, d_model as f64)
                + lists_us(num_tokens, num_experts)
                + products_us(&launch, max_pairs, density * max_pairs as f64);
            for (estimate, us) in [(of_dense, dense), (of_expert_major, expert_major)] {
                let differs = (estimate / us - 1.0_f64).abs();
                assert!(differs < 0.2, "{num_tokens} {d_model} {density}: {estimate} for {us}");
            }
        }
    }

    #[test]
    fn paths_are_those_of_every_number_of_tokens() {
        let path_of = |num_tokens: usize| match num_tokens {
            0..=4 => Path::FewFused,
            5..=8 => Path::Few,
            9..1024 => Path::DenseExact,
            _ => Path::ExpertMajor,
        };
        let paths = Paths::new(path_of);
        for num_tokens in (0..3000).chain([MAX_CHUNK - 1, MAX_CHUNK, MAX_CHUNK + 1, 1 << 20]) {
            assert_eq!(paths.get(num_tokens), path_of(num_tokens), "{num_tokens}");
        }
    }
}
