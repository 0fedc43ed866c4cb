//! The kernels of [`experts`](super::experts) by tiles of tokens, on Hopper: both products by whole warpgroups.

use super::driver::{Function, RawStream};
use super::experts::Launch;
use super::kernels::Modules;
use super::token_tiles::TILE_TOKENS;
use crate::abi::moefy_experts_tiled_params;
use crate::dtype::DType;
use crate::error::Result;

const MODULES: [&str; 2] = ["sm90_experts_tiled_hidden", "sm90_experts_tiled_output"];
/// Of a block.
const THREADS: u32 = 384;
const SHARED_BYTES: usize = 192 << 10;

/// Both products, of f16 and of bf16.
pub(super) struct Kernels([[Function; 2]; 2]);

impl Kernels {
    /// `None` on another device.
    pub(super) fn load(modules: &Modules) -> Result<Option<Self>> {
        if modules.module(MODULES[0]).is_none() {
            return Ok(None);
        }
        let load = |product, name| modules.function(MODULES[product], name, SHARED_BYTES);
        Ok(Some(Self([
            [
                load(0, "moefy_experts_tiled_hidden_f16")?,
                load(1, "moefy_experts_tiled_output_f16")?,
            ],
            [
                load(0, "moefy_experts_tiled_hidden_bf16")?,
                load(1, "moefy_experts_tiled_output_bf16")?,
            ],
        ])))
    }

    /// Of a type, where there are some.
    pub(super) fn of(&self, dtype: DType) -> Option<&[Function; 2]> {
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
    blocks: u32,
    /// Elements of h of a tile.
    hidden_tile: usize,
    inverse_width: f32,
    pub(super) bytes: usize,
}

impl Shape {
    /// `None` where the sizes overflow. Room for every neuron of every token, whatever the masks select.
    pub(super) fn new(launch: &Launch) -> Option<Self> {
        let neurons = launch.d_ff.checked_add(launch.rank)?.checked_next_multiple_of(8)?;
        let hidden_tile = neurons.checked_mul(TILE_TOKENS)?;
        let elements = hidden_tile.checked_mul(launch.num_tokens.div_ceil(TILE_TOKENS))?;
        Some(Self {
            blocks: launch.multiprocessors as u32,
            hidden_tile,
            inverse_width: 1.0 / launch.expert_width as f32,
            bytes: elements.checked_mul(launch.dtype.bytes())?,
        })
    }

    /// # Safety
    /// The addresses in `params`, and at `workspace` as many bytes as the shape says, must be what
    /// the kernels expect, and the context must be bound.
    pub(super) unsafe fn launch(
        &self,
        products: &[Function; 2],
        stream: RawStream,
        params: &moefy_experts_tiled_params,
        workspace: u64,
    ) -> Result<()> {
        let params = moefy_experts_tiled_params {
            hidden: workspace,
            hidden_tile: self.hidden_tile as u64,
            inverse_width: self.inverse_width,
            ..*params
        };
        for product in products {
            // SAFETY: the caller's promise.
            unsafe {
                product.launch(stream, [self.blocks, 1, 1], THREADS, SHARED_BYTES, &params)?;
            }
        }
        Ok(())
    }
}
