// Lanes of a warp, and warps of a block.
#pragma once

#include <stdint.h>

namespace moefy {

constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % 32; }

// Inclusive, within the warp.
__device__ __forceinline__ uint32_t prefix_sum(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, distance);
    value += lane_id() >= uint32_t(distance) ? before : 0;
  }
  return value;
}

// The warps of a block. Reductions are integer, so their order does not matter.
template <int kWarps>
struct Team {
  __device__ __forceinline__ uint32_t sum(uint32_t value) const {
    const uint32_t* values = share(__reduce_add_sync(kFullWarp, value));
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += values[w];
    return total;
  }

  // Sum of a value that is uniform in each warp, over the warps before this one.
  __device__ __forceinline__ uint32_t sum_of_warps_before(uint32_t value) const {
    const uint32_t* values = share(value);
    uint32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += w < int(threadIdx.x / 32) ? values[w] : 0;
    return total;
  }

 private:
  // One value per warp, seen by all.
  __device__ __forceinline__ const uint32_t* share(uint32_t value) const {
    __shared__ uint32_t values[kWarps];
    __syncthreads();  // the last use is over
    if (lane_id() == 0) values[threadIdx.x / 32] = value;
    __syncthreads();
    return values;
  }
};

}  // namespace moefy
