// The op `experts` for many tokens, first product, on Hopper: h of every (expert, token) pair, expert by expert.
//
// A persistent grid takes tiles of 128 tokens of one expert by kRows input rows of it. One warpgroup copies: token rows are
// gathered straight from x. The other two multiply 64 tokens each, and store while the next tile's stages are under way.
// kEngine: the copy engine brings the weights. For that the neurons of an expert are a multiple of eight, and there are no
// linear ones.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kTokens = 128;
constexpr int kRowBytes = 128;  // of d_model in one stage
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;

/// What fits shared memory beside the lists.
template <int kRows>
constexpr int kStages = kRows == 256 ? 4 : kRows == 128 ? 6 : 8;

template <int kRows>
constexpr int kStageBytes = (kTokens + kRows) * kRowBytes;

/// A tile: which tokens of a group, and which of its rows.
struct Tile {
  Group group;
  RowRange tokens;
  uint32_t row0;
};

/// Tiles of a group have as equal numbers of tokens as they can: a round of tiles takes as long as its largest.
template <int kRows>
__device__ __forceinline__ Tile tile_of(const moefy_experts_params& p, const uint32_t* tile_offsets, uint32_t tile) {
  const uint32_t index = find_tile(tile_offsets, num_groups(p.neurons), tile);
  Tile found;
  found.group = find_group(p, index);
  const uint32_t across = ceil_div(found.group.width * found.group.halves, kRows);
  const uint32_t inside = tile - tile_offsets[index];
  const RowRange all = rows_of(p, found.group);
  const uint32_t share = ceil_div(all.count, ceil_div(all.count, kTokens)), first = inside / across * share;
  found.tokens = {all.begin + first, min(all.count - first, share)};
  found.row0 = inside % across * kRows;
  return found;
}

template <class T, int kRows, bool kEngine>
__device__ __forceinline__ void copy_tiles(const moefy_experts_params& p, const moefy_tensor_map* w_in,
                                           const uint32_t* tile_offsets, uint32_t memory,
                                           const Pipeline<kStages<kRows>, kEngine>& pipeline) {
  constexpr int kTokenPasses = kTokens / kRowsPerPass, kRowPasses = kEngine ? 0 : kRows / kRowsPerPass;
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x % kCopiers, chunk = thread % kChunks, pass_row = thread / kChunks;
  const uint32_t num_tiles = tile_offsets[num_groups(n)], num_stages = ceil_div(n.d_model, 64);
  Copier<kStages<kRows>, kEngine> copier(pipeline);
  for (uint32_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const Tile tile = tile_of<kRows>(p, tile_offsets, index);
    // Rows that this thread copies its chunk of.
    uint32_t x[kTokenPasses], w[kRowPasses + 1];
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      const uint32_t row = pass_row + i * kRowsPerPass;
      x[i] = row < tile.tokens.count ? token_of(p, tile.group, tile.tokens.begin + row) : kNoRow;
    }
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) w[i] = weight_row(n, tile.group, tile.row0 + pass_row + i * kRowsPerPass);
    // Each pair is found again by its token and expert.
    if (tile.row0 == 0 && tile.group.expert != kNoExpert && thread < tile.tokens.count) {
      const uint64_t token = token_of(p, tile.group, tile.tokens.begin + thread);
      p.pair_rows[token * n.num_experts + tile.group.expert] = tile.tokens.begin + thread;
    }
    const auto copy_row = [&](uint32_t to, const void* matrix, uint32_t row, uint32_t k) {
      const bool valid = row != kNoRow && k < n.d_model;
      copy_async(to, static_cast<const T*>(matrix) + (valid ? row * static_cast<uint64_t>(n.d_model) + k : 0), valid);
    };
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t slot = copier.begin(), to = memory + slot * kStageBytes<kRows>, k = stage * 64 + chunk * 8;
      if (kEngine && thread == 0) {
        const uint32_t group_of_8 = (tile.group.first_neuron + tile.row0 / tile.group.halves) / 8;
        barrier_expect(pipeline.full(slot), kRows * kRowBytes);
        copy_box(to + kTokens * kRowBytes, *w_in, {stage * 64, 0, 0, group_of_8}, pipeline.full(slot));
      }
#pragma unroll
      for (int i = 0; i < kTokenPasses; ++i) {
        copy_row(to + swizzled<kRowBytes>(pass_row + i * kRowsPerPass, chunk), p.x, x[i], k);
      }
#pragma unroll
      for (int i = 0; i < kRowPasses; ++i) {
        copy_row(to + swizzled<kRowBytes>(kTokens + pass_row + i * kRowsPerPass, chunk), n.w_in, w[i], k);
      }
      copier.end();
    }
  }
}

template <class T, int kRows, bool kEngine>
__device__ __forceinline__ void multiply_tiles(const moefy_experts_params& p, const uint32_t* tile_offsets,
                                               uint32_t memory,
                                               const Pipeline<kStages<kRows>, kEngine>& pipeline) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group_token = thread / 128 * 64;
  const uint32_t num_tiles = tile_offsets[num_groups(n)], num_stages = ceil_div(n.d_model, 64);
  Multiplier<kStages<kRows>, kEngine> multiplier(pipeline);
  for (uint32_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const Tile tile = tile_of<kRows>(p, tile_offsets, index);
    const bool has_tokens = group_token < tile.tokens.count;
    float c[kRows / 2];
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      const uint32_t from = memory + multiplier.begin() * kStageBytes<kRows>;
      if (has_tokens) {
        const uint64_t a = operand_of_rows(from + group_token * kRowBytes);
        const uint64_t b = operand_of_rows(from + kTokens * kRowBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma<T, false>(c, a + 2 * step, b + 2 * step, stage > 0 || step > 0);
        wgmma_commit();
      }
      multiplier.end();
    }
    multiplier.finish();
    if (!has_tokens) continue;
    const uint32_t token = group_token + thread % 128 / 32 * 16 + thread % 32 / 4;
    store_hidden<T>(p, tile.group, tile.tokens, token, tile.row0, c);
  }
}

template <class T, int kRows, bool kEngine>
__device__ __forceinline__ void many_hidden(const moefy_experts_params& p, const moefy_tensor_map* w_in) {
  extern __shared__ __align__(1024) unsigned char memory[];
  uint32_t* tile_offsets = reinterpret_cast<uint32_t*>(memory + kStages<kRows> * kStageBytes<kRows>);
  const Pipeline<kStages<kRows>, kEngine> pipeline;
  if (kEngine && threadIdx.x == 0) prefetch_map(*w_in);
  begin_before_many();
  if (is_fused(p)) return;
  count_tiles<kPipelineThreads>(p, tile_offsets, [&](const Group& group) {
    return ceil_div(rows_of(p, group).count, kTokens) * ceil_div(group.width * group.halves, kRows);
  });
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_tiles<T, kRows, kEngine>(p, w_in, tile_offsets, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_tiles<T, kRows, kEngine>(p, tile_offsets, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the stages, and num_experts + 3 words.
#define MOEFY_EXPERTS_MANY_HIDDEN(name, type, rows)                                                    \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                             \
      moefy_experts_many_wide_hidden_##name##_##rows(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_hidden<type, rows, false>(p, nullptr);                                                 \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)   \
      moefy_experts_many_engine_hidden_##name##_##rows(                                                \
          const __grid_constant__ moefy_experts_engine_params p) {                                     \
    moefy::many_hidden<type, rows, true>(p.experts, &p.weights);                                          \
  }

MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 32)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 64)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 128)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 256)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 32)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 64)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 128)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 256)
