// The op `experts` by tiles of tokens, second product, on Hopper: y of every token, as deep as its tile has neurons. Each
// row is written once, where its token is.
#include "experts_tiled.cuh"

namespace moefy {
namespace {

constexpr int kChunks = kTileRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;
constexpr uint32_t kBlockBytes = kDepth * kTileRowBytes;  // of 64 columns of weights

template <class T>
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                           const Pipeline<kTileStages>& pipeline) {
  constexpr int kTokenPasses = kTileTokens / kRowsPerPass, kNeuronPasses = kDepth / kRowsPerPass;
  constexpr int kBlocks = kMostAcross / 64;
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x, chunk = thread % kChunks, pass_row = thread / kChunks;
  Copier<kTileStages> copier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t part) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth), stride = tile.hidden_stride();
    const uint32_t column = part * across + chunk * 8;
    const T* hidden = static_cast<const T*>(p.hidden) + tile.index * p.hidden_tile + pass_row * stride + chunk * 8;
    const T* weights = static_cast<const T*>(n.w_out);
    // Rows of weights that this thread copies its chunk of: of the stage to come.
    uint32_t rows[kNeuronPasses];
    const auto find_rows = [&](uint32_t stage) {
#pragma unroll
      for (int i = 0; i < kNeuronPasses; ++i) {
        const uint32_t place = stage * kDepth + pass_row + i * kRowsPerPass;
        rows[i] = place < tile.num_neurons ? find_neuron(p, tile, place).neuron : kNoRow;
      }
    };
    find_rows(0);
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t to = memory + copier.begin() * kTileStageBytes, depth = stage * kDepth;
#pragma unroll
      for (int i = 0; i < kTokenPasses; ++i) {
        const uint32_t row = pass_row + i * kRowsPerPass;
        const bool valid = row < tile.num_tokens && depth + chunk * 8 < stride;
        copy_async(to + swizzled<kTileRowBytes>(row, chunk), hidden + (valid ? i * kRowsPerPass * stride + depth : 0), valid);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (block * 64 >= across) break;
        const uint32_t at = to + kTileTokens * kTileRowBytes + block * kBlockBytes;
#pragma unroll
        for (int i = 0; i < kNeuronPasses; ++i) {
          const bool valid = rows[i] != kNoRow && column + block * 64 < n.d_model;
          copy_async(at + swizzled<kTileRowBytes>(pass_row + i * kRowsPerPass, chunk),
                     weights + (valid ? rows[i] * n.d_model + column + block * 64 : 0), valid);
        }
      }
      copier.end();
      find_rows(stage + 1);
    }
  });
  copier.flush();
}

/// Two rows of y, `row` and eight further, from the sums of this thread, beginning at a column.
template <class T>
__device__ __forceinline__ void store_rows(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t row,
                                           uint32_t column0, uint32_t across, float (&c)[2][64]) {
  const moefy_neurons& n = p.neurons;
  const uint32_t t = threadIdx.x % 4;
  if (n.b_out != nullptr) {
#pragma unroll
    for (int j = 0; j < int(kMostAcross / 8); ++j) {
      const uint32_t column = column0 + j * 8 + 2 * t;
      if (column >= n.d_model || j * 8 >= across) break;
      const float bias[2] = {n.b_out[column], n.b_out[column + 1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* sums = &c[j / 16][j % 16 * 4 + 2 * half];
        sums[0] += bias[0];
        sums[1] += bias[1];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // The rows of two quads, of which a line of 128 bytes each is stored at once.
    const uint32_t first = (row & ~1u) + 8 * half;
    T* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t token = first + i < tile.num_tokens ? p.token_ids[tile.index * kTileTokens + first + i] : 0;
      to[i] = static_cast<T*>(p.y) + token * n.d_model;
    }
#pragma unroll
    for (int j = 0; j < int(kMostAcross / 8); j += 8) {
      if (j * 8 >= across) break;
      uint4 eights[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int block = j + part * 4 + i;
          const float* sums = &c[block / 16][block % 16 * 4 + 2 * half];
          words[i] = pack_two<T>(sums[0], sums[1]);
        }
        eights[part] = transpose_quad(words);
      }
      exchange_halves(eights[0], eights[1]);
      const uint32_t column = column0 + (j + threadIdx.x % 8) * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first + i >= tile.num_tokens || column >= n.d_model) continue;
        const uint4 zeros = {};
        *reinterpret_cast<uint4*>(to[i] + column) = first + i < tile.num_valid ? eights[i] : zeros;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                               const Pipeline<kTileStages>& pipeline) {
  const uint32_t row = row_of_sums(), group_token = row / 64 * 64;
  Multiplier<kTileStages> multiplier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t part) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth);
    const bool has_tokens = group_token < tile.num_tokens;
    float c[2][64];
    multiply_item<T, true>(c, across, multiplier, memory, num_stages, has_tokens);
    if (!has_tokens) return;
    store_rows<T>(p, tile, row, part * across, across, c);
  });
}

/// What an item costs: copies, and what it takes to begin and to store, in columns of a stage.
__device__ __forceinline__ uint32_t cost(uint32_t neurons, uint32_t across) {
  return (ceil_div(neurons, kDepth) + 2) * (kTileTokens + across);
}

template <class T>
__device__ __forceinline__ void tiled_output(const moefy_experts_tiled_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages> pipeline;
  begin();
  const uint32_t d_model = p.neurons.d_model;
  // The deepest tiles in narrow items, so that none takes longer than all others together.
  find_items(p, items, [&](uint32_t neurons, const AllTiles& all) {
    const uint32_t share = ceil_div(d_model, kMostAcross) * cost(all.neurons, kMostAcross) / gridDim.x;
    const uint32_t most = max(share, cost(all.most_neurons, 64));
    uint32_t across = kMostAcross;
    while (across > 64 && cost(neurons, across) > most) across -= 64;
    return Split{ceil_div(d_model, across), across};
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
#define MOEFY_EXPERTS_TILED_OUTPUT(name, type)                                                       \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                           \
      moefy_experts_tiled_output_##name(const __grid_constant__ moefy_experts_tiled_params p) {      \
    moefy::tiled_output<type>(p);                                                                    \
  }

MOEFY_EXPERTS_TILED_OUTPUT(f16, __half)
MOEFY_EXPERTS_TILED_OUTPUT(bf16, __nv_bfloat16)
