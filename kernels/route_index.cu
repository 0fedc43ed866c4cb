// Masks -> lists of tokens per expert and the union of all experts. Every position is a prefix count over bits, so the
// lists are in token order and the same in every run.

#include "team.cuh"

#include "moefy_abi.h"

namespace moefy {

constexpr int kWarps = 32;

// Transposes the 32 tokens of block `tokens` by the 32 experts of word `word`: lane i gets the tokens of expert i.
__device__ __forceinline__ uint32_t transpose(const moefy_route_index_params& p, uint32_t num_valid, uint32_t tokens,
                                              uint32_t word) {
  const uint32_t row_words = (p.num_experts + 31) / 32;
  const uint32_t token = tokens * 32 + lane_id();
  uint32_t experts = token < num_valid ? p.mask[uint64_t(token) * row_words + word] : 0;
  const uint32_t tail = p.num_experts - word * 32;
  if (tail < 32 && experts >> tail != 0) {
    experts &= (1u << tail) - 1;
    if (p.status != nullptr) atomicOr(p.status, MOEFY_STATUS_MASK_BEYOND_EXPERTS);
  }
  uint32_t mine = 0;
#pragma unroll
  for (uint32_t i = 0; i < 32; ++i) {
    const uint32_t selected_by = __ballot_sync(kFullWarp, experts >> i & 1);
    mine = lane_id() == i ? selected_by : mine;
  }
  return mine;
}

__device__ __forceinline__ uint32_t num_valid_tokens(const moefy_route_index_params& p) {
  return p.num_valid_tokens == nullptr ? p.num_tokens : min(*p.num_valid_tokens, p.num_tokens);
}

// Writes a word's tokens, ascending, from `position` on.
__device__ __forceinline__ void write_ids(const moefy_route_index_params& p, uint32_t tokens, uint32_t word,
                                          uint64_t position) {
  for (; word != 0 && position < p.capacity; word &= word - 1) {
    p.token_ids[position++] = tokens * 32 + __ffs(word) - 1;
  }
}

// Lists end where their memory does, so that no reader of the offsets leaves it.
__device__ __forceinline__ uint32_t within_capacity(const moefy_route_index_params& p, uint32_t offset) {
  if (offset <= p.capacity) return offset;
  if (p.status != nullptr) atomicOr(p.status, MOEFY_STATUS_TOO_MANY_PAIRS);
  return uint32_t(p.capacity);
}

// What is known of an expert once all experts before it are counted.
__device__ __forceinline__ void write_expert(const moefy_route_index_params& p, uint32_t expert, uint32_t offset,
                                             uint32_t count, uint32_t union_rank) {
  p.offsets[expert] = within_capacity(p, offset);
  if (count > 0) p.union_ids[union_rank] = expert;
  if (expert + 1 == p.num_experts) {
    p.offsets[expert + 1] = within_capacity(p, offset + count);
    *p.num_union = union_rank + (count > 0);
  }
}

// Inclusive, within the warp.
__device__ __forceinline__ uint32_t prefix_sum(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, distance);
    value += lane_id() >= uint32_t(distance) ? before : 0;
  }
  return value;
}

}  // namespace moefy

