// How fast memory can be read: every word once, and next to nothing written.

#include <stdint.h>

#include "dependency.cuh"
#include "moefy_abi.h"

constexpr uint32_t kLoadsInFlight = 8;  // of 16 bytes, per thread

extern "C" __global__ void __launch_bounds__(512) moefy_read_bandwidth(
    const __grid_constant__ moefy_read_bandwidth_params p) {
  moefy::begin();
  const uint4* __restrict__ vectors = static_cast<const uint4*>(p.data);
  const uint64_t num_vectors = p.data_bytes / sizeof(uint4);
  const uint64_t num_threads = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  uint32_t folded = 0;
  for (uint64_t i = thread; i < num_vectors; i += num_threads * kLoadsInFlight) {
    uint4 loaded[kLoadsInFlight];
#pragma unroll
    for (uint32_t n = 0; n < kLoadsInFlight; ++n) {
      const uint64_t at = i + n * num_threads;
      loaded[n] = at < num_vectors ? __ldcs(vectors + at) : uint4{};
    }
#pragma unroll
    for (uint32_t n = 0; n < kLoadsInFlight; ++n) {
      folded ^= loaded[n].x ^ loaded[n].y ^ loaded[n].z ^ loaded[n].w;
    }
  }
  p.folded[thread] = folded;  // so that the loads are not left out
}
