// The op `experts` by tiles of tokens, first product, on Hopper: h of every tile, for the neurons of all experts that its
// tokens select; of those that a token does not select it is zero.
//
// One warpgroup copies: token rows are gathered straight from x, and rows of several experts lie side by side. The other two
// multiply 64 tokens each, and store while the next item's stages are under way.
#include "experts_tiled.cuh"

namespace moefy {
namespace {

constexpr uint32_t kLinear = kNoExpert - 1;

/// What belongs to the neurons of an item, in shared memory.
struct Places {
  float bias[kMostAcross];
  float bias_up[kMostAcross];
  float mean[kMostAcross];
  uint32_t experts[kMostAcross];                 // kNoExpert: shared
  uint32_t selected_by[kTileWords][kMostAcross];  // bits of tokens
};

/// Rows of w_in for so many neurons: a GLU's gate and up rows in turns of eight. What an item goes across is a multiple of
/// those of 64 neurons, as h is written so far.
__device__ __forceinline__ uint32_t halves_of(const moefy_experts_tiled_params& p) { return p.neurons.glu + 1; }

__device__ __forceinline__ uint32_t rows_of(const moefy_experts_tiled_params& p, uint32_t neurons) {
  return ceil_div(neurons, 64) * 64 * halves_of(p);
}

/// Row of w_in behind a tile's row, ordered as by `weight_row`; a linear neuron of a GLU takes two rows as well.
__device__ __forceinline__ uint32_t weight_row(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t row) {
  const moefy_neurons& n = p.neurons;
  const uint32_t place = n.glu ? row / 16 * 8 + row % 8 : row;
  if (place >= tile.num_neurons) return kNoRow;
  const uint32_t neuron = find_neuron(p, tile, place).neuron;
  if (!n.glu || row / 8 % 2 == 0) return input_row(n, neuron);
  return neuron < n.d_ff ? up_row(n, neuron) : kNoRow;
}

/// Boxes of weights of an item that the copy engine brings, each asked for by a lane of a warp.
struct Boxes {
  uint32_t bytes;  // of all
  uint32_t at;     // in a stage, of this lane's
  uint32_t group;  // of eight neurons
  bool mine;

  __device__ Boxes(const moefy_experts_tiled_params& p, uint32_t box_neurons, const TokenTile& tile, uint32_t first,
                   uint32_t neurons) {
    const uint32_t rows = box_neurons * halves_of(p), boxes = ceil_div(min(neurons, tile.num_neurons - first), box_neurons);
    bytes = boxes * rows * kTileRowBytes;
    at = kTokenBytes + threadIdx.x * rows * kTileRowBytes;
    mine = threadIdx.x < boxes;
    group = mine ? find_neuron(p, tile, first + threadIdx.x * box_neurons).neuron / 8 : 0;
  }
};

template <class T, bool kEngine>
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_params& p, const moefy_tensor_map* weights,
                                           uint32_t box_neurons, const Items& items, uint32_t memory,
                                           const Pipeline<kTileStages, kEngine>& pipeline) {
  constexpr int kTokenPasses = kTileTokens / kRowsPerPass, kRowPasses = kEngine ? 0 : kMostAcross / kRowsPerPass;
  const moefy_neurons& n = p.neurons;
  const uint32_t chunk = threadIdx.x % kChunks, pass_row = threadIdx.x / kChunks;
  const uint32_t num_stages = ceil_div(n.d_model, kDepth);
  Copier<kTileStages, kEngine> copier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t row0) {
    const uint32_t used = min(across, rows_of(p, tile.num_neurons) - row0);
    // Rows that this thread copies its chunk of.
    const T* x[kTokenPasses];
    uint32_t w[kRowPasses + 1];
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      const uint32_t row = pass_row + i * kRowsPerPass;
      x[i] = nullptr;
      if (row < tile.num_valid) {
        x[i] = static_cast<const T*>(p.x) + p.token_ids[tile.first_token + row] * n.d_model + chunk * 8;
      }
    }
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) {
      w[i] = i * kRowsPerPass < used ? weight_row(p, tile, row0 + pass_row + i * kRowsPerPass) : kNoRow;
    }
    const Boxes boxes(p, kEngine ? box_neurons : kDepth, tile, row0 / halves_of(p), used / halves_of(p));
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t slot = copier.begin(), to = memory + slot * kTileStageBytes, k = stage * kDepth;
      const bool inside = k + chunk * 8 < n.d_model;
      if constexpr (kEngine) {
        if (threadIdx.x == 0) barrier_expect(pipeline.full(slot), boxes.bytes);
        if (boxes.mine) copy_box(to + boxes.at, *weights, {k, 0, 0, boxes.group}, pipeline.full(slot));
      }
