// What the kernels of the op `ffn_few` share: a warp's slice of d_model, multiplied with rows in shared memory.
#pragma once

#include "bulk_copy.cuh"
#include "dependency.cuh"
#include "element.cuh"
#include "experts.cuh"
#include "mma.cuh"
#include "team.cuh"

namespace moefy {

namespace few {

constexpr int kThreads = MOEFY_FFN_FEW_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = MOEFY_FFN_FEW_TILE;
constexpr uint32_t kStepColumns = 32;  // of d_model, of one step of a warp
constexpr int kParts = 3;              // numbers of bf16 that make one of f32

/// Bytes from one row to the next in shared memory, 64 more than a multiple of 128: two rows' 64 bytes side by side meet
/// different banks.
__device__ __forceinline__ uint32_t in_row_stride(uint32_t row_bytes) { return (row_bytes + 63) / 128 * 128 + 64; }
/// The same of w_out, 16 more: so do eight rows' 16 bytes.
__device__ __forceinline__ uint32_t out_row_stride(uint32_t row_bytes) { return (row_bytes + 111) / 128 * 128 + 16; }

/// Sums over the columns of each warp: [warp, tile of tokens, row, token].
template <int kTiles>
using Sums = float[kWarps][kTiles][16][kTile];

/// Over all warps.
template <int kTiles>
__device__ __forceinline__ float sum_of_warps(const Sums<kTiles>& sums, uint32_t tile, uint32_t row, uint32_t token) {
  static_assert(kWarps == 8);
  float v[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) v[w] = sums[w][tile][row][token];
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

/// Brings the whole of a kernel's parameters to the constant cache while there is time.
template <class Params>
__device__ __forceinline__ void touch(const Params& p) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&p);
#pragma unroll
  for (uint32_t i = 0; i < sizeof(Params) / 4; i += 16) asm volatile("" ::"r"(words[i]));
}

/// kTiles: tiles of eight tokens. kSteps: steps of 32 columns that a warp owns, at most.
template <class T, int kTiles, int kSteps>
struct Slice {
  using X = uint4[kSteps][kTiles];

  uint32_t d_model;
  uint32_t row_bytes;
  uint32_t first_step;
  uint32_t num_steps;

  __device__ explicit Slice(uint32_t width) : d_model(width), row_bytes(width * sizeof(T)) {
    const uint32_t all = ceil_div(width, kStepColumns), per_warp = ceil_div(all, kWarps);
    first_step = min(threadIdx.x / 32 * per_warp, all);
    num_steps = min(per_warp, all - first_step);
  }

  /// Where the last step reads beyond a row, x is 0, so that what it reads must be a number.
  __device__ void clear_row_end(unsigned char* row) const {
    for (uint32_t k = row_bytes; k < ceil_div(row_bytes, 64) * 64; k += 16) {
      *reinterpret_cast<uint4*>(row + k) = uint4{};
    }
  }

  /// Lane 4g + t takes 16 bytes of token g of every tile: the k of a step in the order in which rows are read too.
  __device__ void load(const void* tokens, uint32_t num_tokens, X& x) const {
    const uint32_t g = lane_id() / 4;
    const uint32_t column = first_step * kStepColumns + lane_id() % 4 * 8;
    const T* from = static_cast<const T*>(tokens) + g * d_model + column;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool inside = i < num_steps && tile * kTile + g < num_tokens && column + i * kStepColumns < d_model;
        x[i][tile] = load_fresh_vector_if(inside, from + tile * kTile * d_model + i * kStepColumns);
      }
    }
  }

  /// Bytes from the warp's first column on, before `end`: as if they could have changed, so that what follows from them is
  /// computed where it is needed instead of filling registers.
  __device__ uint32_t bytes_before(uint32_t end) const {
    uint32_t bytes = end - min(first_step * (kStepColumns * uint32_t(sizeof(T))), end);
    asm volatile("" : "+r"(bytes));
    return bytes;
  }

  /// First byte of a step in a row, from the warp's first on. Beyond the row it is the row's first: x is 0 there, or nobody
  /// stores the columns, and a branch would keep the steps from overlapping.
  static __device__ uint32_t within(uint32_t offset, uint32_t bytes) { return offset < bytes ? offset : 0; }

  /// Products of rows with this warp's columns of the tokens: rows 0 to 7 begin at `low`, 8 to 15 at `high`. Of each eight
  /// there are `rows`; nobody looks at the sums of the others. `kHigh`: whether there is a second eight.
  template <bool kHigh = true>
  __device__ void multiply(uint32_t low, uint32_t high, uint32_t rows, const X& x, Sums<kTiles>& sums) const {
    multiply<kHigh>(low, high, rows, rows, x, sums);
  }

  /// The same where the second eight are fewer.
  template <bool kHigh = true>
  __device__ void multiply(uint32_t low, uint32_t high, uint32_t low_rows, uint32_t high_rows, const X& x,
                           Sums<kTiles>& sums) const {
    constexpr int kChains = 4 / kTiles;  // sums that do not wait for each other
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t bytes = bytes_before((row_bytes + 63) / 64 * 64);
    const uint32_t inside = (bytes > 0 ? first_step * (kStepColumns * uint32_t(sizeof(T))) : 0) + t * 16;
    low += min(g, low_rows - 1) * in_row_stride(row_bytes) + inside;
    high += min(g, high_rows - 1) * in_row_stride(row_bytes) + inside;
    float chains[kTiles][kChains][4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t step = within(i * kStepColumns * sizeof(T), bytes);
      const uint4 a = load_shared_vector(low + step);
      const uint4 b = kHigh ? load_shared_vector(high + step) : uint4{};
      const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma(chains[tile][2 * i % kChains], first, x[i][tile].x, x[i][tile].y, T());
        mma(chains[tile][(2 * i + 1) % kChains], second, x[i][tile].z, x[i][tile].w, T());
      }
    }
    float c[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[tile][j] = chains[tile][0][j];
#pragma unroll
        for (int chain = 1; chain < kChains; ++chain) c[tile][j] += chains[tile][chain][j];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&sums[threadIdx.x / 32][tile][g + half * 8][2 * t]) =
            make_float2(c[tile][2 * half], c[tile][2 * half + 1]);
      }
    }
  }

  /// Adds up the squares of this warp's columns of each token.
  __device__ void square(const X& x, float (&squares)[kWarps][kTiles * kTile]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        Eight<T> values = {{x[step][tile]}};
        float v[8];
        values.to_floats(v);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum = fmaf(v[k], v[k], sum);
      }
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (lane_id() % 4 == 0) squares[threadIdx.x / 32][tile * kTile + lane_id() / 4] = sum;
    }
  }
};

}  // namespace few
}  // namespace moefy
