// Elements of weights and activations, read as f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "moefy_abi.h"

namespace moefy {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Eight elements that lie next to each other: 16 or 32 bytes, aligned to 16.
template <class T>
struct Eight {
  static constexpr int kVectors = sizeof(T) / 2;
  uint4 vectors[kVectors];

  __device__ __forceinline__ void load(const T* address) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const uint4*>(address)[i];
  }

  __device__ __forceinline__ void to_floats(float (&out)[8]) const {
    T elements[8];
    static_assert(sizeof(elements) == sizeof(vectors), "");
    memcpy(elements, vectors, sizeof(elements));
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(elements[i]);
  }
};

// Elements begin .. begin + 8 of a row of `width`, zero beyond its end. Rows whose width is a multiple of 8 are aligned
// to 16 bytes.
template <class T>
__device__ __forceinline__ void load_eight(const T* __restrict__ row, uint32_t begin, uint32_t width, float (&out)[8]) {
  if (width % 8 == 0) {
    Eight<T> eight{};
    if (begin < width) eight.load(row + begin);
    eight.to_floats(out);
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) out[i] = begin + i < width ? to_float(row[begin + i]) : 0.0f;
}

}  // namespace moefy
