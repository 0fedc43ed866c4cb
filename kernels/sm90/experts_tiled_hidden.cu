// The op `experts` by tiles of tokens, first product, on Hopper: h of every tile, for the neurons of all experts that its
// tokens select; of those that a token does not select it is zero.
//
// One warpgroup copies: token rows are gathered straight from x, and rows of several experts lie side by side. The other two
// multiply 64 tokens each, and store while the next item's stages are under way.
#include "experts_tiled.cuh"

namespace moefy {
namespace {

constexpr int kChunks = kTileRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;

/// Rows of w_in that a tile runs.
__device__ __forceinline__ uint32_t rows_of(const moefy_experts_tiled_params& p, uint32_t neurons) {
  return neurons * (p.neurons.glu + 1);
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

template <class T>
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                           const Pipeline<kTileStages>& pipeline) {
  constexpr int kTokenPasses = kTileTokens / kRowsPerPass, kRowPasses = kMostAcross / kRowsPerPass;
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x, chunk = thread % kChunks, pass_row = thread / kChunks;
  const uint32_t num_stages = ceil_div(n.d_model, kDepth);
  Copier<kTileStages> copier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t part) {
    const uint32_t row0 = part * across;
    // What the product goes across, as far as there are rows.
    const uint32_t used = min(across, (rows_of(p, tile.num_neurons) - row0 + 63) / 64 * 64);
    // Rows that this thread copies its chunk of.
    uint32_t x[kTokenPasses], w[kRowPasses];
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      const uint32_t row = pass_row + i * kRowsPerPass;
      x[i] = row < tile.num_valid ? p.token_ids[tile.index * kTileTokens + row] : kNoRow;
    }
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) {
      w[i] = i * kRowsPerPass < used ? weight_row(p, tile, row0 + pass_row + i * kRowsPerPass) : kNoRow;
    }
    const auto copy_row = [&](uint32_t to, const void* matrix, uint32_t row, uint32_t k) {
      const bool valid = row != kNoRow && k < n.d_model;
      copy_async(to, static_cast<const T*>(matrix) + (valid ? row * static_cast<uint64_t>(n.d_model) + k : 0), valid);
    };
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t to = memory + copier.begin() * kTileStageBytes, k = stage * kDepth + chunk * 8;
#pragma unroll
      for (int i = 0; i < kTokenPasses; ++i) {
        copy_row(to + swizzled<kTileRowBytes>(pass_row + i * kRowsPerPass, chunk), p.x, x[i], k);
      }
#pragma unroll
      for (int i = 0; i < kRowPasses; ++i) {
        if (i * kRowsPerPass >= used) break;
        copy_row(to + swizzled<kTileRowBytes>(kTileTokens + pass_row + i * kRowsPerPass, chunk), n.w_in, w[i], k);
      }
      copier.end();
    }
  });
  copier.flush();
}

/// h of two rows of a tile, `row` and eight further, from the sums of this thread: of neurons `first` and up, as many as
/// `count`. All lanes of a warp take part.
template <class T, int kHalves, class Activation>
__device__ __forceinline__ void store_rows(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t row,
                                           uint32_t first, uint32_t count, const float (&c)[2][64], Activation) {
  constexpr int kBlocks = kMostAcross / 8 / kHalves;  // of eight neurons
  moefy_neurons n = p.neurons;
  n.activation = Activation::value;
  const uint32_t t = threadIdx.x % 4, stride = tile.hidden_stride();
  const uint64_t of_tile = static_cast<uint64_t>(tile.index) * n.num_experts;
  // The tokens of a warp are bits of the same word.
  const uint32_t* masks = p.tile_masks + of_tile * (kTileTokens / 32) + row / 32;
  const uint32_t* tokens = p.token_ids + tile.index * kTileTokens;
  T* to = static_cast<T*>(p.hidden) + tile.index * p.hidden_tile + static_cast<uint64_t>(row) * stride + first;
#pragma unroll
  for (int block = 0; block < kBlocks; block += 4) {
    if (block * 8 >= count) break;
    uint32_t words[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = (block + i) * 8 + 2 * t;
      if (at >= count) continue;
      const int j = (block + i) * kHalves, up = j + kHalves - 1;
      const float* pre_sums = &c[j / 16][j % 16 * 4];
      const float* up_sums = &c[up / 16][up % 16 * 4];
      TileNeuron neuron = find_neuron(p, tile, first + at);
      float values[2][2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (at + r >= count) break;
        if (r == 1) neuron = next_neuron(p, tile, neuron, first + at);
        const NeuronConstants constants = neuron_constants(n, neuron.neuron);
        const bool routed = neuron.slot != kNoExpert;
        const uint32_t selected_by = routed ? masks[neuron.slot * (kTileTokens / 32)] : 0xffffffffu;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t own = row + 8 * half;
          const bool selected = selected_by >> (own % 32) & 1;
          float value = neuron_value<T>(n, neuron.neuron, constants, pre_sums[2 * half + r], up_sums[2 * half + r]);
          if (p.gates != nullptr && routed && selected) {
            value *= gate_of(p.gates, n.num_experts, tokens[own], p.tile_experts[of_tile + neuron.slot]);
          }
          values[half][r] = selected ? value : 0.0f;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) words[half][i] = pack_two<T>(values[half][0], values[half][1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 eight = transpose_quad(words[half]);
      const uint32_t at = (block + t) * 8;
      if (at < count && row + 8 * half < tile.num_tokens) {
        *reinterpret_cast<uint4*>(to + 8 * half * stride + at) = eight;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                               const Pipeline<kTileStages>& pipeline) {
  const uint32_t num_stages = ceil_div(p.neurons.d_model, kDepth), halves = p.neurons.glu + 1;
  const uint32_t row = row_of_sums(), group_token = row / 64 * 64;
  Multiplier<kTileStages> multiplier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t part) {
    const uint32_t row0 = part * across, rows = min(across, rows_of(p, tile.num_neurons) - row0);
    const bool has_tokens = group_token < tile.num_tokens;
    float c[2][64];
    multiply_item<T, false>(c, rows, multiplier, memory, num_stages, has_tokens);
    if (!has_tokens) return;
    // Rows are in whole blocks of gate and up, but for the last.
    const uint32_t first = row0 / halves, count = min(across / halves, tile.num_neurons - first);
    with_activation(p.neurons.activation, [&](auto known) {
      if (halves == 2) {
        store_rows<T, 2>(p, tile, row, first, count, c, known);
      } else {
        store_rows<T, 1>(p, tile, row, first, count, c, known);
      }
    });
  });
}

template <class T>
__device__ __forceinline__ void tiled_hidden(const moefy_experts_tiled_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages> pipeline;
  begin();
  find_items(p, items, [&](uint32_t neurons, const AllTiles&) {
    const uint32_t rows = rows_of(p, neurons), count = ceil_div(rows, kMostAcross);
    return Split{count, count == 0 ? 64 : ceil_div(ceil_div(rows, count), 64) * 64};
  });
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_items<T>(p, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p, items, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB.
#define MOEFY_EXPERTS_TILED_HIDDEN(name, type)                                                       \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                           \
      moefy_experts_tiled_hidden_##name(const __grid_constant__ moefy_experts_tiled_params p) {      \
    moefy::tiled_hidden<type>(p);                                                                    \
  }

MOEFY_EXPERTS_TILED_HIDDEN(f16, __half)
MOEFY_EXPERTS_TILED_HIDDEN(bf16, __nv_bfloat16)
