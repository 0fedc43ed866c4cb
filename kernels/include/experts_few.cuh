// What the kernels of the op `experts` for few tokens share: which neurons run, and who has which of them.
#pragma once

#include "dependency.cuh"
#include "experts.cuh"
#include "team.cuh"

namespace moefy {

/// The experts that any token runs, ascending.
template <uint32_t kThreads>
struct Union {
  static constexpr uint32_t kAtOnce = 8;  // tokens whose masks are under way together

  uint32_t words[MOEFY_MAX_EXPERTS / 32];
  uint16_t experts[MOEFY_MAX_EXPERTS];

  /// Finds them in the masks, with all threads; returns how many there are.
  __device__ __forceinline__ uint32_t find(const moefy_experts_params& p) {
    const uint32_t num_experts = p.neurons.num_experts, row_words = ceil_div(num_experts, 32);
    const uint32_t valid = valid_tokens(p);
    for (uint32_t w = threadIdx.x; w < row_words; w += kThreads) {
      const uint32_t beyond = (w + 1) * 32 - min((w + 1) * 32, num_experts);
      uint32_t word = 0;
#pragma unroll 1
      for (uint32_t token0 = 0; token0 < valid; token0 += kAtOnce) {
        // All at once, some twice: one after the other they would take a way to the cache each.
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) word |= __ldcg(p.mask + min(token0 + i, valid - 1) * row_words + w);
      }
      words[w] = word << beyond >> beyond;
    }
    __syncthreads();
    // A warp for each word; of 32 words a lane has one.
    const uint32_t lane = threadIdx.x % 32;
    uint32_t count = 0;
    for (uint32_t first = 0; first < row_words; first += 32) {
      const uint32_t own = first + lane < row_words ? words[first + lane] : 0;
      for (uint32_t w = threadIdx.x / 32; w < min(32u, row_words - first); w += kThreads / 32) {
        const uint32_t before = count + __reduce_add_sync(kFullWarp, lane < w ? __popc(own) : 0);
        const uint32_t word = __shfl_sync(kFullWarp, own, w);
        const uint32_t bit = 1u << lane;
        if (word & bit) experts[before + __popc(word & (bit - 1))] = (first + w) * 32 + lane;
      }
      count += __reduce_add_sync(kFullWarp, __popc(own));
    }
    __syncthreads();
    return count;
  }
};

/// The executed neurons, which are the columns of h: those of the union's experts, then the shared and the linear ones.
/// Where rows are must be known soon: a division takes longer than what else is done here.
template <uint32_t kThreads>
struct Executed {
  const moefy_neurons& n;
  const Union<kThreads>& united;
  const float inverse_width;
  uint32_t routed = 0;
  uint32_t all = 0;

  /// Before the masks are there.
  __device__ Executed(const moefy_experts_params& p, const Union<kThreads>& memory)
      : n(p.neurons), united(memory), inverse_width(1.0f / static_cast<float>(max(p.neurons.expert_width, 1u))) {}

  __device__ void find(const moefy_experts_params& p, Union<kThreads>& memory) {
    routed = memory.find(p) * n.expert_width;
    all = routed + n.shared + n.rank;
  }

  /// Expert and neuron of a column; a column beyond the last gets a neuron whose weights can be read.
  __device__ uint32_t find(uint32_t column, uint32_t& expert) const {
    expert = kNoExpert;
    if (column < routed) {
      // One too much or too little at most.
      uint32_t rank = static_cast<uint32_t>((static_cast<float>(column) + 0.5f) * inverse_width);
      if (rank * n.expert_width > column) --rank;
      if (column - rank * n.expert_width >= n.expert_width) ++rank;
      expert = united.experts[rank];
      return expert * n.expert_width + column - rank * n.expert_width;
    }
    return column < all ? routed_neurons(n) + column - routed : 0;
  }
};

/// Even shares. To divide takes longer than to correct a quotient that is one too much or too little at most.
struct Shares {
  const uint32_t count;
  const float inverse;

  __device__ explicit Shares(uint32_t num_shares) : count(num_shares), inverse(1.0f / static_cast<float>(num_shares)) {}

  /// Where a share of `all` begins, of which `share` come before.
  __device__ uint32_t begin(uint32_t all, uint32_t share) const {
    uint32_t each = static_cast<uint32_t>(static_cast<float>(all) * inverse);
    if (each * count > all) --each;
    if (all - each * count >= count) ++each;
    return share * each + min(share, all - each * count);
  }
};

}  // namespace moefy