#pragma unroll
      for (int i = 0; i < kTokenPasses; ++i) {
        const bool valid = x[i] != nullptr && inside;
        copy_async(to + swizzled<kTileRowBytes>(pass_row + i * kRowsPerPass, chunk), valid ? x[i] + k : p.x, valid);
      }
#pragma unroll
      for (int i = 0; i < kRowPasses; ++i) {
        if (i * kRowsPerPass >= used) break;
        const bool valid = w[i] != kNoRow && inside;
        copy_async(to + kTokenBytes + swizzled<kTileRowBytes>(pass_row + i * kRowsPerPass, chunk),
                   static_cast<const T*>(n.w_in) + (valid ? w[i] * n.d_model + k + chunk * 8 : 0), valid);
      }
      copier.end();
    }
  });
}

/// Notes what the neurons of an item need, one a thread; beyond the last nobody selects them.
__device__ __forceinline__ void find_places(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t first,
                                            Places& places) {
  const uint32_t own = threadIdx.x - kCopiers;
  NeuronConstants constants = {};
  uint32_t expert = kNoExpert;
  uint4 selected_by = {};
  if (first + own < tile.num_neurons) {
    const TileNeuron found = find_neuron(p, tile, first + own);
    constants = neuron_constants(p.neurons, found.neuron);
    if (found.slot == kNoExpert) {
      selected_by = {~0u, ~0u, ~0u, ~0u};
      expert = found.neuron < p.neurons.d_ff ? kNoExpert : kLinear;
    } else {
      const uint64_t at = static_cast<uint64_t>(tile.index) * p.neurons.num_experts + found.slot;
      expert = p.tile_expert_ids[at];
      selected_by = *reinterpret_cast<const uint4*>(p.tile_masks + at * kTileWords);
    }
  }
  places.bias[own] = constants.bias;
  places.bias_up[own] = constants.bias_up;
  places.mean[own] = constants.mean;
  places.experts[own] = expert;
  places.selected_by[0][own] = selected_by.x;
  places.selected_by[1][own] = selected_by.y;
  places.selected_by[2][own] = selected_by.z;
  places.selected_by[3][own] = selected_by.w;
}

__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(kMultipliers) : "memory"); }

/// h of two rows of a tile, `row` and eight further, from the sums of this thread, which are used up: of so many neurons from
/// `first` on, a multiple of 32. All lanes of a warp take part.
template <class T, int kHalves, int kSums, class Activation>
__device__ __forceinline__ void store_rows(const moefy_experts_tiled_params& p, const TokenTile& tile, const Places& places,
                                           uint32_t row, uint32_t first, uint32_t count, float (&c)[kSums], Activation) {
  moefy_neurons n = p.neurons;
  n.activation = Activation::value;
  n.glu = kHalves - 1;
  const uint32_t t = threadIdx.x % 4;
  // The tokens of a warp are bits of the same word.
  const uint32_t* selected_by = places.selected_by[row / 32];
  T* to = static_cast<T*>(p.hidden) + (tile.first_token + row) * p.hidden_stride + first + t * 8;
#pragma unroll 1
  for (uint32_t done = 0; done < count; done += 32) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = done + i * 8 + 2 * t;
      const float* pre = c + i * kHalves * 4;
      const float* up = pre + (kHalves - 1) * 4;
      float values[2][2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const NeuronConstants constants = {places.bias[at + r], places.bias_up[at + r], places.mean[at + r]};
        const bool linear = n.rank > 0 && places.experts[at + r] == kLinear;
        const uint32_t tokens = selected_by[at + r] >> (row % 32);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float value = neuron_value<T>(n, linear ? n.d_ff : 0, constants, pre[2 * half + r], up[2 * half + r]);
          values[half][r] = tokens >> (8 * half) & 1 ? value : 0.0f;
        }
        if (p.gates != nullptr && places.experts[at + r] < kLinear) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (!(tokens >> (8 * half) & 1)) continue;
            const uint32_t token = p.token_ids[tile.first_token + row + 8 * half];
            values[half][r] *= gate_of(p.gates, n.num_experts, token, places.experts[at + r]);
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) words[half][i] = pack_two<T>(values[half][0], values[half][1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 eight = transpose_quad(words[half]);
      store_vector_if(row + 8 * half < tile.num_tokens, to + 8 * half * p.hidden_stride + done, eight);
    }
    move_down<16 * kHalves>(c);
  }
}

