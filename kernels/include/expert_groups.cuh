// Many tokens: the neurons that run together on the same tokens, as one matrix product each.
#pragma once

#include "dependency.cuh"
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

/// First of a group's rows among the outputs of a slab; an expert's are where its pairs are.
__device__ __forceinline__ uint64_t place_of_rows(const moefy_experts_params& p, const Group& group) {
  if (group.expert != kNoExpert) return 0;
  const bool after_shared = group.first_neuron >= p.neurons.d_ff && p.neurons.shared > 0;
  return static_cast<uint64_t>(p.max_pairs) + (after_shared ? p.num_tokens : 0);
}

template <class T>
__device__ __forceinline__ void store_two(T* at, float first, float second) {
  at[0] = from_float<T>(first);
  at[1] = from_float<T>(second);
}

/// Exclusive sums of the groups' numbers of tiles, in shared memory, by 256 threads; the last entry is the number of
/// tiles.
template <class Tiles>
__device__ void count_tiles(const moefy_experts_params& p, uint32_t* tile_offsets, const Tiles& tiles_of) {
  constexpr int kThreads = 256;
  __shared__ uint32_t warp_sums[kThreads / 32];
  const uint32_t groups = num_groups(p.neurons);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint32_t before = 0;
  for (uint32_t first = 0; first < groups; first += kThreads) {
    const uint32_t index = first + threadIdx.x;
    const uint32_t tiles = index < groups ? tiles_of(find_group(p, index)) : 0;
    uint32_t sum = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t left = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += left;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint32_t all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w == warp) sum += before + all;
      all += warp_sums[w];
    }
    if (index < groups) tile_offsets[index] = sum - tiles;
    before += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) tile_offsets[groups] = before;
  __syncthreads();
}

/// The last index whose offset is at most `tile`.
__device__ __forceinline__ uint32_t find_tile(const uint32_t* tile_offsets, uint32_t groups, uint32_t tile) {
  uint32_t low = 0;
  uint32_t high = groups;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (tile_offsets[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace moefy
