//! The kernels of [`experts`](super::experts) by tiles of tokens, on Hopper: both products by whole warpgroups.

use super::driver::{Function, RawStream};
use super::experts::Launch;
use super::kernels::Modules;
use super::token_tiles::TILE_TOKENS;
use crate::abi::{moefy_experts_tiled_engine_params, moefy_experts_tiled_params};
use crate::dtype::DType;
use crate::error::Result;

/// Of the first and the second product.
const MODULES: [&str; 2] = ["sm90_experts_tiled_hidden", "sm90_experts_tiled_output"];
/// Of a block.
const THREADS: u32 = 384;
const SHARED_BYTES: usize = 192 << 10;
/// Elements of a row of h are a multiple of those of a stage.
const DEPTH: usize = 64;

/// Both products of a type.
pub(super) struct OfType {
    single: [Function; 2],
    /// Where the copy engine can bring the weights.
    engine: [Function; 2],
}

/// Of f16 and of bf16.
pub(super) struct Kernels([OfType; 2]);

impl Kernels {
    /// `None` on another device.
    pub(super) fn load(modules: &Modules) -> Result<Option<Self>> {
        if modules.module(MODULES[0]).is_none() {
            return Ok(None);
        }
        let both = |[hidden, output]: [&'static str; 2]| -> Result<[Function; 2]> {
            let load = |product, name| modules.function(MODULES[product], name, SHARED_BYTES);
            Ok([load(0, hidden)?, load(1, output)?])
        };
        Ok(Some(Self([
            OfType {
                single: both(["moefy_experts_tiled_hidden_f16", "moefy_experts_tiled_output_f16"])?,
                engine: both([
                    "moefy_experts_tiled_engine_hidden_f16",
                    "moefy_experts_tiled_engine_output_f16",
                ])?,
            },
            OfType {
                single: both([
                    "moefy_experts_tiled_hidden_bf16",
                    "moefy_experts_tiled_output_bf16",
                ])?,
                engine: both([
                    "moefy_experts_tiled_engine_hidden_bf16",
                    "moefy_experts_tiled_engine_output_bf16",
                ])?,
            },
        ])))
    }

    /// Of a type, where there are some.
    pub(super) fn of(&self, dtype: DType) -> Option<&OfType> {
        match dtype {
            DType::F32 => None,
            DType::F16 => Some(&self.0[0]),
            DType::BF16 => Some(&self.0[1]),
        }
    }
}

/// Sizes of the launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    sizes: Launch,
    hidden_stride: usize,
    hidden_rows: usize,
    /// Neurons that the copy engine brings together, where it can.
    box_neurons: Option<usize>,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where the sizes overflow. Room for every neuron of every token, whatever the masks select.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let Launch { expert_width, shared, rank, .. } = *launch;
        let hidden_stride = launch.d_ff.checked_add(rank)?.checked_next_multiple_of(DEPTH)?;
        let hidden_rows = launch.num_tokens.next_multiple_of(TILE_TOKENS);
        let in_groups = rank == 0 && expert_width.is_multiple_of(8) && shared.is_multiple_of(8);
        Some(Self {
            sizes: *launch,
            hidden_stride,
            hidden_rows,
            box_neurons: in_groups.then(|| 1 << expert_width.trailing_zeros().min(6)),
            bytes: hidden_stride.checked_mul(hidden_rows)?.checked_mul(launch.dtype.bytes())?,
        })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        kernels: &OfType,
        stream: RawStream,
        params: &moefy_experts_tiled_params,
        workspace: u64,
    ) -> Result<()> {
        let Launch { dtype, d_model, d_ff, halves, multiprocessors, .. } = self.sizes;
        let params = moefy_experts_tiled_params {
            hidden: workspace,
            hidden_stride: self.hidden_stride as u64,
            inverse_width: 1.0 / self.sizes.expert_width as f32,
            ..*params
        };
        let blocks = multiprocessors as u32;
        let Some(box_neurons) = self.box_neurons else {
            for product in &kernels.single {
                // SAFETY: the caller's promise.
                unsafe { product.launch(stream, [blocks, 1, 1], THREADS, SHARED_BYTES, &params)? };
            }
            return Ok(());
        };
        let row = (d_model * dtype.bytes()) as u64;
        let [columns, rows, hidden_rows] = [d_model, d_ff, self.hidden_rows].map(|n| n as u64);
        let depth = DEPTH as u32;
        let hidden_row = (self.hidden_stride * dtype.bytes()) as u64;
        let [hidden, output] = &kernels.engine;
        let of_hidden = output.tensor_map(
            dtype,
            workspace,
            [self.hidden_stride as u64, hidden_rows, 1, 1],
            [hidden_row, hidden_row * hidden_rows, hidden_row * hidden_rows],
            [depth, TILE_TOKENS as u32, 1, 1],
        )?;
        let w_in = hidden.tensor_map(
            dtype,
            params.neurons.w_in,
            [columns, 8, halves as u64, rows / 8],
            [row, row * rows, row * 8],
            [depth, 8, halves as u32, box_neurons as u32 / 8],
        )?;
        let w_out = output.tensor_map(
            dtype,
            params.neurons.w_out,
            [columns, rows, 1, 1],
            [row, row * rows, row * rows],
            [depth, box_neurons as u32, 1, 1],
        )?;
        for (product, weights) in [(hidden, w_in), (output, w_out)] {
            let params = moefy_experts_tiled_engine_params {
                weights,
                hidden: of_hidden,
                experts: params,
                box_neurons: box_neurons as u32,
                ..bytemuck::Zeroable::zeroed()
            };
            // SAFETY: the caller's promise.
            unsafe { product.launch(stream, [blocks, 1, 1], THREADS, SHARED_BYTES, &params)? };
        }
        Ok(())
    }
}
