// The activations phi, and rounding to an element.
#pragma once

#include "element.cuh"

namespace moefy {

/// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float activate(uint32_t activation, float z) {
  switch (activation) {
    case MOEFY_RELU:
      return fmaxf(z, 0.0f);
    case MOEFY_GELU:
      return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case MOEFY_GELU_TANH: {
      const float inner = 0.79788456080286536f * (z + 0.044715f * z * z * z);
      return 0.5f * z * (1.0f + tanhf(inner));
    }
    case MOEFY_SILU:
      return z / (1.0f + expf(-z));
    default:
      return z;
  }
}

}  // namespace moefy
