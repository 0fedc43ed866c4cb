//! The layout of the structs that kernels take, seen from both sides.

use std::mem::offset_of;

use super::driver::Function;
use super::kernels::Modules;
use super::{Buffer, Device, RawStream};
use crate::abi::*;
use crate::error::Result;

pub(super) struct Kernels {
    probe: Function,
}

impl Kernels {
    pub(super) fn load(modules: &Modules) -> Result<Self> {
        Ok(Self { probe: modules.function("abi_probe", "moefy_abi_probe", 0)? })
    }
}

macro_rules! layout {
    ($($type:ident.$last_field:ident),* $(,)?) => {
        vec![$(size_of::<$type>() as u32, offset_of!($type, $last_field) as u32),*]
    };
}

/// Size and offset of the last field of each struct of the contract, as the host sees them.
pub fn host_abi() -> Vec<u32> {
    layout![
        moefy_abi_probe_params.num_words,
        moefy_selection.max_experts,
        moefy_select_params.reserved,
        moefy_router_select_params.w2_in_shared,
        moefy_router_layer_params.reserved,
        moefy_router_many_params.reserved,
        moefy_router_block_params.reserved,
        moefy_route_index_params.reserved,
        moefy_neurons.reserved,
        moefy_experts_params.fused,
        moefy_experts_engine_params.reserved,
        moefy_experts_sums_params.reserved,
        moefy_experts_masked_params.reserved,
        moefy_experts_fused_params.reserved,
        moefy_token_tiles_params.reserved,
        moefy_experts_tiled_params.inverse_width,
        moefy_experts_tiled_engine_params.reserved,
        moefy_ffn_few_params.routing_bytes,
        moefy_add_shares_params.num_tokens,
        moefy_gates_params.reserved,
        moefy_embed_tokens_params.d_model,
        moefy_norm_params.is_rms,
        moefy_attention_params.is_causal,
        moefy_rotary_params.reserved,
        moefy_pool_params.d_model,
        moefy_activate_params.element_bytes,
        moefy_clear_invalid_params.num_tokens,
        moefy_split_valid_params.num_chunks,
        moefy_statistics_params.num_experts,
        moefy_read_bandwidth_params.data_bytes,
    ]
}

/// The same as the device sees them. Waits for the device.
///
/// # Errors
/// When the device fails.
pub fn abi_probe(device: &Device) -> Result<Vec<u32>> {
    let words = Buffer::from_slice(device, &vec![u32::MAX; host_abi().len()])?;
    let num_words = host_abi().len() as u64;
    let params = moefy_abi_probe_params { words: words.address(), num_words };
    device.context.bind()?;
    let default_stream = RawStream(std::ptr::null_mut());
    // SAFETY: the kernel writes `num_words` words, and `read` waits for it.
    unsafe { device.abi_probe.probe.launch(default_stream, [1, 1, 1], 1, 0, &params)? };
    words.read()
}
