//! The kernels of [`experts`](super::experts) for many tokens that run most experts, on Hopper: all of them, under masks. The
//! first product is also one of a masked dense layer ([`super::dense`]).

use super::driver::{Function, RawStream, tensor_map};
use super::experts::Launch;
use super::kernels::Modules;
use super::router_select::NextBegins;
use crate::abi::{
    moefy_experts_masked_params, moefy_experts_params, moefy_tensor_map as TensorMap,
};
use crate::dtype::DType;
use crate::error::Result;

const MODULE: &str = "sm90_experts_masked";
/// Of a block.
const THREADS: u32 = 384;
/// Tokens of an item, and elements of its depth in a stage.
const TOKENS: usize = 128;
const DEPTH: usize = 64;
/// Neurons of an item of the first product, columns of one of the second.
const NEURONS: usize = 128;
const COLUMNS: [usize; 2] = [128, 192];

/// Both products of a type.
pub(super) struct OfType {
    hidden: Function,
    /// Those that wait for masks when they need them; the second one where a block has one item.
    hidden_early: [Function; 2],
    output: [Function; 2],
}

impl OfType {
    /// Names of those for the first product, and of those for the second one.
    pub(super) fn load(
        modules: &Modules,
        [hidden, hidden_early, hidden_halves]: [&'static str; 3],
        output: [&'static str; 2],
    ) -> Result<Self> {
        let load = |name, across| modules.function(MODULE, name, shared_bytes(across));
        Ok(Self {
            hidden: load(hidden, NEURONS)?,
            hidden_early: [load(hidden_early, NEURONS)?, load(hidden_halves, NEURONS)?],
            output: [load(output[0], COLUMNS[0])?, load(output[1], COLUMNS[1])?],
        })
    }
}

/// Of all stages, of which an item of `across` has so many.
fn shared_bytes(across: usize) -> usize {
    let stages = if across == 192 { 5 } else { 6 };
    stages * (TOKENS + across) * DEPTH * 2
}

/// Sizes of the launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    dtype: DType,
    num_tokens: usize,
    d_model: usize,
    d_ff: usize,
    multiprocessors: usize,
    /// Which kernel the second product takes.
    output: usize,
    /// Microseconds of both on an H100.
    pub(super) us: f64,
}

impl Shape {
    /// `None` for a layer that these kernels cannot do.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let Launch { dtype, num_tokens, d_model, d_ff, multiprocessors, .. } = *launch;
        let in_groups = [launch.expert_width, d_ff].iter().all(|n| n.is_multiple_of(8));
        if !launch.is_wide || launch.halves != 1 || launch.rank != 0 || !in_groups {
            return None;
        }
        let tiles = num_tokens.div_ceil(TOKENS);
        // Rounds of items: their stages, and what it takes to store (kernels/NOTES.md).
        let rounds = |across: usize, total: usize| {
            (tiles * total.div_ceil(across)).div_ceil(multiprocessors) as f64
        };
        let stages = |depth: usize| depth.div_ceil(DEPTH) as f64;
        let hidden_us = rounds(NEURONS, d_ff) * (stages(d_model) * 0.39 + 0.5);
        let output_us = COLUMNS.map(|across| {
            let width = across as f64;
            rounds(across, d_model) * (stages(d_ff) * (0.05 + 0.00265 * width) + 0.014 * width)
        });
        let output = usize::from(output_us[1] < output_us[0]);
        // In a layer, whose weights and tokens come from memory, and with the launches that end at once.
        let us = 14.0 + 1.2 * (hidden_us + output_us[output]);
        Some(Self { dtype, num_tokens, d_model, d_ff, multiprocessors, output, us })
    }

    /// Both products, where so many pairs exist as the parameters say.
    ///
    /// # Safety
    /// The addresses in `params` must be what the kernels expect, with h \[num_tokens, d_ff\], and the context must be
    /// bound.
    pub(super) unsafe fn launch(
        &self,
        kernels: &OfType,
        stream: RawStream,
        params: &moefy_experts_params,
    ) -> Result<()> {
        let across = COLUMNS[self.output];
        // SAFETY: the caller's promise.
        unsafe {
            self.launch_hidden(kernels, stream, params, NextBegins::Anytime)?;
            let hidden = self.map(params.hidden, [self.d_ff, self.num_tokens], TOKENS)?;
            let w_out = self.map(params.neurons.w_out, [self.d_model, self.d_ff], DEPTH)?;
            self.run(&kernels.output[self.output], stream, [hidden, w_out], across, params)
        }
    }

    /// The first product. Where the kernel before it lets it begin with the tokens, there are no lists.
    ///
    /// # Safety
    /// As for [`Self::launch`].
    pub(super) unsafe fn launch_hidden(
        &self,
        kernels: &OfType,
        stream: RawStream,
        params: &moefy_experts_params,
        begins: NextBegins,
    ) -> Result<()> {
        let num_items = self.num_tokens.div_ceil(TOKENS) * self.d_ff.div_ceil(NEURONS);
        let kernel = match begins {
            NextBegins::WithTokens => {
                &kernels.hidden_early[usize::from(num_items <= self.multiprocessors)]
            }
            NextBegins::Anytime => &kernels.hidden,
        };
        let x = self.map(params.x, [self.d_model, self.num_tokens], TOKENS)?;
        let w_in = self.map(params.neurons.w_in, [self.d_model, self.d_ff], NEURONS)?;
        // SAFETY: the caller's promise.
        unsafe { self.run(kernel, stream, [x, w_in], NEURONS, params) }
    }

    fn map(&self, matrix: u64, [columns, rows]: [usize; 2], box_rows: usize) -> Result<TensorMap> {
        let row = (columns * self.dtype.bytes()) as u64;
        let sizes = [columns as u64, rows as u64];
        tensor_map(self.dtype, matrix, sizes, &[row], [DEPTH as u32, box_rows as u32])
    }

    unsafe fn run(
        &self,
        kernel: &Function,
        stream: RawStream,
        [rows, weights]: [TensorMap; 2],
        across: usize,
        params: &moefy_experts_params,
    ) -> Result<()> {
        let params =
            moefy_experts_masked_params { rows, weights, experts: *params, reserved: [0; 3] };
        let grid = [self.multiprocessors as u32, 1, 1];
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(stream, grid, THREADS, shared_bytes(across), &params) }
    }
}
