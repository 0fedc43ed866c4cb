// The op `experts` by tiles of tokens, second product, on Hopper: y of every token, as deep as its tile has neurons. Each
// row is written once, where its token is.
#include "experts_tiled.cuh"

namespace moefy {
namespace {

constexpr uint32_t kBlockBytes = kDepth * kTileRowBytes;  // of 64 columns of weights

template <class T>
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                           const Pipeline<kTileStages>& pipeline) {
  constexpr int kTokenPasses = kTokens / kRowsPerPass, kNeuronPasses = kDepth / kRowsPerPass;
  constexpr int kBlocks = kMostAcross / 64;
  const moefy_neurons& n = p.neurons;
  const uint32_t chunk = threadIdx.x % kChunks, pass_row = threadIdx.x / kChunks;
  Copier<kTileStages> copier(pipeline);
  for_each_item<false>(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
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
  copier.flush();
}

/// The same by the copy engine, by one warp: a lane has a box of weights, and every other is this block's to ask for.
__device__ __forceinline__ void copy_items(const moefy_experts_tiled_paired_params& paired, const Items& items,
                                           uint32_t memory, const Pipeline<kTileStages, true>& pipeline) {
  const moefy_experts_tiled_params& p = paired.experts;
  const uint32_t lane = threadIdx.x, down = kDepth / paired.box_neurons;
  const uint32_t block = lane / down, neuron0 = lane % down * paired.box_neurons;
  const uint32_t at = kTokenBytes + block * kBlockBytes + neuron0 * kTileRowBytes;
  Copier<kTileStages, true> copier(pipeline);
  for_each_item<true>(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth);
    const bool mine = block * 64 < across && lane % 2 == blockIdx.x % 2;
    // Of eight neurons; beyond the last ones the copy engine gives zeros.
    const auto find_group = [&](uint32_t stage) {
      const uint32_t place = stage * kDepth + neuron0;
      return mine && place < tile.num_neurons ? find_neuron(p, tile, place).neuron / 8 : p.neurons.d_ff / 8;
    };
    uint32_t group = find_group(0);
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t slot = copier.begin(), to = memory + slot * kTileStageBytes, full = pipeline.full(slot);
      if (lane == 0) {
        barrier_expect(full, kTokenBytes + across * kTileRowBytes);
        copy_box(to, paired.hidden, {stage * kDepth, 0, 0, tile.first_token / 8}, full);
      }
      if (mine) copy_box_to_pair(to + at, paired.weights, {column0 + block * 64, 0, 0, group}, full);
      copier.end_by_engine();
      group = find_group(stage + 1);
    }
  });
}

/// Two rows of y, `row` and eight further, from the sums of this thread, beginning at a column.
template <class T>
__device__ __forceinline__ void store_rows(const moefy_experts_tiled_params& p, const TokenTile& tile, uint32_t row,
                                           uint32_t column0, uint32_t across, const float (&c)[2][64]) {
  const moefy_neurons& n = p.neurons;
  const uint32_t t = threadIdx.x % 4;
  // The rows of two quads, of which a line of 128 bytes each is stored at once.
  const uint32_t first = row & ~1u;
  T* to[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t own = first + i / 2 * 8 + i % 2;
    const uint32_t token = own < tile.num_tokens ? p.token_ids[tile.first_token + own] : 0;
    to[i / 2][i % 2] = static_cast<T*>(p.y) + token * n.d_model;
  }
#pragma unroll 1
  for (uint32_t group = 0; group * 64 < across; ++group) {
    float sums[32];
    take_sums<32>(sums, c, group, 0);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const uint32_t column = column0 + group * 64 + i * 2 + 2 * t;
      if (n.b_out == nullptr || column >= n.d_model) break;
      const float bias[2] = {n.b_out[column], n.b_out[column + 1]};
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i + j] += bias[j % 2];
    }
    const uint32_t column = column0 + group * 64 + threadIdx.x % 8 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 eights[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* both = sums + (part * 4 + i) * 4 + 2 * half;
          words[i] = pack_two<T>(both[0], both[1]);
        }
        eights[part] = transpose_quad(words);
      }
      exchange_halves(eights[0], eights[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t own = first + half * 8 + i;
        if (own >= tile.num_tokens || column >= n.d_model) continue;
        const uint4 zeros = {};
        *reinterpret_cast<uint4*>(to[half][i] + column) = own < tile.num_valid ? eights[i] : zeros;
      }
    }
  }
}

