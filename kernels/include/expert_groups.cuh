// Many tokens: the neurons that run together on the same tokens, as one matrix product each.
#pragma once

#include "dependency.cuh"
#include "experts.cuh"
#include "mma.cuh"
#include "team.cuh"

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

__device__ __forceinline__ uint32_t num_pairs(const moefy_experts_params& p) {
  return min(__ldcg(p.expert_offsets + p.neurons.num_experts), p.max_pairs);
}

/// Row of a pair that is selected, or max_pairs where the lists ended before it. Then nobody wrote its entry of pair_rows, so
/// where they are full an entry counts if the lists say the same.
__device__ __forceinline__ uint32_t row_of_pair(const moefy_experts_params& p, uint32_t token, uint32_t expert) {
  const uint32_t row = __ldcg(p.pair_rows + static_cast<uint64_t>(token) * p.neurons.num_experts + expert);
  if (num_pairs(p) < p.max_pairs) return row;
  const bool is_of_expert = row >= __ldcg(p.expert_offsets + expert) && row < __ldcg(p.expert_offsets + expert + 1);
  return is_of_expert && row < p.max_pairs && __ldcg(p.token_ids + row) == token ? row : p.max_pairs;
}

/// Whether so many pairs exist that the second product, or both of all experts, go by tiles of tokens.
__device__ __forceinline__ bool by_tokens(const moefy_experts_params& p) { return num_pairs(p) >= p.min_token_pairs; }

/// Whether one launch does both products: then outputs of all pairs fit in memory, and nothing writes h.
__device__ __forceinline__ bool is_fused(const moefy_experts_params& p) { return p.fused != 0 && !by_tokens(p); }

/// First of a group's rows among the outputs of a slab; an expert's are where its pairs are.
__device__ __forceinline__ uint64_t place_of_rows(const moefy_experts_params& p, const Group& group) {
  if (group.expert != kNoExpert) return 0;
  const bool after_shared = group.first_neuron >= p.neurons.d_ff && p.neurons.shared > 0;
  return static_cast<uint64_t>(num_pairs(p)) + (after_shared ? p.num_tokens : 0);
}

/// What a kernel begins with that may have one behind it that begins with `begin_for_many`.
__device__ __forceinline__ void begin_before_many() {
  wait_for_dependencies();
  launch_dependents();
}

/// What a kernel begins with that has something to do only where so many pairs exist; whether they do. Where there are lists, the
/// kernel before those that begin so has waited before it lets them, so that lists are complete by then: blocks see at once that
/// there is nothing to do, and end. One of them waits, for the kernel after this one.
__device__ __forceinline__ bool begin_for_many(const moefy_experts_params& p) {
  launch_dependents();
  const bool runs = p.expert_offsets == nullptr || by_tokens(p);
  if (runs || blockIdx.x == 0) wait_for_dependencies();
  return runs;
}

/// Columns of y whose pair outputs are in memory together: as many as fit, whatever the masks select.
struct Slab {
  uint32_t width;  // from one row to the next
  uint32_t first;
  uint32_t end;  // at most `first` where there are no columns left, or none are wanted
};

/// `pairs`: that there are.
template <class T>
__device__ __forceinline__ Slab find_slab(const moefy_experts_params& p, uint32_t pairs) {
  constexpr uint32_t kStep = MOEFY_EXPERTS_MANY_SLAB;
  if (pairs >= p.min_token_pairs) return {kStep, 0, 0};
  const moefy_neurons& n = p.neurons;
  const uint32_t all = round_up_8(n.d_model);
  // Then there is room for all of them.
  if (p.fused != 0) return {all, 0, static_cast<uint32_t>(n.d_model)};
  const uint64_t rows = pairs + (uint64_t(n.shared > 0) + (n.rank > 0)) * p.num_tokens;
  const uint64_t fit = p.rows_bytes / (max(rows, uint64_t(1)) * sizeof(T));
  // As equal as they can be: of two slabs, rows of 2304 and 1792 columns took 864 us where 2048 each took 777.
  const uint32_t slabs = rows == 0 || fit >= all ? 1 : ceil_div(all, static_cast<uint32_t>(fit) / kStep * kStep);
  const uint32_t width = slabs == 1 ? all : ceil_div(ceil_div(all, slabs), kStep) * kStep;
  const uint32_t first = p.slab * width;
  return {width, first, min(first + width, static_cast<uint32_t>(n.d_model))};
}

/// Row of w_in behind row `row` of a group's tiles, or kNoRow beyond its last neuron. A tile of a GLU holds eight gate rows,
/// the eight up rows of the same neurons, and so on: then one lane has both factors.
constexpr uint32_t kNoRow = 0xffffffffu;

