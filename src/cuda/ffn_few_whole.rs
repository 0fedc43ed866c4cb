//! [`super::ffn_few`] where some tokens together execute most of a narrow layer: clusters of blocks route, while the rows of all
//! neurons come, whether a token selects them or not. Up to eight tokens, no GLU, and as many neurons as the shared memory of
//! all blocks has room for.

use super::Device;
use super::ffn_few::{Sizes, Stream, Variant, WARPS, neuron_bytes, scratch_bytes};
use super::ffn_few_cluster::{BLOCKS, CLUSTERS, fixed_bytes};
use super::kernels::Modules;
use super::router_few::cluster_router_bytes;
use crate::abi::{
    MOEFY_FFN_FEW_CLUSTER_STEPS, MOEFY_FFN_FEW_THREADS, MOEFY_FFN_FEW_TILE,
    MOEFY_FFN_FEW_WHOLE_STAGES, MOEFY_ROUTER_SELECT_BLOCKS,
};
use crate::dtype::DType;
use crate::error::Result;

/// Neurons of a stage.
const STAGE: usize = 16;

/// Of a type: by the layers of the router.
type OfDType = [Variant; 2];

pub(super) struct Kernels {
    f16: OfDType,
    bf16: OfDType,
}

impl Kernels {
    /// `None` where the device is no Hopper, or has no room for a cluster.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few_whole") else { return Ok(None) };
        let mut kernels = Vec::with_capacity(4);
        for name in [
            "moefy_ffn_few_whole_f16_1",
            "moefy_ffn_few_whole_f16_2",
            "moefy_ffn_few_whole_bf16_1",
            "moefy_ffn_few_whole_bf16_2",
        ] {
            let (_, shared_bytes) = module.function_with_all_shared(name, max_shared_bytes)?;
            let (blocks, threads) = (MOEFY_ROUTER_SELECT_BLOCKS, MOEFY_FFN_FEW_THREADS);
            let kernel = module.function_of_large_clusters(name, shared_bytes, blocks, threads)?;
            let Some(kernel) = kernel else { return Ok(None) };
            kernels.push((kernel, shared_bytes));
        }
        let of = |first: usize| std::array::from_fn(|layers| kernels[first + layers]);
        Ok(Some(Self { f16: of(0), bf16: of(2) }))
    }
}

/// `None` where these sizes are not for these kernels, or the device is not.
pub(super) fn stream(device: &Device, sizes: &Sizes) -> Option<Stream> {
    let &Sizes { neurons, router, dtype, num_tokens, sorts, .. } = sizes;
    let kernels = device.ffn_few_whole.as_ref()?;
    let d_model = neurons.d_model();
    let steps = d_model.div_ceil(32).div_ceil(WARPS);
    let num_blocks = CLUSTERS.end() * BLOCKS;
    let all_neurons = neurons.d_ff() + neurons.rank;
    let block_neurons = all_neurons.div_ceil(num_blocks);
    let fits = (2..=MOEFY_FFN_FEW_TILE as usize).contains(&num_tokens)
        && steps <= MOEFY_FFN_FEW_CLUSTER_STEPS as usize
        && block_neurons <= MOEFY_FFN_FEW_WHOLE_STAGES as usize * STAGE
        && !neurons.glu;
    if !fits {
        return None;
    }
    let of_dtype = match dtype {
        DType::F32 => return None,
        DType::F16 => kernels.f16,
        DType::BF16 => kernels.bf16,
    };
    let (kernel, available) = of_dtype[usize::from(router.hidden() > 0)];
    let num_experts = neurons.num_experts;
    let of_router = cluster_router_bytes(d_model, router.hidden(), num_experts, num_tokens, dtype)?;
    let routing_bytes = of_router.max(scratch_bytes(sorts)).next_multiple_of(128);
    let of_rows = block_neurons * neuron_bytes(neurons, d_model * dtype.bytes());
    let shared_bytes = fixed_bytes(sizes) + routing_bytes + of_rows;
    (shared_bytes <= available).then_some(Stream {
        kernel,
        num_blocks,
        log_stage_neurons: STAGE.ilog2() as usize,
        num_stages: block_neurons.div_ceil(STAGE),
        block_neurons,
        routing_bytes,
        shared_bytes,
        us: 5.4 + 0.42 * sizes.read_us(all_neurons) + 2.65e-4 * (num_tokens * d_model) as f64,
    })
}
