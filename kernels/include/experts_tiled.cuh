// Hopper: tiles of tokens that run the union of their experts, as two ordinary products. A launch is dealt out in items: a
// tile's tokens by some of what the product gives for each.
//
// kEngine: the copy engine brings the weights, in boxes of neurons of one expert. For that the neurons of an expert and the
// shared ones are multiples of eight, and there are no linear ones.
#pragma once

#include "expert_groups.cuh"
#include "pipeline.cuh"

namespace moefy {

constexpr uint32_t kTileTokens = MOEFY_TILE_TOKENS;
constexpr uint32_t kTileWords = kTileTokens / 32;
constexpr uint32_t kMaxTiles = MOEFY_TILE_MAX_TOKENS / kTileTokens;
constexpr uint32_t kMostAcross = 256;  // of an item
constexpr uint32_t kDepth = 64;        // of a stage
constexpr int kTileRowBytes = kDepth * 2;
constexpr int kTileStages = 4;
constexpr uint32_t kTokenBytes = kTileTokens * kTileRowBytes;  // of a stage; weights follow
constexpr uint32_t kTileStageBytes = kTokenBytes + kMostAcross * kTileRowBytes;
/// Chunks of a row of a stage, and rows that the threads that copy take at once.
constexpr uint32_t kChunks = kTileRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;

struct TokenTile {
  uint32_t index;
  uint32_t num_experts;  // that any of its tokens selects
  uint32_t num_neurons;  // of those, and of what runs for every token
  uint32_t first_token;  // in the order of token_ids
  uint32_t num_tokens;
  uint32_t num_valid;
};

/// Neurons that a tile runs; none where it has padding alone.
__device__ __forceinline__ uint32_t neurons_of_tile(const moefy_experts_tiled_params& p, uint32_t index) {
  if (index * kTileTokens >= valid_tokens(p)) return 0;
  return p.tile_counts[index] * p.neurons.expert_width + p.neurons.shared + p.neurons.rank;
}

__device__ __forceinline__ TokenTile find_token_tile(const moefy_experts_tiled_params& p, uint32_t index) {
  const uint32_t first = index * kTileTokens;
  const auto here = [&](uint32_t all) { return first < all ? min(all - first, kTileTokens) : 0; };
  return {index, p.tile_counts[index], neurons_of_tile(p, index), first, here(p.num_tokens), here(valid_tokens(p))};
}

/// Which neuron a tile's `place`-th is, and the place of its expert in the tile, or kNoExpert.
struct TileNeuron {
  uint32_t neuron;
  uint32_t slot;
};

__device__ __forceinline__ TileNeuron find_neuron(const moefy_experts_tiled_params& p, const TokenTile& tile,
                                                  uint32_t place) {
  const uint32_t width = p.neurons.expert_width, routed = tile.num_experts * width;
  if (place >= routed) return {routed_neurons(p.neurons) + place - routed, kNoExpert};
  // The quotient of floats is off by one at most.
  uint32_t slot = __float2uint_rd(__uint2float_rn(place) * p.inverse_width);
  if (slot * width > place) --slot;
  if ((slot + 1) * width <= place) ++slot;
  const uint64_t at = static_cast<uint64_t>(tile.index) * p.neurons.num_experts + slot;
  return {p.tile_expert_ids[at] * width + place - slot * width, slot};
}

/// What a launch does, in shared memory: the tiles, those with the most neurons first, and their items.
struct Items {
  uint32_t tiles[kMaxTiles];
  uint32_t neurons[kMaxTiles];
  uint32_t across[kMaxTiles];  // of an item, a multiple of 64
  uint32_t offsets[kMaxTiles + 1];
  uint32_t num_tiles;
};

/// Finds the items, by all threads of a block: `total(neurons)` is what a tile goes across in all, `across_of(neurons)` what an
/// item of it does. All threads call `prepare` before, when the tiles are in their order.
template <class Total, class Prepare, class AcrossOf>
__device__ __forceinline__ void find_items(const moefy_experts_tiled_params& p, Items& items, const Total& total,
                                           const Prepare& prepare, const AcrossOf& across_of) {
  __shared__ uint32_t widths[kMaxTiles], counts[kMaxTiles];
  const uint32_t num_tiles = ceil_div(p.num_tokens, kTileTokens), own = threadIdx.x;
  const uint32_t width = own < num_tiles ? neurons_of_tile(p, own) : 0;
  if (own == 0) items.num_tiles = num_tiles;
  if (own < num_tiles) widths[own] = width;
  __syncthreads();
  if (own < num_tiles) {
    uint32_t rank = 0;
#pragma unroll 4
    for (uint32_t other = 0; other < num_tiles; ++other) {
      rank += widths[other] > width || (widths[other] == width && other < own);
    }
    items.tiles[rank] = own;
    items.neurons[rank] = width;
  }
  __syncthreads();
  prepare();
  if (own < num_tiles) {
    const uint32_t neurons = items.neurons[own], across = across_of(neurons);
    items.across[own] = across;
    counts[own] = ceil_div(total(neurons), across);
  }
  __syncthreads();
  if (own <= num_tiles) {
    uint32_t sum = 0;
#pragma unroll 4
    for (uint32_t earlier = 0; earlier < own; ++earlier) sum += counts[earlier];
    items.offsets[own] = sum;
  }
  __syncthreads();
}

/// Calls for each item of this block with its tile, how far it goes across and where it begins. Blocks take turns, back and
/// forth: who got the largest gets the smallest next.
template <class Call>
__device__ __forceinline__ void for_each_item(const moefy_experts_tiled_params& p, const Items& items, const Call& call) {
  const uint32_t num_items = items.offsets[items.num_tiles];
#pragma unroll 1
  for (uint32_t round = 0; round * gridDim.x < num_items; ++round) {
    const uint32_t item = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    if (item >= num_items) return;
    const uint32_t at = find_tile(items.offsets, items.num_tiles, item);
    call(find_token_tile(p, items.tiles[at]), items.across[at], (item - items.offsets[at]) * items.across[at]);
  }
}

/// Some of an array of sums.
template <int kSums, int kAll>
__device__ __forceinline__ float (&part_of(float (&sums)[kAll], int first = 0))[kSums] {
  return reinterpret_cast<float(&)[kSums]>(sums[first]);
}

/// Multiplies all stages of an item: 64 tokens by two columns a sum.
template <class T, bool kByColumns, int kSums, bool kEngine>
__device__ __forceinline__ void multiply_stages(float (&c)[kSums], Multiplier<kTileStages, kEngine>& multiplier,
                                                uint32_t memory, uint32_t num_stages, bool has_tokens) {
  constexpr uint32_t kNextStep = (kByColumns ? 16 * kTileRowBytes : 32) / 16, kNext128 = 128 * kTileRowBytes / 16;
  const uint32_t group_token = (threadIdx.x - kCopiers) / 128 * 64;
#pragma unroll
  for (int i = 0; i < kSums; ++i) c[i] = 0.0f;
#pragma unroll 1
  for (uint32_t stage = 0; stage < num_stages; ++stage) {
    const uint32_t from = memory + multiplier.begin() * kTileStageBytes;
    if (has_tokens) {
      const uint64_t a = operand_of_rows(from + group_token * kTileRowBytes);
      const uint32_t at = from + kTokenBytes;
      const uint64_t b = kByColumns ? operand_of_columns(at, kDepth * kTileRowBytes) : operand_of_rows(at);
      wgmma_fence();
#pragma unroll
      for (uint32_t step = 0; step < kDepth / 16; ++step) {
        const uint64_t first = a + 2 * step, second = b + kNextStep * step;
        if constexpr (kSums == 96) {
          wgmma<T, kByColumns>(part_of<64>(c), first, second, true);
          wgmma<T, kByColumns>(part_of<32>(c, 64), first, second + kNext128, true);
        } else {
          wgmma<T, kByColumns>(c, first, second, true);
        }
      }
      wgmma_commit();
    }
    multiplier.end();
  }
  multiplier.finish();
}

template <int kNumber>
struct KnownNumber {
  static constexpr int value = kNumber;
};

/// Calls with the number of sums that a thread has of an item: each its own code, because sums have to stay where they are.
template <class Call>
__device__ __forceinline__ void with_sums(uint32_t across, const Call& call) {
  switch (across / 64) {
    case 1:
      return call(KnownNumber<32>());
    case 2:
      return call(KnownNumber<64>());
    case 3:
      return call(KnownNumber<96>());
    default:
      return call(KnownNumber<128>());
  }
}

/// The first of the 16 rows of a tile of which a warp that multiplies has sums.
__device__ __forceinline__ uint32_t first_row_of_warp() { return (threadIdx.x - kCopiers) / 32 * 16; }

}  // namespace moefy
