//! The stream of [`super::ffn_few`] by clusters of blocks, each of which routes all tokens: a launch less, where the layer is
//! narrow enough for two blocks on a multiprocessor and there are at most eight tokens.

use super::Device;
use super::ffn_few::{SLACK_BYTES, Sizes, Stream, Variant, WARPS, neuron_bytes, scratch_bytes};
use super::kernels::Modules;
use super::router_few::cluster_router_bytes;
use crate::abi::{
    MOEFY_FFN_FEW_CLUSTER_STEPS, MOEFY_FFN_FEW_STAGES, MOEFY_FFN_FEW_THREADS, MOEFY_FFN_FEW_TILE,
    MOEFY_ROUTER_SELECT_BLOCKS,
};
use crate::dtype::DType;
use crate::error::Result;

const BLOCKS: usize = MOEFY_ROUTER_SELECT_BLOCKS as usize;
/// What the driver keeps of a multiprocessor's shared memory for each block.
const RESERVED_BYTES: usize = 1 << 10;
/// Clusters with a share of y each: more than these cost more to add up than they save. For one token; for more.
const MAX_CLUSTERS: [usize; 2] = [7, 4];
/// The fewest: below, what each block reads takes longer than what they cost.
const MIN_CLUSTERS: usize = 2;

/// For 8 and for 16 neurons at once.
pub(super) struct Kernels {
    f16: [Variant; 2],
    bf16: [Variant; 2],
    /// Dynamic shared memory that leaves room for a second block is less than all by so much.
    of_second_block: usize,
}

impl Kernels {
    /// `None` where the device is no Hopper, or has no room for a cluster.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few_cluster") else { return Ok(None) };
        let mut kernels = Vec::with_capacity(4);
        for name in [
            "moefy_ffn_few_cluster_f16_8",
            "moefy_ffn_few_cluster_f16_16",
            "moefy_ffn_few_cluster_bf16_8",
            "moefy_ffn_few_cluster_bf16_16",
        ] {
            let (_, shared_bytes) = module.function_with_all_shared(name, max_shared_bytes)?;
            let threads = MOEFY_FFN_FEW_THREADS;
            let kernel = module.function_of_large_clusters(
                name,
                shared_bytes,
                MOEFY_ROUTER_SELECT_BLOCKS,
                threads,
            )?;
            let Some(kernel) = kernel else { return Ok(None) };
            kernels.push((kernel, shared_bytes));
        }
        let of_second_block = (max_shared_bytes + RESERVED_BYTES).div_ceil(2);
        Ok(Some(Self {
            f16: [kernels[0], kernels[1]],
            bf16: [kernels[2], kernels[3]],
            of_second_block,
        }))
    }
}

/// `None` where these sizes are not for these kernels, or the device is not.
pub(super) fn stream(device: &Device, sizes: &Sizes) -> Option<Stream> {
    let &Sizes { neurons, router, dtype, num_tokens, sorts, expected_neurons } = sizes;
    let kernels = device.ffn_few_cluster.as_ref()?;
    let (d_model, num_experts) = (neurons.d_model(), neurons.num_experts);
    let steps = d_model.div_ceil(32).div_ceil(WARPS);
    if num_tokens > MOEFY_FFN_FEW_TILE as usize || steps > MOEFY_FFN_FEW_CLUSTER_STEPS as usize {
        return None;
    }
    // A GLU's neurons take two rows of a fragment each.
    let log_stage_neurons = if neurons.glu { 3 } else { 4 };
    let of_dtype = match dtype {
        DType::F32 => return None,
        DType::F16 => kernels.f16,
        DType::BF16 => kernels.bf16,
    };
    let (kernel, available) = of_dtype[usize::from(!neurons.glu)];
    // As in the kernel.
    let round_up = |bytes: usize| bytes.next_multiple_of(128);
    let score_tokens = if num_tokens == 1 { 1 } else { num_tokens.next_multiple_of(4) };
    let fixed = round_up(4 * num_tokens * num_experts.next_multiple_of(32))
        + round_up(4 * score_tokens * num_experts);
    let of_router = cluster_router_bytes(d_model, router.hidden(), num_experts, num_tokens, dtype)?;
    let least_bytes = of_router.max(scratch_bytes(sorts));
    let [of_one, of_more] = MAX_CLUSTERS;
    let most_clusters = if num_tokens == 1 { of_one } else { of_more };
    let num_clusters =
        expected_neurons.div_ceil(BLOCKS << log_stage_neurons).clamp(MIN_CLUSTERS, most_clusters);
    let num_blocks = num_clusters * BLOCKS;
    let stage_bytes = neuron_bytes(neurons, d_model * dtype.bytes()) << log_stage_neurons;
    let left = available.checked_sub(kernels.of_second_block)?.checked_sub(fixed + SLACK_BYTES)?;
    let useful = expected_neurons.div_ceil(num_blocks << log_stage_neurons);
    let num_stages = (left / stage_bytes).min(useful.clamp(1, MOEFY_FFN_FEW_STAGES as usize));
    let ring_bytes = (num_stages * stage_bytes).max(least_bytes);
    let shared_bytes = fixed + ring_bytes + SLACK_BYTES;
    (num_stages > 0 && ring_bytes <= left).then_some(Stream {
        kernel,
        num_blocks,
        log_stage_neurons,
        num_stages,
        shared_bytes,
    })
}