template <class T, bool kPaired>
__device__ __forceinline__ void multiply_items(const moefy_experts_tiled_params& p, const Items& items, uint32_t memory,
                                               const Pipeline<kTileStages, kPaired>& pipeline) {
  const uint32_t row = row_of_sums(), group_token = row / 64 * 64;
  Multiplier<kTileStages, kPaired> multiplier(pipeline);
  for_each_item<kPaired>(p, items, [&](const TokenTile& tile, uint32_t across, uint32_t column0) {
    const uint32_t num_stages = ceil_div(tile.num_neurons, kDepth);
    const bool has_tokens = group_token < tile.num_tokens;
    float c[2][64];
    multiply_item<T, true>(c, across, multiplier, memory, num_stages, has_tokens);
    if (has_tokens) store_rows<T>(p, tile, row, column0, across, c);
  });
}

/// Of an item: its stages, and what it takes to begin and to store, as so many more.
__device__ __forceinline__ uint32_t steps_of(uint32_t neurons) { return ceil_div(neurons, kDepth) + 2; }

/// What an item costs: copies.
__device__ __forceinline__ uint32_t cost(uint32_t steps, uint32_t across) { return steps * (kTokens + across); }

/// About how long it takes if every item goes that far across: the share of all of it, or, round after round, as many as there
/// are rounds of at least the size of the last one's first.
__device__ __forceinline__ uint32_t estimate(const Items& items, uint32_t all_steps, uint32_t d_model, uint32_t across) {
  const uint32_t of_tile = ceil_div(d_model, across) * items.halves, takers = items.num_takers;
  uint32_t longest = cost(all_steps, across) * of_tile / takers;
  for (uint32_t round = 0; round * takers < of_tile * items.num_tiles; ++round) {
    longest = max(longest, (round + 1) * cost(steps_of(items.neurons[round * takers / of_tile]), across));
  }
  return longest;
}

/// How far an item goes across of a tile with so many neurons; all lanes of a warp call, with all tiles.
__device__ __forceinline__ uint32_t across_of(const Items& items, uint32_t d_model, uint32_t neurons) {
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t all_steps = __reduce_add_sync(kAll, steps_of(neurons));
  // Each lane looks at one of four; of the same, the widest is the best.
  const uint32_t mine = kMostAcross - threadIdx.x % 4 * 64;
  const uint32_t longest = estimate(items, all_steps, d_model, mine), least = __reduce_min_sync(kAll, longest);
  const uint32_t best = __reduce_max_sync(kAll, longest == least ? mine : 0);
  // What is not among the deepest may go further.
  uint32_t across = kMostAcross;
  while (across > best && cost(steps_of(neurons), across) > least / 2) across -= 64;
  return across;
}

template <bool kPaired>
__device__ __forceinline__ void find_items_of(const moefy_experts_tiled_params& p, Items& items) {
  const uint32_t d_model = p.neurons.d_model;
  const auto columns = [&](uint32_t) { return d_model; };
  find_items<kPaired>(p, items, columns,
                      [&](const Items& items, uint32_t neurons) { return across_of(items, d_model, neurons); });
}

template <class T>
__device__ __forceinline__ void tiled_output(const moefy_experts_tiled_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages> pipeline;
  begin();
  find_items_of<false>(p, items);
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_items<T>(p, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p, items, shared_address(memory), pipeline);
  }
}

template <class T>
__device__ __forceinline__ void tiled_output(const moefy_experts_tiled_paired_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Items items;
  const Pipeline<kTileStages, true> pipeline(1);
  begin();
  find_items_of<true>(p.experts, items);
  if (threadIdx.x < kCopiers) {
    become_copier();
    if (threadIdx.x < 32) copy_items(p, items, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_items<T>(p.experts, items, shared_address(memory), pipeline);
  }
  __syncwarp();
  // The other block may still write here.
  sync_cluster();
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB.
#define MOEFY_EXPERTS_TILED_OUTPUT(name, type)                                                       \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                           \
      moefy_experts_tiled_output_##name(const __grid_constant__ moefy_experts_tiled_params p) {      \
    moefy::tiled_output<type>(p);                                                                    \
  }                                                                                                  \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(moefy::kPipelineThreads, 1) \
      moefy_experts_tiled_paired_output_##name(                                                      \
          const __grid_constant__ moefy_experts_tiled_paired_params p) {                             \
    moefy::tiled_output<type>(p);                                                                    \
  }

MOEFY_EXPERTS_TILED_OUTPUT(f16, __half)
MOEFY_EXPERTS_TILED_OUTPUT(bf16, __nv_bfloat16)
