// Reports the layout of every struct of the contract, as the device compiler sees it.

#include <stddef.h>

#include "dependency.cuh"
#include "moefy_abi.h"

#define LAYOUT(type, last_field) sizeof(type), offsetof(type, last_field)

extern "C" __global__ void moefy_abi_probe(const __grid_constant__ moefy_abi_probe_params p) {
  constexpr uint32_t kLayout[] = {
      LAYOUT(moefy_abi_probe_params, num_words),
      LAYOUT(moefy_selection, max_experts),
      LAYOUT(moefy_select_params, reserved),
      LAYOUT(moefy_router_select_params, w2_in_shared),
      LAYOUT(moefy_router_layer_params, reserved),
      LAYOUT(moefy_router_many_params, reserved),
      LAYOUT(moefy_router_block_params, reserved),
      LAYOUT(moefy_route_index_params, reserved),
      LAYOUT(moefy_neurons, reserved),
      LAYOUT(moefy_experts_params, fused),
      LAYOUT(moefy_experts_engine_params, reserved),
      LAYOUT(moefy_experts_sums_params, reserved),
      LAYOUT(moefy_experts_masked_params, reserved),
      LAYOUT(moefy_experts_fused_params, reserved),
      LAYOUT(moefy_token_tiles_params, reserved),
      LAYOUT(moefy_experts_tiled_params, inverse_width),
      LAYOUT(moefy_experts_tiled_engine_params, reserved),
      LAYOUT(moefy_ffn_few_params, routing_bytes),
      LAYOUT(moefy_add_shares_params, num_tokens),
      LAYOUT(moefy_gates_params, reserved),
      LAYOUT(moefy_embed_tokens_params, d_model),
      LAYOUT(moefy_norm_params, is_rms),
      LAYOUT(moefy_attention_params, is_causal),
      LAYOUT(moefy_rotary_params, reserved),
      LAYOUT(moefy_pool_params, d_model),
      LAYOUT(moefy_activate_params, element_bytes),
      LAYOUT(moefy_clear_invalid_params, num_tokens),
      LAYOUT(moefy_split_valid_params, num_chunks),
      LAYOUT(moefy_statistics_params, num_experts),
      LAYOUT(moefy_read_bandwidth_params, data_bytes),
  };
  moefy::begin();
  constexpr uint64_t kWords = sizeof(kLayout) / sizeof(kLayout[0]);
#pragma unroll
  for (uint64_t i = 0; i < kWords; ++i) {
    if (i < p.num_words) p.words[i] = kLayout[i];
  }
}
