// Hopper: tiles of tokens that run the union of their experts, as two ordinary products. A launch is dealt out in items: a
// tile's 128 tokens by some of what the product gives for each.
#pragma once

#include "expert_groups.cuh"
#include "pipeline.cuh"

namespace moefy {

constexpr uint32_t kTileTokens = MOEFY_TILE_TOKENS;
constexpr uint32_t kMaxTiles = MOEFY_TILE_MAX_TOKENS / MOEFY_TILE_TOKENS;
constexpr uint32_t kMostAcross = 256;  // of an item
constexpr uint32_t kDepth = 64;        // of a stage
constexpr int kTileRowBytes = kDepth * 2;
constexpr int kTileStages = 4;
constexpr uint32_t kTileStageBytes = (kTileTokens + kMostAcross) * kTileRowBytes;
/// From 128 to the next 128 of what an item goes across, in units of an operand.
constexpr uint32_t kNext128 = 128 * kTileRowBytes / 16;

struct TokenTile {
  uint32_t index;
  uint32_t num_experts;  // that any of its tokens selects
  uint32_t num_neurons;  // of those, and of what runs for every token
  uint32_t num_tokens;
  uint32_t num_valid;

  __device__ uint32_t hidden_stride() const { return round_up_8(num_neurons); }
};

__device__ __forceinline__ TokenTile find_token_tile(const moefy_experts_tiled_params& p, uint32_t index) {
  const uint32_t first = index * kTileTokens, valid = valid_tokens(p);
  TokenTile tile = {index, p.tile_counts[index], 0, min(p.num_tokens - first, kTileTokens), 0};
  if (first >= valid) return tile;
  tile.num_valid = min(valid - first, kTileTokens);
  tile.num_neurons = tile.num_experts * p.neurons.expert_width + p.neurons.shared + p.neurons.rank;
  return tile;
}

/// Which neuron a tile's `place`-th is.
struct TileNeuron {
  uint32_t neuron;
  uint32_t slot;  // of its expert in the tile, or kNoExpert
  uint32_t left;  // neurons of that expert from this one on
};

__device__ __forceinline__ TileNeuron find_neuron(const moefy_experts_tiled_params& p, const TokenTile& tile,
                                                  uint32_t place) {
  const uint32_t width = p.neurons.expert_width, routed = tile.num_experts * width;
  if (place >= routed) return {routed_neurons(p.neurons) + place - routed, kNoExpert, tile.num_neurons - place};
  // The quotient of floats is off by one at most.
  uint32_t slot = __float2uint_rd(__uint2float_rn(place) * p.inverse_width);
  if (slot * width > place) --slot;
  if ((slot + 1) * width <= place) ++slot;
  const uint32_t inside = place - slot * width;
  return {p.tile_experts[static_cast<uint64_t>(tile.index) * p.neurons.num_experts + slot] * width + inside, slot,
          width - inside};
}

__device__ __forceinline__ TileNeuron next_neuron(const moefy_experts_tiled_params& p, const TokenTile& tile,
                                                  const TileNeuron& n, uint32_t place) {
  if (n.left == 1) return find_neuron(p, tile, place + 1);
  return {n.neuron + 1, n.slot, n.left - 1};
}

/// What a launch does, in shared memory: the tiles, those with the most neurons first, and their items.
struct Items {
  uint32_t tiles[kMaxTiles];
  uint32_t across[kMaxTiles];  // of an item
  uint32_t offsets[kMaxTiles + 1];
};

/// A tile's items: how many, and how much each goes across, a multiple of 64.
struct Split {
  uint32_t count;
  uint32_t across;
};

/// What all tiles have.
struct AllTiles {
  uint32_t neurons;  // summed
  uint32_t most_neurons;
};

/// Finds the items, by all threads of a block.
template <class SplitOf>
__device__ __forceinline__ void find_items(const moefy_experts_tiled_params& p, Items& items, const SplitOf& split_of) {
  __shared__ uint32_t widths[kMaxTiles], counts[kMaxTiles];
  const uint32_t num_tiles = ceil_div(p.num_tokens, kTileTokens), own = threadIdx.x;
  const uint32_t width = own < num_tiles ? find_token_tile(p, own).num_neurons : 0;
  if (own < num_tiles) widths[own] = width;
  __syncthreads();
  if (own < num_tiles) {
    AllTiles all = {0, 0};
    uint32_t rank = 0;
#pragma unroll 8
    for (uint32_t other = 0; other < num_tiles; ++other) {
      all.neurons += widths[other];
      all.most_neurons = max(all.most_neurons, widths[other]);
      rank += widths[other] > width || (widths[other] == width && other < own);
    }
    const Split split = split_of(width, all);
    items.tiles[rank] = own;
    items.across[rank] = split.across;
    counts[rank] = split.count;
  }
  __syncthreads();
  if (own <= num_tiles) {
    uint32_t sum = 0;
#pragma unroll 8
    for (uint32_t earlier = 0; earlier < own; ++earlier) sum += counts[earlier];
    items.offsets[own] = sum;
  }
  __syncthreads();
}

/// Calls for each item of this block with its tile, how far it goes across and which of the tile's it is. Blocks take turns,
/// back and forth: who got the largest gets the smallest next.
template <class Call>
__device__ __forceinline__ void for_each_item(const moefy_experts_tiled_params& p, const Items& items, const Call& call) {
  const uint32_t num_tiles = ceil_div(p.num_tokens, kTileTokens), num_items = items.offsets[num_tiles];
  for (uint32_t round = 0; round * gridDim.x < num_items; ++round) {
    const uint32_t item = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    if (item >= num_items) return;
    const uint32_t at = find_tile(items.offsets, num_tiles, item);
    call(find_token_tile(p, items.tiles[at]), items.across[at], item - items.offsets[at]);
  }
}

/// The first half of 128 sums.
__device__ __forceinline__ float (&half_of(float (&sums)[64]))[32] { return reinterpret_cast<float(&)[32]>(sums); }

/// Multiplies all stages of an item: 64 tokens by 64 * kQuarters, into as many of the sums.
template <class T, bool kByColumns, int kQuarters>
__device__ __forceinline__ void multiply_stages(float (&c)[2][64], Multiplier<kTileStages>& multiplier, uint32_t memory,
                                                uint32_t num_stages, bool has_tokens) {
  constexpr uint32_t kNextStep = (kByColumns ? 16 * kTileRowBytes : 32) / 16;
  const uint32_t group_token = (threadIdx.x - kCopiers) / 128 * 64;
#pragma unroll 1
  for (uint32_t stage = 0; stage < num_stages; ++stage) {
    const uint32_t from = memory + multiplier.begin() * kTileStageBytes;
    if (has_tokens) {
      const uint64_t a = operand_of_rows(from + group_token * kTileRowBytes);
      const uint32_t at = from + kTileTokens * kTileRowBytes;
      const uint64_t b = kByColumns ? operand_of_columns(at, kDepth * kTileRowBytes) : operand_of_rows(at);
      wgmma_fence();
#pragma unroll
      for (uint32_t step = 0; step < kDepth / 16; ++step) {
        const uint64_t first = a + 2 * step, second = b + kNextStep * step;
        if constexpr (kQuarters == 1) {
          wgmma<T, kByColumns>(half_of(c[0]), first, second, true);
        } else {
          wgmma<T, kByColumns>(c[0], first, second, true);
        }
        if constexpr (kQuarters == 3) wgmma<T, kByColumns>(half_of(c[1]), first, second + kNext128, true);
        if constexpr (kQuarters == 4) wgmma<T, kByColumns>(c[1], first, second + kNext128, true);
      }
      wgmma_commit();
    }
    multiplier.end();
  }
  multiplier.finish();
}

template <class T, bool kByColumns>
__device__ __forceinline__ void multiply_item(float (&c)[2][64], uint32_t across, Multiplier<kTileStages>& multiplier,
                                              uint32_t memory, uint32_t num_stages, bool has_tokens) {
#pragma unroll
  for (int i = 0; i < 128; ++i) c[i / 64][i % 64] = 0.0f;
  switch (ceil_div(across, 64)) {
    case 1:
      return multiply_stages<T, kByColumns, 1>(c, multiplier, memory, num_stages, has_tokens);
    case 2:
      return multiply_stages<T, kByColumns, 2>(c, multiplier, memory, num_stages, has_tokens);
    case 3:
      return multiply_stages<T, kByColumns, 3>(c, multiplier, memory, num_stages, has_tokens);
    default:
      return multiply_stages<T, kByColumns, 4>(c, multiplier, memory, num_stages, has_tokens);
  }
}

/// The first of two rows of a tile, eight apart, of which a thread that multiplies has sums.
__device__ __forceinline__ uint32_t row_of_sums() {
  const uint32_t thread = threadIdx.x - kCopiers;
  return thread / 32 * 16 + thread % 32 / 4;
}

}  // namespace moefy
