// The op `experts` by tiles of tokens, second product, on Hopper: y of every token, as deep as its tile has neurons. Each
// row is written once, where its token is.
#include "experts_tiled.cuh"
#include "store_lines.cuh"

namespace moefy {
namespace {

constexpr uint32_t kBlockBytes = kDepth * kTileRowBytes;  // of 64 columns of weights

template <class T>
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                           const Pipeline<kTileStages>& pipeline) {
  constexpr int kTokenPasses = kTileTokens / kRowsPerPass, kNeuronPasses = kDepth / kRowsPerPass;
  constexpr int kBlocks = kMostAcross / 64;
  const moefy_neurons& n = p.neurons;
  const uint32_t chunk = threadIdx.x % kChunks, pass_row = threadIdx.x / kChunks;
  Copier<kTileStages> copier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth), column = column0 + chunk * 8;
    const T* hidden = static_cast<const T*>(p.hidden) + (tile.first_token + pass_row) * p.hidden_stride + chunk * 8;
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
        const bool valid = row < tile.num_tokens;
        copy_async(to + swizzled<kTileRowBytes>(row, chunk),
                   hidden + (valid ? i * kRowsPerPass * p.hidden_stride + depth : 0), valid);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (block * 64 >= across) break;
        const uint32_t at = to + kTokenBytes + block * kBlockBytes;
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
}

/// The same by the copy engine, by one warp: a lane asks for a box of weights.
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_engine_params& engine, const Items& items,
                                           uint32_t memory, const Pipeline<kTileStages, true>& pipeline) {
  const moefy_experts_tiled_params& p = engine.experts;
  const uint32_t lane = threadIdx.x, down = kDepth / engine.box_neurons;
  const uint32_t block = lane / down, neuron0 = lane % down * engine.box_neurons;
  const uint32_t at = kTokenBytes + block * kBlockBytes + neuron0 * kTileRowBytes;
  Copier<kTileStages, true> copier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth);
    const bool mine = block * 64 < across;
    // Beyond the last ones the copy engine gives zeros.
    const auto find_box = [&](uint32_t stage) {
      const uint32_t place = stage * kDepth + neuron0;
      return mine && place < tile.num_neurons ? find_neuron(p, tile, place).neuron : p.neurons.d_ff;
    };
    uint32_t neuron = find_box(0);
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t slot = copier.begin(), to = memory + slot * kTileStageBytes, full = pipeline.full(slot);
      if (lane == 0) {
        barrier_expect(full, kTokenBytes + across * kTileRowBytes);
        copy_box(to, engine.hidden, {stage * kDepth, tile.first_token, 0, 0}, full);
      }
      if (mine) copy_box(to + at, engine.weights, {column0 + block * 64, neuron, 0, 0}, full);
      copier.end_by_engine();
      neuron = find_box(stage + 1);
    }
  });
}

/// Columns of y of a warp's 16 rows of a tile, from its sums, which are used up.
template <class T, int kSums>
__device__ __forceinline__ void store_columns(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t row0,
                                              uint32_t column0, uint32_t end, float (&c)[kSums]) {
  const moefy_neurons& n = p.neurons;
  const uint32_t lane = threadIdx.x % 32, own = row0 + lane / 4;
#pragma unroll 1
  for (uint32_t column = column0; column < end; column += 64) {
    const auto pair = [&](int block, int half) {
      const uint32_t at = column + block * 8 + lane % 4 * 2;
      if (own + half * 8 >= tile.num_valid || at >= end) return make_float2(0.0f, 0.0f);
      const float* sums = c + block * 4 + 2 * half;
      const float* bias = n.b_out == nullptr ? nullptr : n.b_out + at;
      return bias == nullptr ? make_float2(sums[0], sums[1]) : make_float2(sums[0] + bias[0], sums[1] + bias[1]);
    };
    store_lines<T, 8>(end - column, pair, [&](uint32_t row) {
      const uint32_t at = row0 + row;
      if (at >= tile.num_tokens) return static_cast<T*>(nullptr);
      return static_cast<T*>(p.y) + p.token_ids[tile.first_token + at] * n.d_model + column;
    });
    move_down<32>(c);
  }
}

