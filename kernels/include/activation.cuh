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

/// Eight elements to a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void store_eight(T* to, const float (&values)[8]) {
  T elements[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) elements[i] = from_float<T>(values[i]);
  uint4 vectors[sizeof(T) / 2];
  memcpy(vectors, elements, sizeof(vectors));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 2); ++i) reinterpret_cast<uint4*>(to)[i] = vectors[i];
}

constexpr float kLog2E = 1.4426950408889634f;

/// 2^z and 1 / z by the fast units, where the result is rounded to 16 bits anyway: their error is near 1e-7. Without steps for
/// what is below 2^-126, which becomes 0.
__device__ __forceinline__ float fast_exp2(float z) {
  float v;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(z));
  return v;
}

__device__ __forceinline__ float fast_reciprocal(float z) {
  float v;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(z));
  return v;
}

/// z times the normal distribution's share below z. For 16 bits by Abramowitz & Stegun 7.1.26, whose erf is off by at most
/// 1.5e-7: with u = |z| / sqrt 2 and t = 1 / (1 + p u), 1 - erf u = (a1 t + .. + a5 t^5) exp(-u^2).
template <class T>
__device__ __forceinline__ float gelu(float z) {
  if constexpr (sizeof(T) == 4) return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
  const float size = fabsf(z);
  const float t = fast_reciprocal(fmaf(size, 0.3275911f * 0.70710678118654752f, 1.0f));
  // Coefficients of half of it.
  float tail = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
  tail = fmaf(t, tail, 0.5f * 1.421413741f);
  tail = fmaf(t, tail, 0.5f * -0.284496736f);
  tail = fmaf(t, tail, 0.5f * 0.254829592f) * t * fast_exp2(-0.5f * kLog2E * z * z);
  return fmaf(-size, tail, fmaxf(z, 0.0f));
}

/// phi(z), for a result of type T.
template <class T>
__device__ __forceinline__ float activate(uint32_t activation, float z) {
  switch (activation) {
    case MOEFY_RELU:
      return fmaxf(z, 0.0f);
    case MOEFY_GELU:
      return gelu<T>(z);
    case MOEFY_GELU_TANH: {
      // u = c (z + 0.044715 z^3), c = sqrt(2 / pi); (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
      constexpr float kScale = 0.79788456080286536f;
      if constexpr (sizeof(T) == 4) return 0.5f * z * (1.0f + tanhf(kScale * (z + 0.044715f * z * z * z)));
      constexpr float kExponent = -2.0f * kScale * kLog2E;
      return z * fast_reciprocal(1.0f + fast_exp2(z * fmaf(0.044715f * kExponent, z * z, kExponent)));
    }
    case MOEFY_SILU:
      if constexpr (sizeof(T) == 4) return z / (1.0f + expf(-z));
      return z * fast_reciprocal(1.0f + fast_exp2(-kLog2E * z));
    default:
      return z;
  }
}

template <moefy_activation kActivation>
struct KnownActivation {
  static constexpr moefy_activation value = kActivation;
};

/// Calls with the activation as a constant: so that values which are computed beside each other do not branch one by one.
template <class Function>
__device__ __forceinline__ void with_activation(moefy_activation activation, const Function& call) {
  switch (activation) {
    case MOEFY_RELU:
      return call(KnownActivation<MOEFY_RELU>());
    case MOEFY_GELU:
      return call(KnownActivation<MOEFY_GELU>());
    case MOEFY_GELU_TANH:
      return call(KnownActivation<MOEFY_GELU_TANH>());
    case MOEFY_SILU:
      return call(KnownActivation<MOEFY_SILU>());
    default:
      return call(KnownActivation<MOEFY_IDENTITY>());
  }
}

}  // namespace moefy
