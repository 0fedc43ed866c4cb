// Hopper: tiles of tokens that run the union of their experts, as two ordinary products. A launch is dealt out in items: half
// of a tile's tokens, which is what a block multiplies with, by some of what the product gives for each.
//
// kPaired: two blocks, a cluster, take the halves of a tile, and the copy engine brings the weights to both. For that the
// neurons of an expert and the shared ones are multiples of eight, and there are no linear ones.
#pragma once

#include "expert_groups.cuh"
#include "pipeline.cuh"

namespace moefy {

constexpr uint32_t kTokens = MOEFY_TILE_TOKENS / 2;  // of a block
constexpr uint32_t kMaxTiles = MOEFY_TILE_MAX_TOKENS / MOEFY_TILE_TOKENS;
constexpr uint32_t kTileWords = MOEFY_TILE_TOKENS / 32;
constexpr uint32_t kMostAcross = 256;  // of an item
constexpr uint32_t kDepth = 64;        // of a stage
constexpr int kTileRowBytes = kDepth * 2;
constexpr int kTileStages = 4;
constexpr uint32_t kTokenBytes = kTokens * kTileRowBytes;  // of a stage; weights follow
constexpr uint32_t kTileStageBytes = kTokenBytes + kMostAcross * kTileRowBytes;
/// From 128 to the next 128 of what an item goes across, in units of an operand.
constexpr uint32_t kNext128 = 128 * kTileRowBytes / 16;
/// Chunks of a row of a stage, and rows that the threads that copy take at once.
constexpr uint32_t kChunks = kTileRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;

/// A tile, and which of its tokens.
struct TokenTile {
  uint32_t index;
  uint32_t num_experts;  // that any of its tokens selects
  uint32_t num_neurons;  // of those, and of what runs for every token
  uint32_t half;
  uint32_t first_token;  // of the half, as all below: in the order of token_ids
  uint32_t num_tokens;
  uint32_t num_valid;
};

/// Neurons that a tile runs; none where it has padding alone.
__device__ __forceinline__ uint32_t neurons_of_tile(const moefy_experts_tiled_params& p, uint32_t index) {
  if (index * MOEFY_TILE_TOKENS >= valid_tokens(p)) return 0;
  return p.tile_counts[index] * p.neurons.expert_width + p.neurons.shared + p.neurons.rank;
}

__device__ __forceinline__ TokenTile find_token_tile(const moefy_experts_tiled_params& p, uint32_t index, uint32_t half) {
  const uint32_t first = index * MOEFY_TILE_TOKENS + half * kTokens;
  const auto here = [&](uint32_t all) { return first < all ? min(all - first, kTokens) : 0; };
  return {index, p.tile_counts[index], neurons_of_tile(p, index), half, first, here(p.num_tokens), here(valid_tokens(p))};
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
  return {p.tile_experts[at] * width + place - slot * width, slot};
}

/// What a launch does, in shared memory: the tiles, those with the most neurons first, and their items.
struct Items {
  uint32_t tiles[kMaxTiles];
  uint32_t neurons[kMaxTiles];
  uint32_t across[kMaxTiles];  // of an item, a multiple of 64
  uint32_t offsets[kMaxTiles + 1];
  uint32_t num_tiles;
  uint32_t num_takers;  // blocks, or pairs of them
  uint32_t halves;      // that take different items
};

/// Finds the items, by all threads of a block: `total(neurons)` is what a tile goes across in all, `across_of(items, neurons)`
/// what an item of it does. All lanes of a warp call that, one for each tile and for tiles without neurons.
template <bool kPaired, class Total, class AcrossOf>
__device__ __forceinline__ void find_items(const moefy_experts_tiled_params& p, Items& items, const Total& total,
                                           const AcrossOf& across_of) {
  static_assert(kMaxTiles == 32, "a lane has a tile");
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t num_tiles = ceil_div(p.num_tokens, MOEFY_TILE_TOKENS), own = threadIdx.x;
  if (own < 32) {
    const uint32_t width = own < num_tiles ? neurons_of_tile(p, own) : 0;
    uint32_t rank = 0;
#pragma unroll
    for (uint32_t other = 0; other < 32; ++other) {
      const uint32_t others = __shfl_sync(kAll, width, other);
      rank += others > width || (others == width && other < own);
    }
    items.tiles[rank] = own;
    items.neurons[rank] = width;
    if (own == 0) {
      items.num_tiles = num_tiles;
      items.num_takers = kPaired ? gridDim.x / 2 : gridDim.x;
      items.halves = kPaired ? 1 : 2;
    }
    __syncwarp();
    const uint32_t neurons = items.neurons[own], across = across_of(items, neurons);
    // Tiles that do not exist come last.
    const uint32_t count = own < num_tiles ? ceil_div(total(neurons), across) * items.halves : 0;
    uint32_t sum = count;
#pragma unroll
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAll, sum, distance);
      if (own >= distance) sum += before;
    }
    items.across[own] = across;
    items.offsets[own] = sum - count;
    if (own == 31) items.offsets[32] = sum;
  }
  __syncthreads();
}

