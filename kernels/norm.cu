// The op `norm`: x <- norm(x + branch), layer norm or RMS norm. A token stays in registers between the two passes over it:
// with one warp a token up to 1024 wide, with a block up to 8192.
#include "activation.cuh"
#include "dependency.cuh"

namespace moefy {
namespace {

constexpr int kVectors = 4;  // eights of a thread

template <int kWarps>
__device__ __forceinline__ float sum_of_token(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if constexpr (kWarps > 1) {
    __shared__ float sums[kWarps];
    __syncthreads();  // the last use is over
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += sums[w];
  }
  return value;
}

/// kWarps: of a token.
template <class T, int kWarps>
__device__ __forceinline__ void norm(const moefy_norm_params& p) {
  constexpr uint32_t kThreads = kWarps * 32;
  const uint32_t token = blockIdx.x * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  const uint32_t thread = threadIdx.x % kThreads, width = p.d_model;
  begin();
  if (token >= p.num_tokens) return;
  T* x = static_cast<T*>(p.x) + static_cast<uint64_t>(token) * width;
  const T* branch = static_cast<const T*>(p.branch) + static_cast<uint64_t>(token) * width;
  float values[kVectors][8];
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t at = (v * kThreads + thread) * 8;
    Eight<T> loaded;
    loaded.load_fresh(x, at, width);
    loaded.to_floats(values[v]);
    if (p.branch != nullptr) {
      float other[8];
      loaded.load_fresh(branch, at, width);
      loaded.to_floats(other);
#pragma unroll
      for (int k = 0; k < 8; ++k) values[v][k] += other[k];
    }
    if (p.residual != nullptr && at < width) {
      store_eight(static_cast<T*>(p.residual) + static_cast<uint64_t>(token) * width + at, values[v]);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += values[v][k];  // zeros beyond the width
  }
  const float mean = p.is_rms ? 0.0f : sum_of_token<kWarps>(sum) / width;
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const bool inside = (v * kThreads + thread) * 8 < width;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float centred = inside ? values[v][k] - mean : 0.0f;
      squares = fmaf(centred, centred, squares);
    }
  }
  const float scale = rsqrtf(sum_of_token<kWarps>(squares) / width + p.epsilon);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint32_t at = (v * kThreads + thread) * 8;
    if (at >= width) break;
    float weight[8], bias[8] = {};
    Eight<T> loaded;
    loaded.template load<true>(static_cast<const T*>(p.weight), at, width);
    loaded.to_floats(weight);
    if (p.bias != nullptr) {
      loaded.template load<true>(static_cast<const T*>(p.bias), at, width);
      loaded.to_floats(bias);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) values[v][k] = fmaf((values[v][k] - mean) * scale, weight[k], bias[k]);
    store_eight(x + at, values[v]);
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_NORM(name, type, warps)                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                   \
      moefy_norm_##name##_##warps(const __grid_constant__ moefy_norm_params p) {      \
    moefy::norm<type, warps>(p);                                                      \
  }

MOEFY_NORM(f32, float, 1)
MOEFY_NORM(f32, float, 8)
MOEFY_NORM(f16, __half, 1)
MOEFY_NORM(f16, __half, 8)
MOEFY_NORM(bf16, __nv_bfloat16, 1)
MOEFY_NORM(bf16, __nv_bfloat16, 8)
