//! [`super::ffn_few`] where some tokens together execute most of a narrow layer: clusters of blocks route, while the rows of all
//! neurons come, whether a token selects them or not. Up to eight tokens, no GLU, and as many neurons as the shared memory of
//! all blocks has room for.
//!
//! What a token does not execute is a zero that is multiplied all the same: a weight of the second product that is not finite,
//! with which no layer is made, gives NaN also where nobody selects its expert, as in the dense function under masks.

use super::Device;
use super::ffn_few::{Sizes, Stream, WARPS, neuron_bytes, scratch_bytes};
use super::ffn_few_cluster::{BLOCKS, CLUSTERS, cluster_variant, fixed_bytes};
use super::kernels::{Half, Modules, half_names};
use super::router_few::cluster_router_bytes;
use crate::abi::{MOEFY_FFN_FEW_CLUSTER_STEPS, MOEFY_FFN_FEW_TILE, MOEFY_FFN_FEW_WHOLE_STAGES};
use crate::error::Result;

/// Neurons of a stage.
const STAGE: usize = 16;

/// By the layers of the router.
pub(super) struct Kernels(Half<2>);

impl Kernels {
    /// `None` where the device is no Hopper, or has no room for a cluster.
    pub(super) fn load(modules: &Modules, max_shared_bytes: usize) -> Result<Option<Self>> {
        let Some(module) = modules.module("sm90_ffn_few_whole") else { return Ok(None) };
        let names = half_names!("moefy_ffn_few_whole": "1", "2");
        let kernels = Half::load(names, |name| cluster_variant(module, name, max_shared_bytes))?;
        Ok(kernels.map(Self))
    }
}

/// `None` where these sizes are not for these kernels, or the device is not.
pub(super) fn stream(device: &Device, sizes: &Sizes) -> Option<Stream> {
    let &Sizes { neurons, router, dtype, num_tokens, sorts, .. } = sizes;
    let Kernels(kernels) = device.ffn_few_whole.as_ref()?;
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
    let (kernel, available) = kernels.of(dtype)?[usize::from(router.hidden() > 0)];
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