/// Calls for each item of this block with its tile, how far it goes across and where it begins. Blocks take turns, back and
/// forth: who got the largest gets the smallest next.
template <bool kPaired, class Call>
__device__ __forceinline__ void for_each_item(const moefy_experts_tiled_params& p, const Items& items, const Call& call) {
  const uint32_t num_items = items.offsets[items.num_tiles], takers = items.num_takers;
  const uint32_t taker = kPaired ? blockIdx.x / 2 : blockIdx.x;
  for (uint32_t round = 0; round * takers < num_items; ++round) {
    const uint32_t item = round * takers + (round % 2 == 0 ? taker : takers - 1 - taker);
    if (item >= num_items) return;
    const uint32_t at = find_tile(items.offsets, items.num_tiles, item), inside = item - items.offsets[at];
    const uint32_t half = kPaired ? blockIdx.x % 2 : inside % 2, part = kPaired ? inside : inside / 2;
    call(find_token_tile(p, items.tiles[at], half), items.across[at], part * items.across[at]);
  }
}

/// A part of an array of sums.
template <int kSums, int kAll>
__device__ __forceinline__ float (&part_of(float (&sums)[kAll]))[kSums] { return reinterpret_cast<float(&)[kSums]>(sums); }

/// Multiplies all stages of an item: 64 tokens by 64 * kQuarters, into as many of the sums.
template <class T, bool kByColumns, int kQuarters, bool kPaired>
__device__ __forceinline__ void multiply_stages(float (&c)[2][64], Multiplier<kTileStages, kPaired>& multiplier,
                                                uint32_t memory, uint32_t num_stages, bool has_tokens) {
  constexpr uint32_t kNextStep = (kByColumns ? 16 * kTileRowBytes : 32) / 16;
  const uint32_t group_token = (threadIdx.x - kCopiers) / 128 * 64;
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
        if constexpr (kQuarters == 1) {
          wgmma<T, kByColumns>(part_of<32>(c[0]), first, second, true);
        } else {
          wgmma<T, kByColumns>(c[0], first, second, true);
        }
        if constexpr (kQuarters == 3) wgmma<T, kByColumns>(part_of<32>(c[1]), first, second + kNext128, true);
        if constexpr (kQuarters == 4) wgmma<T, kByColumns>(c[1], first, second + kNext128, true);
      }
      wgmma_commit();
    }
    multiplier.end();
  }
  multiplier.finish();
}

template <class T, bool kByColumns, bool kPaired>
__device__ __forceinline__ void multiply_item(float (&c)[2][64], uint32_t across,
                                              Multiplier<kTileStages, kPaired>& multiplier, uint32_t memory,
                                              uint32_t num_stages, bool has_tokens) {
#pragma unroll
  for (int i = 0; i < 128; ++i) c[i / 64][i % 64] = 0.0f;
  switch (across / 64) {
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

/// Some sums of a run-time group of so many, from `first` on, without a copy of the code for each group.
template <int kGroup, int kSums>
__device__ __forceinline__ void take_sums(float (&sums)[kSums], const float (&c)[2][64], uint32_t group, int first) {
#pragma unroll
  for (uint32_t g = 0; g < 128 / kGroup; ++g) {
    if (group != g) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int at = g * kGroup + first + i;
      sums[i] = c[at / 64][at % 64];
    }
  }
}

/// The first of two rows of a tile, eight apart, of which a thread that multiplies has sums.
__device__ __forceinline__ uint32_t row_of_sums() {
  const uint32_t thread = threadIdx.x - kCopiers;
  return thread / 32 * 16 + thread % 32 / 4;
}

__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory"); }

}  // namespace moefy
