// Masks -> lists of tokens per expert and the union of all experts. Every position is a prefix count over bits, so the
// lists are in token order and the same in every run.

#include "dependency.cuh"
#include "memory.cuh"
#include "team.cuh"

#include "moefy_abi.h"

namespace moefy {

constexpr int kChunkWarps = MOEFY_ROUTE_INDEX_CHUNK;  // of a block of moefy_route_index_transpose

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

// Writes the tokens of each lane's word, ascending, from the lane's `position` on. The warp takes word by word, so that it
// writes side by side; word by word of its own a lane would touch a line for every token.
__device__ __forceinline__ void write_ids(const moefy_route_index_params& p, uint32_t tokens, uint32_t word,
                                          uint64_t position) {
  for (uint32_t lanes = __ballot_sync(kFullWarp, word != 0); lanes != 0; lanes &= lanes - 1) {
    const int lane = __ffs(lanes) - 1;
    const uint32_t bits = __shfl_sync(kFullWarp, word, lane), first = __shfl_sync(kFullWarp, tokens, lane) * 32;
    const uint64_t at = __shfl_sync(kFullWarp, position, lane) + __popc(bits & ((1u << lane_id()) - 1));
    if ((bits >> lane_id() & 1) != 0 && at < p.capacity) p.token_ids[at] = first + lane_id();
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

}  // namespace moefy

// Everything at once, one block per expert, which reads the masks up to its own word: what tokens run before it in the order of
// the experts is the number of bits there. A warp takes consecutive tokens.
extern "C" __global__ void __launch_bounds__(1024) moefy_route_index_direct(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  constexpr uint32_t kBlocks = MOEFY_ROUTE_INDEX_WARP_BLOCKS, kWords = 4;
  __shared__ uint32_t pairs_of_warps[32], tokens_of_warps[32], unions[MOEFY_ROUTE_INDEX_DIRECT_WORDS][32];
  const uint32_t expert = blockIdx.x, last_word = expert / 32, bit = expert % 32;
  const uint32_t row_words = (p.num_experts + 31) / 32, num_blocks = (p.num_tokens + 31) / 32;
  const uint32_t warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  begin();
  const uint32_t num_valid = valid_tokens(p);

  uint32_t pairs = 0, selected_by[kBlocks] = {};
#pragma unroll 1
  for (uint32_t first = 0; first <= last_word; first += kWords) {
    // All on their way together: a word after the other would take a way to the cache each.
    uint32_t experts[kWords][kBlocks];
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) {
#pragma unroll
      for (uint32_t i = 0; i < kBlocks; ++i) {
        const uint32_t token = (warp * kBlocks + i) * 32 + lane_id(), word = first + w;
        experts[w][i] = token < num_valid && word <= last_word ? p.mask[token * row_words + word] : 0;
      }
    }
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) {
      const uint32_t word = first + w;
      if (word > last_word) break;
      const uint32_t before = word < last_word ? kFullWarp : (1u << bit) - 1;
      uint32_t any = 0;
#pragma unroll
      for (uint32_t i = 0; i < kBlocks; ++i) {
        any |= experts[w][i];
        pairs += __popc(experts[w][i] & before);
      }
      any = __reduce_or_sync(kFullWarp, any);
      if (lane_id() == 0) unions[word][warp] = any & before;
      if (word < last_word) continue;
#pragma unroll
      for (uint32_t i = 0; i < kBlocks; ++i) selected_by[i] = __ballot_sync(kFullWarp, experts[w][i] >> bit & 1);
      const uint32_t tail = p.num_experts - word * 32;
      if (expert + 1 == p.num_experts && tail < 32 && any >> tail != 0 && lane_id() == 0 && p.status != nullptr) {
        atomicOr(p.status, MOEFY_STATUS_MASK_BEYOND_EXPERTS);
      }
    }
  }
  uint32_t tokens = 0;
#pragma unroll
  for (uint32_t i = 0; i < kBlocks; ++i) tokens += __popc(selected_by[i]);
  pairs = __reduce_add_sync(kFullWarp, pairs);
  if (lane_id() == 0) {
    pairs_of_warps[warp] = pairs;
    tokens_of_warps[warp] = tokens;
  }
  __syncthreads();

