// The op `experts` for many tokens, first product: h of every (expert, token) pair, expert by expert.
//
// A persistent grid takes tiles of 128 tokens of one expert by kRows input rows of it. Token rows are gathered by
// asynchronous copies straight from x.
#include "expert_groups.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kTokens = 128;
constexpr int kRowBytes = 128;  // of d_model in one stage
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr int kRowsPerPass = kThreads / kChunks;

/// So that two blocks fit a multiprocessor.
template <int kRows>
constexpr int kStages = kRows == 128 ? 3 : 4;

template <int kRows>
constexpr int kStageBytes = (kTokens + kRows) * kRowBytes;

/// How eight warps share a tile.
template <int kRows>
struct WarpTile {
  static constexpr int kWarpsAcross = kRows >= 64 ? 2 : 1;
  static constexpr int kWarpsDown = 8 / kWarpsAcross;
  static constexpr int kDown = kTokens / kWarpsDown / 16;   // fragments of 16 tokens
  static constexpr int kAcross = kRows / kWarpsAcross / 8;  // fragments of 8 rows
};

/// Adds the products of one 32-byte step of the stage's tiles.
template <class T, int kDown, int kAcross>
__device__ __forceinline__ void multiply(float (&c)[kDown][kAcross][4], uint32_t x, uint32_t w, int token0, int row0,
                                         int step) {
  const int lane = threadIdx.x % 32;
  uint32_t a[kDown][4];
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    load_matrices(a[i], x + swizzled<kRowBytes>(token0 + i * 16 + lane % 16, step * 2 + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < kAcross; j += 2) {
    uint32_t b[4];
    load_matrices(b, w + swizzled<kRowBytes>(row0 + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      mma(c[i][j], a[i], b[0], b[1], T());
      mma(c[i][j + 1], a[i], b[2], b[3], T());
    }
  }
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

template <int kDown, int kAcross>
__device__ __forceinline__ void multiply_f32(float (&c)[kDown][kAcross][4], uint32_t x, uint32_t w, int token0,
                                             int row0, int step) {
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int chunk = step * 2; chunk < step * 2 + 2; ++chunk) {
    float4 a[kDown][2];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      a[i][0] = load_shared(x + swizzled<kRowBytes>(token0 + i * 16 + g, chunk));
      a[i][1] = load_shared(x + swizzled<kRowBytes>(token0 + i * 16 + g + 8, chunk));
    }
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const float4 b[2] = {load_shared(w + swizzled<kRowBytes>(row0 + j * 8 + 2 * t, chunk)),
                           load_shared(w + swizzled<kRowBytes>(row0 + j * 8 + 2 * t + 1, chunk))};
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) c[i][j][r] = dot(a[i][r / 2], b[r % 2], c[i][j][r]);
      }
    }
  }
}