__device__ __forceinline__ uint32_t weight_row(const moefy_neurons& n, const Group& group, uint32_t row) {
  const uint32_t neuron = group.halves == 2 ? row / 16 * 8 + row % 8 : row;
  if (neuron >= group.width) return kNoRow;
  const bool up = group.halves == 2 && row / 8 % 2 == 1;
  return up ? up_row(n, group.first_neuron + neuron) : input_row(n, group.first_neuron + neuron);
}

template <class T>
__device__ __forceinline__ void store_two(T* at, float first, float second) {
  at[0] = from_float<T>(first);
  at[1] = from_float<T>(second);
}

template <class T>
__device__ __forceinline__ uint32_t pack_two(float first, float second) {
  const T both[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t word;
  memcpy(&word, both, sizeof(word));
  return word;
}

/// Stores h of two rows of a tile, `row` and eight further, as far as the tile has them, from `kAcross` fragments of eight
/// rows of w_in, `first_row` the first of them: `sums` has, fragment by fragment, two sums of this lane for either row, and
/// is used up. All lanes of a warp take part.
///
/// A loop moves the sums down instead of going up: unrolled, every tile would wait for tens of kilobytes of instructions.
template <class T, int kHalves, int kSums, class Activation>
__device__ __forceinline__ void store_hidden(const moefy_experts_params& p, const Group& group, const RowRange& tile,
                                             uint32_t row, uint32_t first_row, float (&sums)[kSums], Activation) {
  constexpr int kBlocks = kSums / 4 / kHalves;  // of eight neurons
  constexpr int kAtOnce = kBlocks < 4 ? kBlocks : 4;
  moefy_neurons n = p.neurons;
  n.activation = Activation::value;
  const uint32_t t = threadIdx.x % 4, first = first_row / kHalves;
  T* to[2];
  float gates[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = tile.begin + row + 8 * half;
    to[half] = static_cast<T*>(p.hidden) + group.hidden + own * group.hidden_stride + first;
    const bool has_gate = p.gates != nullptr && group.expert != kNoExpert && row + 8 * half < tile.count;
    gates[half] = has_gate ? gate_of(p.gates, n.num_experts, token_of(p, group, own), group.expert) : 1.0f;
  }
  const auto exists = [&](int half, uint32_t at) {
    return row + 8 * half < tile.count && first + at < group.hidden_stride;
  };
#pragma unroll 1
  for (int block = 0; block < kBlocks; block += 4) {
    uint32_t words[2][4] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t at = (block + i) * 8 + 2 * t;
      const float* pre = sums + i * kHalves * 4;
      const float* up = sums + (i * kHalves + kHalves - 1) * 4;
      float values[2][2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (first + at + r >= group.width) continue;
        const uint32_t neuron = group.first_neuron + first + at + r;
        const NeuronConstants constants = neuron_constants(n, neuron);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float value = neuron_value<T>(n, neuron, constants, pre[2 * half + r], up[2 * half + r]);
          values[half][r] = gates[half] * value;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(T) == 2) {
          words[half][i] = pack_two<T>(values[half][0], values[half][1]);
        } else if (exists(half, at)) {
          store_two(to[half] + at, values[half][0], values[half][1]);
        }
      }
    }
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 eight = transpose_quad(words[half]);
        const uint32_t own = block + t;
        store_vector_if(own < kBlocks && exists(half, own * 8), to[half] + own * 8, eight);
      }
    }
    constexpr int kUsed = kAtOnce * kHalves * 4;
#pragma unroll
    for (int i = 0; i + kUsed < kSums; ++i) sums[i] = sums[i + kUsed];
  }
}

template <class T, int kSums>
__device__ __forceinline__ void store_hidden(const moefy_experts_params& p, const Group& group, const RowRange& tile,
                                             uint32_t row, uint32_t first_row, float (&sums)[kSums]) {
  with_activation(p.neurons.activation, [&](auto known) {
    if (group.halves == 2) {
      store_hidden<T, 2>(p, group, tile, row, first_row, sums, known);
    } else {
      store_hidden<T, 1>(p, group, tile, row, first_row, sums, known);
    }
  });
}

/// Exclusive sums of the groups' numbers of tiles, in shared memory, by all threads of a block; the last entry is the
/// number of tiles.
template <int kThreads, class Tiles>
__device__ void count_tiles(const moefy_experts_params& p, uint32_t* tile_offsets, const Tiles& tiles_of) {
  __shared__ uint32_t warp_sums[kThreads / 32];
  const uint32_t groups = num_groups(p.neurons);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint32_t before = 0;
  for (uint32_t first = 0; first < groups; first += kThreads) {
    const uint32_t index = first + threadIdx.x;
    const uint32_t tiles = index < groups ? tiles_of(find_group(p, index)) : 0;
    uint32_t sum = prefix_sum(tiles);
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
