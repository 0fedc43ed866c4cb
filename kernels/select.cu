// Scores -> masks. One warp per token for up to 512 experts, one block of 8 warps beyond.

#include "select.cuh"

namespace moefy {

template <int kWarps>
__device__ __forceinline__ void select(const moefy_select_params& p, uint32_t token, uint32_t* scratch) {
  const Team<kWarps> team;
  const uint32_t row_words = (p.num_experts + 31) / 32;
  const uint32_t first_word = team.warp() * kWordsPerWarp;
  const bool valid = p.num_valid_tokens == nullptr || token < *p.num_valid_tokens;

  uint32_t keys[kWordsPerWarp];
  const float* __restrict__ row = p.scores + token * p.score_stride;
#pragma unroll
  for (int j = 0; j < kWordsPerWarp; ++j) {
    const uint32_t expert = (first_word + j) * 32 + lane_id();
    keys[j] = valid && expert < p.num_experts ? score_key(row[expert]) : 0;
  }
  uint32_t mask[kWordsPerWarp];
  const RowSelection<Team<kWarps>> selection{team, keys, p.num_experts};
  const bool selected = selection.run(p.selection, scratch, mask);

  const uint32_t word = word_of_lane(mask);
  const uint32_t index = first_word + lane_id();
  if (lane_id() < kWordsPerWarp && index < row_words) p.mask[uint64_t(token) * row_words + index] = word;
  if (p.counts != nullptr) {
    const uint32_t count = team.sum(__popc(word));
    if (team.thread() == 0) p.counts[token] = count;
  }
  if (!selected && valid && p.status != nullptr && team.thread() == 0) {
    atomicOr(p.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
  }
}

}  // namespace moefy

// Dynamic shared memory: for CUMULATIVE_SHARE, the next power of two of num_experts words per warp, else nothing.
extern "C" __global__ void __launch_bounds__(256) moefy_select(const __grid_constant__ moefy_select_params p) {
  extern __shared__ uint32_t scratch[];
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t token = blockIdx.x * 8 + warp;
  if (token < p.num_tokens) moefy::select<1>(p, token, scratch + warp * 512);
}

// The same, for the block.
extern "C" __global__ void __launch_bounds__(256) moefy_select_wide(const __grid_constant__ moefy_select_params p) {
  extern __shared__ uint32_t scratch[];
  moefy::select<8>(p, blockIdx.x, scratch);
}