  const bool exists = lane_id() < num_warps;
  const uint32_t of_warp = exists ? tokens_of_warps[lane_id()] : 0;
  const uint32_t offset = __reduce_add_sync(kFullWarp, exists ? pairs_of_warps[lane_id()] : 0);
  if (warp == 0) {
    uint32_t rank = 0;
#pragma unroll 1
    for (uint32_t word = 0; word <= last_word; ++word) {
      rank += __popc(__reduce_or_sync(kFullWarp, exists ? unions[word][lane_id()] : 0));
    }
    const uint32_t count = __reduce_add_sync(kFullWarp, of_warp);
    if (lane_id() == 0) {
      p.counts[expert] = count;
      write_expert(p, expert, offset, count, rank);
    }
  }
  uint64_t position = uint64_t(offset) + __reduce_add_sync(kFullWarp, lane_id() < warp ? of_warp : 0);
#pragma unroll
  for (uint32_t i = 0; i < kBlocks; ++i) {
    const uint32_t block = warp * kBlocks + i, selected = selected_by[i];
    const uint64_t at = position + __popc(selected & ((1u << lane_id()) - 1));
    if ((selected >> lane_id() & 1) != 0 && at < p.capacity) p.token_ids[at] = block * 32 + lane_id();
    if (lane_id() == i && block < num_blocks) {
      p.expert_masks[expert * num_blocks + block] = selected;
      p.word_offsets[expert * num_blocks + block] = min(position, p.capacity);
    }
    position += __popc(selected);
  }
}

// The transpose, one block per 32 experts and chunk of tokens, and each expert's tokens in the chunk.
extern "C" __global__ void __launch_bounds__(256) moefy_route_index_transpose(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  __shared__ uint32_t counts[kChunkWarps][32];
  begin();
  const uint32_t num_valid = valid_tokens(p);
  const uint32_t num_blocks = (p.num_tokens + 31) / 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t expert = blockIdx.x * 32 + lane_id();

  uint32_t count = 0;
  for (uint32_t tokens = blockIdx.y * kChunkWarps + warp; tokens < num_blocks; tokens += gridDim.y * kChunkWarps) {
    const uint32_t selected_by = transpose(p, num_valid, tokens, blockIdx.x);
    if (expert < p.num_experts) p.expert_masks[uint64_t(expert) * num_blocks + tokens] = selected_by;
    count += __popc(selected_by);
  }
  counts[warp][lane_id()] = count;
  __syncthreads();
  if (warp == 0 && expert < p.num_experts) {
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kChunkWarps; ++w) total += counts[w][lane_id()];
    p.chunk_counts[blockIdx.y * p.num_experts + expert] = total;
  }
}

// The lists, from the transpose and the counts, one block per expert.
extern "C" __global__ void __launch_bounds__(256) moefy_route_index_lists(
    const __grid_constant__ moefy_route_index_params p) {
  using namespace moefy;
  begin();
  const Team<8> team;
  const uint32_t expert = blockIdx.x;
  const uint32_t num_blocks = (p.num_tokens + 31) / 32;

  uint32_t pairs_before = 0, nonempty_before = 0, mine = 0;
  for (uint32_t e = threadIdx.x; e <= expert; e += 256) {
    uint32_t count = 0;
#pragma unroll 8
    for (uint32_t chunk = 0; chunk < p.num_chunks; ++chunk) count += p.chunk_counts[chunk * p.num_experts + e];
    if (e == expert) {
      mine = count;
    } else {
      pairs_before += count;
      nonempty_before += count > 0;
    }
  }
  uint32_t position = team.sum(pairs_before);
  const uint32_t rank = team.sum(nonempty_before);
  const uint32_t count = team.sum(mine);
  if (threadIdx.x == 0) {
    p.counts[expert] = count;
    write_expert(p, expert, position, count, rank);
  }

  const uint32_t* words = p.expert_masks + uint64_t(expert) * num_blocks;
  for (uint32_t first = 0; first < num_blocks; first += 256) {
    const uint32_t tokens = first + threadIdx.x;
    const uint32_t word = tokens < num_blocks ? words[tokens] : 0;
    const uint32_t counted = prefix_sum(__popc(word));
    const uint32_t warp_count = __shfl_sync(kFullWarp, counted, 31);
    const uint32_t before = team.sum_of_warps_before(warp_count) + counted - __popc(word);
    const uint64_t own = uint64_t(position) + before;
    if (tokens < num_blocks) p.word_offsets[uint64_t(expert) * num_blocks + tokens] = min(own, p.capacity);
    write_ids(p, tokens, word, own);
    position += team.sum(__popc(word));
  }
}