template <class T, bool kEngine>
__device__ __forceinline__ void multiply_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                               const Pipeline<kTileStages, kEngine>& pipeline) {
  // In turns, so that one can be filled while others still read the last.
  __shared__ Places places[2];
  const uint32_t num_stages = ceil_div(p.neurons.d_model, kDepth), halves = halves_of(p);
  const uint32_t row = first_row_of_warp() + threadIdx.x % 32 / 4, group_token = row / 64 * 64;
  uint32_t turn = 0;
  Multiplier<kTileStages, kEngine> multiplier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t row0) {
    const uint32_t used = min(across, rows_of(p, tile.num_neurons) - row0), first = row0 / halves;
    const Places& those = places[turn];
    find_places(p, tile, first, places[turn]);
    turn ^= 1;
    sync_multipliers();
    const bool has_tokens = group_token < tile.num_tokens;
    with_sums(used, [&](auto sums) {
      constexpr int kSums = decltype(sums)::value;
      float c[kSums];
      multiply_stages<T, false>(c, multiplier, memory, num_stages, has_tokens);
      if (!has_tokens) return;
      with_activation(p.neurons.activation, [&](auto known) {
        if (halves == 1) return store_rows<T, 1>(p, tile, those, row, first, used, c, known);
        // Sums of gate and up for 64 neurons at least.
        if constexpr (kSums % 64 == 0) store_rows<T, 2>(p, tile, those, row, first, used / 2, c, known);
      });
    });
  });
}

template <class T, bool kEngine>
__device__ __forceinline__ void tiled_hidden(const moefy_experts_tiled_params& p, const moefy_tensor_map* weights,
                                             uint32_t box_neurons) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages, kEngine> pipeline;
  begin();
  const auto rows = [&](uint32_t neurons) { return rows_of(p, neurons); };
  find_items(p, items, rows, [] {}, [&](uint32_t neurons) {
    // As even as can be.
    const uint32_t unit = 64 * halves_of(p), all = max(rows_of(p, neurons), unit);
    return ceil_div(ceil_div(all, ceil_div(all, kMostAcross)), unit) * unit;
  });
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_items<T>(p, weights, box_neurons, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p, items, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB.
#define MOEFY_EXPERTS_TILED_HIDDEN(name, type)                                                                        \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                                            \
      moefy_experts_tiled_hidden_##name(const __grid_constant__ moefy_experts_tiled_params p) {                       \
    moefy::tiled_hidden<type, false>(p, nullptr, 0);                                                                  \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                                            \
      moefy_experts_tiled_engine_hidden_##name(const __grid_constant__ moefy_experts_tiled_engine_params p) {         \
    moefy::tiled_hidden<type, true>(p.experts, &p.weights, p.box_neurons);                                            \
  }

MOEFY_EXPERTS_TILED_HIDDEN(f16, __half)
MOEFY_EXPERTS_TILED_HIDDEN(bf16, __nv_bfloat16)