// Everything in one block.
extern "C" __global__ void __launch_bounds__(1024) moefy_route_index_small(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  __shared__ uint32_t counts[MOEFY_MAX_EXPERTS];  // later the offsets
  const Team<kWarps> team;
  const uint32_t num_valid = num_valid_tokens(p);
  const uint32_t num_words = (p.num_experts + 31) / 32;
  const uint32_t num_blocks = (p.num_tokens + 31) / 32;

  for (uint32_t word = team.warp(); word < num_words; word += kWarps) {
    const uint32_t expert = word * 32 + lane_id();
    uint32_t count = 0;
    for (uint32_t tokens = 0; tokens < num_blocks; ++tokens) {
      const uint32_t selected_by = transpose(p, num_valid, tokens, word);
      if (expert < p.num_experts) p.expert_masks[expert * num_blocks + tokens] = selected_by;
      count += __popc(selected_by);
    }
    counts[expert] = count;
    if (expert < p.num_experts) p.counts[expert] = count;
  }
  __syncthreads();

  // Prefix sums over the experts, one per thread.
  uint32_t offset = 0, rank = 0;
  for (uint32_t first = 0; first < num_words; first += kWarps) {
    const uint32_t expert = (first + team.warp()) * 32 + lane_id();
    const uint32_t count = expert < p.num_experts ? counts[expert] : 0;
    const uint32_t nonempty = __ballot_sync(kFullWarp, count > 0);
    const uint32_t counted = prefix_sum(count);
    const uint32_t warp_count = __shfl_sync(kFullWarp, counted, 31);
    const uint32_t my_offset = offset + team.sum_of_warps_before(warp_count) + counted - count;
    const uint32_t my_rank =
        rank + team.sum_of_warps_before(__popc(nonempty)) + __popc(nonempty & ((1u << lane_id()) - 1));
    if (expert < p.num_experts) {
      counts[expert] = my_offset;
      write_expert(p, expert, my_offset, count, my_rank);
    }
    offset += team.sum(count);
    rank += team.sum(count > 0);
  }
  __syncthreads();

  for (uint32_t item = threadIdx.x; item < p.num_experts * num_blocks; item += kWarps * 32) {
    const uint32_t expert = item / num_blocks, tokens = item % num_blocks;
    const uint32_t* words = p.expert_masks + expert * num_blocks;
    uint64_t position = counts[expert];
    for (uint32_t before = 0; before < tokens; ++before) position += __popc(words[before]);
    write_ids(p, tokens, words[tokens], position);
  }
}

// The transpose and the counts, one block per 32 experts.
extern "C" __global__ void __launch_bounds__(1024) moefy_route_index_transpose(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  __shared__ uint32_t counts[kWarps][32];
  const uint32_t num_valid = num_valid_tokens(p);
  const uint32_t num_blocks = (p.num_tokens + 31) / 32;
  const uint32_t per_warp = (num_blocks + kWarps - 1) / kWarps;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t expert = blockIdx.x * 32 + lane_id();

  uint32_t count = 0;
  for (uint32_t i = 0; i < per_warp; ++i) {
    const uint32_t tokens = warp * per_warp + i;
    if (tokens >= num_blocks) break;
    const uint32_t selected_by = transpose(p, num_valid, tokens, blockIdx.x);
    if (expert < p.num_experts) p.expert_masks[uint64_t(expert) * num_blocks + tokens] = selected_by;
    count += __popc(selected_by);
  }
  counts[warp][lane_id()] = count;
  __syncthreads();
  if (warp == 0 && expert < p.num_experts) {
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += counts[w][lane_id()];
    p.counts[expert] = total;
  }
}

// The lists, from the transpose and the counts, one block per expert.
extern "C" __global__ void __launch_bounds__(256) moefy_route_index_lists(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  const Team<8> team;
  const uint32_t expert = blockIdx.x;
  const uint32_t num_blocks = (p.num_tokens + 31) / 32;

  uint32_t pairs_before = 0, nonempty_before = 0;
  for (uint32_t e = threadIdx.x; e < expert; e += 256) {
    pairs_before += p.counts[e];
    nonempty_before += p.counts[e] > 0;
  }
  uint32_t position = team.sum(pairs_before);
  const uint32_t rank = team.sum(nonempty_before);
  if (threadIdx.x == 0) write_expert(p, expert, position, p.counts[expert], rank);

  const uint32_t* words = p.expert_masks + uint64_t(expert) * num_blocks;
  for (uint32_t first = 0; first < num_blocks; first += 256) {
    const uint32_t tokens = first + threadIdx.x;
    const uint32_t word = tokens < num_blocks ? words[tokens] : 0;
    const uint32_t counted = prefix_sum(__popc(word));
    const uint32_t warp_count = __shfl_sync(kFullWarp, counted, 31);
    const uint32_t before = team.sum_of_warps_before(warp_count) + counted - __popc(word);
    write_ids(p, tokens, word, uint64_t(position) + before);
    position += team.sum(__popc(word));
  }
}
