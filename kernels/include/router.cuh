// What the kernels of routers share: activations, and the second layer for few tokens.
#pragma once

#include "dependency.cuh"
#include "element.cuh"
#include "team.cuh"

namespace moefy {

__device__ __forceinline__ float activate(moefy_router_activation activation, float z) {
  switch (activation) {
    case MOEFY_ROUTER_ACTIVATION_ABS: return fabsf(z);
    case MOEFY_ROUTER_ACTIVATION_RELU: return fmaxf(z, 0.0f);
    case MOEFY_ROUTER_ACTIVATION_TANH: return tanhf(z);
    default: return 1.0f / (1.0f + expf(-z));
  }
}

__device__ __forceinline__ moefy_router_activation first_activation(moefy_router_kind kind) {
  switch (kind) {
    case MOEFY_ROUTER_LINEAR: return MOEFY_ROUTER_ACTIVATION_ABS;
    case MOEFY_ROUTER_MOEFICATION: return MOEFY_ROUTER_ACTIVATION_TANH;
    default: return MOEFY_ROUTER_ACTIVATION_RELU;
  }
}

__device__ __forceinline__ moefy_router_activation second_activation(moefy_router_kind kind) {
  return kind == MOEFY_ROUTER_D2DMOE ? MOEFY_ROUTER_ACTIVATION_ABS : MOEFY_ROUTER_ACTIVATION_SIGMOID;
}

__device__ __forceinline__ bool has_unit_norm(moefy_router_kind kind) {
  return kind == MOEFY_ROUTER_MOEFICATION || kind == MOEFY_ROUTER_CENTROID;
}

__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  return sum_of_squares > 0 ? 1.0f / sqrtf(sum_of_squares) : 0.0f;
}

/// Outputs of a router's first layer.
__device__ __forceinline__ uint32_t first_width(const moefy_router_select_params& p) {
  return p.w2 == nullptr ? p.num_experts : p.hidden;
}

/// A vector in shared memory, zero up to a multiple of 8.
__host__ __device__ constexpr uint32_t padded(uint32_t width) { return (width + 7) / 8 * 8; }

/// The second layer in a block of 256 threads, four of which share the dot product of an expert, for up to 64 * kRounds
/// experts. Most weights are held in registers: they can be loaded before the inputs are there.
template <bool kAligned, class T, int kRounds>
struct SecondLayer {
  static constexpr uint32_t kQuads = 64;
  static constexpr int kHeld = kRounds * sizeof(T) > 16 ? 1 : kRounds > 2 ? 2 : 4;  // more would spill
  Eight<T> held[kRounds][kHeld];

  static __device__ __forceinline__ uint32_t expert(int round) { return threadIdx.x / 4 + round * kQuads; }
  static __device__ __forceinline__ uint32_t input(int chunk) { return (threadIdx.x % 4 + chunk * 4) * 8; }

  static __device__ __forceinline__ const T* row(const moefy_router_select_params& p, int round) {
    return static_cast<const T*>(p.w2) + static_cast<uint64_t>(min(expert(round), p.num_experts - 1)) * p.hidden;
  }

  __device__ __forceinline__ void load(const moefy_router_select_params& p) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) held[round][i].template load<kAligned>(row(p, round), input(i), p.hidden);
      for (int i = kHeld; input(i) < p.hidden; i += 2) prefetch(row(p, round) + input(i));
    }
  }

  static __device__ __forceinline__ float dot(const Eight<T>& weights, const float* in, uint32_t k, uint32_t width) {
    if (k >= width) return 0.0f;
    float w[8];
    weights.to_floats(w);
    const float4 low = *reinterpret_cast<const float4*>(in + k);
    const float4 high = *reinterpret_cast<const float4*>(in + k + 4);
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(w[i], values[i], sum);
    return sum;
  }

  /// Scores of one token, from its `in` in shared memory.
  __device__ __forceinline__ void run(const moefy_router_select_params& p, const float* in, float* scores) const {
    float sums[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      sums[round] = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) sums[round] += dot(held[round][i], in, input(i), p.hidden);
    }
#pragma unroll 1
    for (int i = kHeld; input(i) < p.hidden; ++i) {
      Eight<T> weights[kRounds];
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        weights[round].template load<kAligned>(row(p, round), input(i), p.hidden);
      }
#pragma unroll
      for (int round = 0; round < kRounds; ++round) sums[round] += dot(weights[round], in, input(i), p.hidden);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      sums[round] += __shfl_xor_sync(kFullWarp, sums[round], 1);
      sums[round] += __shfl_xor_sync(kFullWarp, sums[round], 2);
      if (threadIdx.x % 4 == 0 && expert(round) < p.num_experts) {
        scores[expert(round)] = activate(second_activation(p.kind), sums[round]);
      }
    }
  }
};

}  // namespace moefy