template <class T, bool kEngine>
__device__ __forceinline__ void multiply_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                               const Pipeline<kTileStages, kEngine>& pipeline) {
  const moefy_neurons& n = p.neurons;
  const uint32_t row0 = first_row_of_warp();
  Multiplier<kTileStages, kEngine> multiplier(pipeline);
  for_each_item(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
    const bool has_tokens = row0 / 64 * 64 < tile.num_tokens;
    const uint32_t end = min(column0 + across, static_cast<uint32_t>(n.d_model));
    with_sums(across, [&](auto sums) {
      float c[decltype(sums)::value];
      multiply_stages<T, true>(c, multiplier, memory, ceil_div(tile.num_neurons, kDepth), has_tokens);
      if (has_tokens) store_columns<T>(p, tile, row0, column0, end, c);
    });
  });
}

/// Of an item: its stages, and what it takes to begin and to store, as so many more.
__device__ __forceinline__ uint32_t steps_of(uint32_t neurons) { return ceil_div(neurons, kDepth) + 4; }

/// What an item costs: products, and copies of tokens too.
__device__ __forceinline__ uint32_t cost(uint32_t steps, uint32_t across) { return steps * (kTileTokens / 2 + across); }

/// How far items go across, in shared memory.
struct Widths {
  uint32_t all_steps;
  uint32_t longest[4];  // if every item goes 256, 192, 128 or 64 across

  __device__ uint32_t across(uint32_t candidate) const { return kMostAcross - candidate * 64; }

  /// About how long it takes: the share of all that there is, or, round after round, as many as there are rounds of at least
  /// the size of the last one's first. By all threads of a block.
  __device__ void estimate(const Items& items, uint32_t d_model) {
    if (threadIdx.x < 4) longest[threadIdx.x] = 0;
    if (threadIdx.x == 4) all_steps = 0;
    __syncthreads();
    if (threadIdx.x < items.num_tiles) atomicAdd(&all_steps, steps_of(items.neurons[threadIdx.x]));
    __syncthreads();
    const uint32_t candidate = threadIdx.x % 4, of_tile = ceil_div(d_model, across(candidate));
    uint32_t most = cost(all_steps, across(candidate)) * of_tile / gridDim.x;
    for (uint32_t round = threadIdx.x / 4; round * gridDim.x < of_tile * items.num_tiles; round += kPipelineThreads / 4) {
      const uint32_t steps = steps_of(items.neurons[round * gridDim.x / of_tile]);
      most = max(most, (round + 1) * cost(steps, across(candidate)));
    }
    atomicMax(longest + candidate, most);
    __syncthreads();
  }

  /// Of a tile with so many neurons: what is best for all, and more where it is not among the deepest.
  __device__ uint32_t of(uint32_t neurons) const {
    uint32_t best = 0;
    for (uint32_t candidate = 1; candidate < 4; ++candidate) {
      if (longest[candidate] < longest[best]) best = candidate;
    }
    uint32_t candidate = 0;
    while (candidate < best && cost(steps_of(neurons), across(candidate)) > longest[best] / 2) ++candidate;
    return across(candidate);
  }
};

__device__ __forceinline__ void find_output_items(const moefy_experts_tiled_params& p, Items& items) {
  __shared__ Widths widths;
  const uint32_t d_model = p.neurons.d_model;
  find_items(p, items, [&](uint32_t) { return d_model; }, [&] { widths.estimate(items, d_model); },
             [&](uint32_t neurons) { return widths.of(neurons); });
}

template <class T>
__device__ __forceinline__ void tiled_output(const moefy_experts_tiled_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages> pipeline;
  begin();
  find_output_items(p, items);
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_items<T>(p, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p, items, shared_address(memory), pipeline);
  }
}

template <class T>
__device__ __forceinline__ void tiled_output(const moefy_experts_tiled_engine_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages, true> pipeline(1);
  begin();
  find_output_items(p.experts, items);
  if (threadIdx.x < kCopiers) {
    become_copier();
    if (threadIdx.x < 32) copy_items(p, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p.experts, items, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB.
#define MOEFY_EXPERTS_TILED_OUTPUT(name, type)                                                                \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                                    \
      moefy_experts_tiled_output_##name(const __grid_constant__ moefy_experts_tiled_params p) {               \
    moefy::tiled_output<type>(p);                                                                             \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                                    \
      moefy_experts_tiled_engine_output_##name(const __grid_constant__ moefy_experts_tiled_engine_params p) { \
    moefy::tiled_output<type>(p);                                                                             \
  }

MOEFY_EXPERTS_TILED_OUTPUT(f16, __half)
MOEFY_EXPERTS_TILED_OUTPUT(bf16, __nv_bfloat16)
