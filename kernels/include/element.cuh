// Elements of weights and activations, read as f32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "memory.cuh"
#include "moefy_abi.h"

namespace moefy {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Eight elements of a row, as they lie in memory: a load that is under way stays so until they are converted.
template <class T>
struct Eight {
  static constexpr int kVectors = sizeof(T) / 2;
  uint4 vectors[kVectors];

  // Elements begin .. begin + 8 of a row of `width`, zero beyond its end. `kAligned`: the width is a multiple of 8 and
  // the row begins at a multiple of 16 bytes.
  template <bool kAligned>
  __device__ __forceinline__ void load(const T* __restrict__ row, uint32_t begin, uint32_t width) {
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        vectors[i] = load_vector_if(begin < width, reinterpret_cast<const uint4*>(row + begin) + i);
      }
    } else {
      T elements[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) elements[i] = begin + i < width ? row[begin + i] : T(0.0f);
      memcpy(vectors, elements, sizeof(vectors));
    }
  }

  // The same from what another kernel wrote a moment ago. Aligned.
  __device__ __forceinline__ void load_fresh(const T* row, uint32_t begin, uint32_t width) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      vectors[i] = load_fresh_vector_if(begin < width, reinterpret_cast<const uint4*>(row + begin) + i);
    }
  }

  // Eight elements at a multiple of 16 bytes of global or shared memory.
  __device__ __forceinline__ void load_anywhere(const T* from) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = reinterpret_cast<const uint4*>(from)[i];
  }

  __device__ __forceinline__ void to_floats(float (&out)[8]) const {
    T elements[8];
    static_assert(sizeof(elements) == sizeof(vectors), "");
    memcpy(elements, vectors, sizeof(elements));
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(elements[i]);
  }
};

}  // namespace moefy
