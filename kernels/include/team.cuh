// The threads that work on one row: a warp, or a block of several warps.
#pragma once

#include <stdint.h>

namespace moefy {

constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % 32; }

// Reductions are integer, so their order does not matter.
template <int kWarps>
struct Team {
  static constexpr int kThreads = kWarps * 32;

  __device__ __forceinline__ uint32_t warp() const { return kWarps == 1 ? 0 : threadIdx.x / 32; }
  __device__ __forceinline__ uint32_t thread() const { return kWarps == 1 ? lane_id() : threadIdx.x; }

  __device__ __forceinline__ void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ uint32_t sum(uint32_t value) const {
    value = __reduce_add_sync(kFullWarp, value);
    if constexpr (kWarps == 1) return value;
    const uint32_t* values = share(value);
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += values[w];
    return total;
  }

  __device__ __forceinline__ uint32_t max(uint32_t value) const {
    value = __reduce_max_sync(kFullWarp, value);
    if constexpr (kWarps == 1) return value;
    const uint32_t* values = share(value);
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = values[w] > largest ? values[w] : largest;
    return largest;
  }

  // Sums of a value that is uniform in each warp: over the warps before this one, and over all.
  __device__ __forceinline__ uint2 sum_before_and_all(uint32_t value) const {
    const uint32_t* values = share(value);
    uint2 sums = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sums.x += w < int(warp()) ? values[w] : 0;
      sums.y += values[w];
    }
    return sums;
  }

  // Sum of a value that is uniform in each warp, over the warps before this one.
  __device__ __forceinline__ uint32_t sum_of_warps_before(uint32_t value) const {
    if constexpr (kWarps == 1) return 0;
    const uint32_t* values = share(value);
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += w < int(warp()) ? values[w] : 0;
    return total;
  }

 private:
  // One value per warp, seen by all.
  __device__ __forceinline__ const uint32_t* share(uint32_t value) const {
    __shared__ uint32_t values[kWarps];
    __syncthreads();  // the last use is over
    if (lane_id() == 0) values[warp()] = value;
    __syncthreads();
    return values;
  }
};

}  // namespace moefy
