// Hopper: rows of sums of a warpgroup's products to memory, whole lines of 128 bytes at once.
#pragma once

#include "expert_groups.cuh"

namespace moefy {

/// Two quads of lanes that follow each other have the first and the second half of 128 bytes, each of its own row: then both
/// have the row of the first in `first`, that of the second in `second`.
__device__ __forceinline__ void exchange_halves(uint4& first, uint4& second) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool odd = threadIdx.x & 4;
  const uint4 mine = odd ? first : second;
  const uint4 given = {__shfl_xor_sync(kAll, mine.x, 4), __shfl_xor_sync(kAll, mine.y, 4),
                       __shfl_xor_sync(kAll, mine.z, 4), __shfl_xor_sync(kAll, mine.w, 4)};
  if (odd) {
    first = given;
  } else {
    second = given;
  }
}

/// Stores a warp's 16 rows of `kBlocks` blocks of 8 columns, as `wgmma` leaves them. `pair(block, half)` gives the two values
/// of this lane in its row (`half` 0) or eight further (1); `to(row)` gives where row `row` begins, or null for a row that is
/// not stored. Columns from `num_columns` on are not stored.
template <class T, int kBlocks, class Pair, class To>
__device__ __forceinline__ void store_lines(uint32_t num_columns, const Pair& pair, const To& to) {
  static_assert(kBlocks % 8 == 0, "lines of 64 columns");
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = half * 8 + lane / 8 * 2;
    T* const rows[2] = {to(row), to(row + 1)};
#pragma unroll
    for (int j = 0; j < kBlocks; j += 8) {
      uint4 eights[2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 both = pair(j + part * 4 + i, half);
          words[i] = pack_two<T>(both.x, both.y);
        }
        eights[part] = transpose_quad(words);
      }
      exchange_halves(eights[0], eights[1]);
      const uint32_t column = (j + lane % 8) * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (rows[i] != nullptr && column < num_columns) *reinterpret_cast<uint4*>(rows[i] + column) = eights[i];
      }
    }
  }
}

}  // namespace moefy