template <class T, int kRows>
__device__ void hidden_tile(const moefy_experts_params& p, const Group& group, RowRange tokens, uint32_t row0,
                            uint32_t memory) {
  using Tile = WarpTile<kRows>;
  constexpr int kVector = kChunkBytes / sizeof(T);
  constexpr int kTokenPasses = kTokens / kRowsPerPass;
  constexpr int kRowPasses = kRows / kRowsPerPass;
  const moefy_neurons& n = p.neurons;
  const int chunk = threadIdx.x % kChunks;
  const int pass_row = threadIdx.x / kChunks;

  // Rows that this thread copies its chunk of.
  uint32_t x[kTokenPasses];
#pragma unroll
  for (int i = 0; i < kTokenPasses; ++i) {
    const uint32_t row = pass_row + i * kRowsPerPass;
    x[i] = row < tokens.count ? token_of(p, group, tokens.begin + row) : kNoRow;
  }
  // Each pair is found again by its token and expert.
  if (row0 == 0 && group.expert != kNoExpert && threadIdx.x < tokens.count) {
    const uint64_t token = token_of(p, group, tokens.begin + threadIdx.x);
    p.pair_rows[token * n.num_experts + group.expert] = tokens.begin + threadIdx.x;
  }
  uint32_t w[kRowPasses];
#pragma unroll
  for (int i = 0; i < kRowPasses; ++i) w[i] = weight_row(n, group, row0 + pass_row + i * kRowsPerPass);
  const auto copy_row = [&](uint32_t to, const void* matrix, uint32_t row, uint64_t k) {
    const bool valid = row != kNoRow && k < n.d_model;
    copy_async(to, static_cast<const T*>(matrix) + (valid ? row * n.d_model + k : 0), valid);
  };
  const auto load = [&](uint32_t stage) {
    const uint64_t k = (stage * kChunks + chunk) * kVector;
    const uint32_t to = memory + stage % kStages<kRows> * kStageBytes<kRows>;
#pragma unroll
    for (int i = 0; i < kTokenPasses; ++i) {
      copy_row(to + swizzled<kRowBytes>(pass_row + i * kRowsPerPass, chunk), p.x, x[i], k);
    }
#pragma unroll
    for (int i = 0; i < kRowPasses; ++i) {
      copy_row(to + swizzled<kRowBytes>(kTokens + pass_row + i * kRowsPerPass, chunk), n.w_in, w[i], k);
    }
  };

  const int warp = threadIdx.x / 32;
  const int warp_token = warp / Tile::kWarpsAcross * Tile::kDown * 16;
  const int warp_row = warp % Tile::kWarpsAcross * Tile::kAcross * 8;
  const uint32_t num_stages = (n.d_model + kChunks * kVector - 1) / (kChunks * kVector);
  float c[Tile::kDown][Tile::kAcross][4] = {};
#pragma unroll
  for (uint32_t stage = 0; stage < kStages<kRows> - 1; ++stage) {
    if (stage < num_stages) load(stage);
    copy_async_commit();
  }
  for (uint32_t stage = 0; stage < num_stages; ++stage) {
    copy_async_wait<kStages<kRows> - 2>();
    __syncthreads();
    if (stage + kStages<kRows> - 1 < num_stages) load(stage + kStages<kRows> - 1);
    copy_async_commit();
    const uint32_t from = memory + stage % kStages<kRows> * kStageBytes<kRows>;
    if (warp_token >= tokens.count) continue;
#pragma unroll(kRows == 128 ? 1 : kChunks / 2)  // more would spill
    for (int step = 0; step < kChunks / 2; ++step) {
      if constexpr (sizeof(T) == 4) {
        multiply_f32(c, from, from + kTokens * kRowBytes, warp_token, warp_row, step);
      } else {
        multiply<T>(c, from, from + kTokens * kRowBytes, warp_token, warp_row, step);
      }
    }
  }

  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < Tile::kDown; ++i) {
    float sums[Tile::kAcross * 4];
#pragma unroll
    for (int j = 0; j < Tile::kAcross * 4; ++j) sums[j] = c[i][j / 4][j % 4];
    store_hidden<T>(p, group, tokens, warp_token + i * 16 + g, row0 + warp_row, sums);
  }
  __syncthreads();  // The next tile writes over the stages.
}

template <class T, int kRows>
__device__ __forceinline__ void many_hidden(const moefy_experts_params& p) {
  extern __shared__ __align__(128) unsigned char memory[];
  uint32_t* tile_offsets = reinterpret_cast<uint32_t*>(memory + kStages<kRows> * kStageBytes<kRows>);
  const uint32_t groups = num_groups(p.neurons);
  wait_for_dependencies();
  launch_dependents();
  count_tiles<kThreads>(p, tile_offsets, [&](const Group& group) {
    return ceil_div(rows_of(p, group).count, kTokens) * ceil_div(group.width * group.halves, kRows);
  });
  for (uint32_t tile = blockIdx.x; tile < tile_offsets[groups]; tile += gridDim.x) {
    const uint32_t index = find_tile(tile_offsets, groups, tile);
    const Group group = find_group(p, index);
    const uint32_t across = ceil_div(group.width * group.halves, kRows);
    const uint32_t inside = tile - tile_offsets[index];
    const uint32_t token0 = inside / across * kTokens;
    const RowRange rows = rows_of(p, group);
    hidden_tile<T, kRows>(p, group, {rows.begin + token0, min(rows.count - token0, kTokens)}, inside % across * kRows,
                          shared_address(memory));
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_EXPERTS_MANY_HIDDEN(name, type, rows)                                               \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 2)                                \
      moefy_experts_many_hidden_##name##_##rows(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_hidden<type, rows>(p);                                                            \
  }

MOEFY_EXPERTS_MANY_HIDDEN(f32, float, 64)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 32)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 64)
MOEFY_EXPERTS_MANY_HIDDEN(f16, __half, 128)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 32)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 64)
MOEFY_EXPERTS_MANY_HIDDEN(bf16, __nv_bfloat16, 128)
