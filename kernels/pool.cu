// The op `pool`: the mean of each sequence's tokens, scaled to unit length. A block a sequence.
#include "activation.cuh"
#include "dependency.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ float sum_of_block(float value) {
  __shared__ float sums[kThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.0f;
  for (uint32_t w = 0; w < kThreads / 32; ++w) value += sums[w];
  return value;
}

/// Dynamic shared memory: d_model floats.
template <class T>
__device__ __forceinline__ void pool(const moefy_pool_params& p) {
  extern __shared__ __align__(16) float means[];
  const uint32_t width = p.d_model;
  begin();
  const uint32_t begin = p.sequence_offsets[blockIdx.x], end = p.sequence_offsets[blockIdx.x + 1];
  const float of_each = end > begin ? 1.0f / (end - begin) : 0.0f;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x * 8; i < width; i += kThreads * 8) {
    float sum[8] = {};
#pragma unroll 4
    for (uint32_t token = begin; token < end; ++token) {
      float values[8];
      Eight<T> loaded;
      loaded.load_fresh(static_cast<const T*>(p.x) + static_cast<uint64_t>(token) * width, i, width);
      loaded.to_floats(values);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += values[k];
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sum[k] *= of_each;
      squares = fmaf(sum[k], sum[k], squares);
      means[i + k] = sum[k];
    }
  }
  const float length = fmaxf(sqrtf(sum_of_block(squares)), 1e-12f);
  T* y = static_cast<T*>(p.y) + static_cast<uint64_t>(blockIdx.x) * width;
  for (uint32_t i = threadIdx.x; i < width; i += kThreads) y[i] = from_float<T>(means[i] / length);
}

}  // namespace
}  // namespace moefy

#define MOEFY_POOL(name, type)                                         \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)     \
      moefy_pool_##name(const __grid_constant__ moefy_pool_params p) { \
    moefy::pool<type>(p);                                              \
  }

MOEFY_POOL(f32, float)
MOEFY_POOL(f16, __half)
MOEFY_POOL(bf16, __nv_bfloat16)
