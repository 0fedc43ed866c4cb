// Many tokens: the neurons that run together on the same tokens, as one matrix product each.
#pragma once

#include "experts.cuh"

namespace moefy {

/// An expert with the tokens that select it, or the shared or the linear neurons with all tokens.
struct Group {
  uint32_t expert;  // kNoExpert: all tokens
  uint32_t first_neuron;
  uint32_t width;
  uint32_t halves;  // 2: gate and up rows
  uint64_t hidden;  // place of row 0 of h: of the first pair, or of token 0
  uint64_t hidden_stride;
};

/// Rows of h: pairs of an expert, or tokens.
struct RowRange {
  uint32_t begin;
  uint32_t count;
};

__device__ __forceinline__ uint32_t round_up_8(uint32_t v) { return (v + 7) & ~7u; }

/// The experts, then the shared neurons, then the linear ones.
__device__ __forceinline__ uint32_t num_groups(const moefy_neurons& n) { return n.num_experts + 2; }

__device__ __forceinline__ Group find_group(const moefy_experts_params& p, uint32_t index) {
  const moefy_neurons& n = p.neurons;
  if (index < n.num_experts) {
    return {index, index * n.expert_width, n.expert_width, n.glu + 1, 0, p.hidden_stride};
  }
  if (index == n.num_experts) {
    return {kNoExpert, routed_neurons(n), n.shared, n.glu + 1, p.hidden_shared, round_up_8(n.shared)};
  }
  return {kNoExpert, n.d_ff, n.rank, 1, p.hidden_linear, round_up_8(n.rank)};
}

__device__ __forceinline__ RowRange rows_of(const moefy_experts_params& p, const Group& group) {
  if (group.expert == kNoExpert) return {0, group.width == 0 ? 0 : valid_tokens(p)};
  const uint32_t begin = min(p.expert_offsets[group.expert], p.max_pairs);
  return {begin, min(p.expert_offsets[group.expert + 1], p.max_pairs) - begin};
}

__device__ __forceinline__ uint32_t token_of(const moefy_experts_params& p, const Group& group, uint32_t row) {
  return group.expert == kNoExpert ? row : p.token_ids[row];
}

}  // namespace moefy
