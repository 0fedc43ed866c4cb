//! The stream of [`super::ffn_few`] by clusters of blocks, each of which routes all tokens: a launch less, where the layer is
//! narrow enough (d_model at most 1024) for two blocks on a multiprocessor and there are at most eight tokens.

use super::Device;
use super::driver::Module;
use super::ffn_few::{Sizes, Stream, WARPS, neuron_bytes, scratch_bytes};
use super::kernels::{Half, Modules, Variant, half_names};
use super::router_few::cluster_router_bytes;
use crate::abi::{
    MOEFY_FFN_FEW_CLUSTER_STEPS, MOEFY_FFN_FEW_THREADS, MOEFY_FFN_FEW_TILE,
    MOEFY_ROUTER_SELECT_BLOCKS,
};
use crate::error::Result;

pub(super) const BLOCKS: usize = MOEFY_ROUTER_SELECT_BLOCKS as usize;
/// What the driver keeps of a multiprocessor's shared memory for each block.
const RESERVED_BYTES: usize = 1 << 10;
/// As many as there is room for at once, and the fewest: below, what a block reads takes longer than what the others cost.
pub(super) const CLUSTERS: std::ops::RangeInclusive<usize> = 2..=7;

pub(super) struct Kernels {
    /// By the layers of the router, for 8 and for 16 neurons at once, for one token and for several.
    variants: Half<8>,
    /// Dynamic shared memory that leaves room for a second block is less than all by so much.
    of_second_block: usize,
}

impl Kernels {
    /// `None` where the device is no Hopper, or has no room for a cluster.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few_cluster") else { return Ok(None) };
        let names = half_names!(
            "moefy_ffn_few_cluster":
            "1_8_1", "1_8_8", "1_16_1", "1_16_8", "2_8_1", "2_8_8", "2_16_1", "2_16_8"
        );
        let variants = Half::load(names, |name| cluster_variant(module, name, max_shared_bytes))?;
        let of_second_block = (max_shared_bytes + RESERVED_BYTES).div_ceil(2);
        Ok(variants.map(|variants| Self { variants, of_second_block }))
    }
}

/// One for clusters; `None` where the device has no room for one.
pub(super) fn cluster_variant(
    module: &Module,
    name: &'static str,
    max_shared_bytes: usize,
) -> Result<Option<Variant>> {
    let (_, shared_bytes) = module.function_with_all_shared(name, max_shared_bytes)?;
    let (blocks, threads) = (MOEFY_ROUTER_SELECT_BLOCKS, MOEFY_FFN_FEW_THREADS);
    let kernel = module.function_of_large_clusters(name, shared_bytes, blocks, threads)?;
    Ok(kernel.map(|kernel| (kernel, shared_bytes)))
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
    let which = [router.hidden() > 0, !neurons.glu, num_tokens > 1].map(usize::from);
    let (kernel, available) = kernels.variants.of(dtype)?[4 * which[0] + 2 * which[1] + which[2]];
    let fixed = fixed_bytes(sizes);
    let of_router = cluster_router_bytes(d_model, router.hidden(), num_experts, num_tokens, dtype)?;
    let least_bytes = of_router.max(scratch_bytes(sorts));
    // With one stage there is room for two blocks; a second one did not pay.
    let num_stages = 1;
    let num_clusters = num_clusters(num_tokens, expected_neurons.div_ceil(1 << log_stage_neurons));
    let num_blocks = num_clusters * BLOCKS;
    let stage_bytes = neuron_bytes(neurons, d_model * dtype.bytes()) << log_stage_neurons;
    let left = available.checked_sub(kernels.of_second_block)?.checked_sub(fixed)?;
    let ring_bytes = (num_stages * stage_bytes).max(least_bytes);
    let shared_bytes = fixed + ring_bytes;
    (ring_bytes <= left).then_some(Stream {
        kernel,
        num_blocks,
        log_stage_neurons,
        num_stages,
        block_neurons: 0,
        routing_bytes: 0,
        shared_bytes,
        us: 5.0 + 1.16 * sizes.read_us(expected_neurons) + 3.6e-4 * (num_tokens * d_model) as f64,
    })
}

/// Keys and scores in shared memory, as in the kernels.
pub(super) fn fixed_bytes(sizes: &Sizes) -> usize {
    let (num_tokens, num_experts) = (sizes.num_tokens, sizes.neurons.num_experts);
    let score_tokens = match (sizes.router.hidden(), num_tokens) {
        (0, _) => 0,
        (_, 1) => 1,
        _ => num_tokens.next_multiple_of(4),
    };
    let round_up = |bytes: usize| bytes.next_multiple_of(128);
    round_up(4 * num_tokens * num_experts.next_multiple_of(32))
        + round_up(4 * score_tokens * num_experts)
}

/// The number of clusters with the least time for so many stages of neurons: a stage of a block, and a block's share of y, in
/// microseconds as measured at d_model 768 and 1024 (kernels/NOTES.md).
fn num_clusters(num_tokens: usize, stages: usize) -> usize {
    let us = |clusters: usize| {
        let of_a_block = stages.div_ceil(clusters * BLOCKS) as f64;
        1.3 * of_a_block + (clusters * BLOCKS) as f64 * (0.005 + 0.003 * num_tokens as f64)
    };
    CLUSTERS.min_by(|&a, &b| us(a).total_cmp(&us(b))).expect("a range that is not empty")
}
