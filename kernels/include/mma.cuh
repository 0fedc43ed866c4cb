// A warp's matrix products. Everything is in terms of the fragments of mma.m16n8k16: with
// g = lane / 4 and t = lane % 4 a lane holds c[0], c[1] = C[g][2t, 2t+1], c[2], c[3] the same of
// row g + 8. f32 has no tensor core without tf32, so its twins keep the layout and use FFMA.
#pragma once

#include "activation.cuh"
#include "memory.cuh"

namespace moefy {

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8x8 matrices of 2-byte elements; lane 8i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ float dot(float4 a, float4 b, float c) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, c))));
}

__device__ __forceinline__ float4 as_float4(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ __forceinline__ float4 shuffle(float4 v, int lane) {
  constexpr unsigned kAll = 0xffffffffu;
  return make_float4(__shfl_sync(kAll, v.x, lane), __shfl_sync(kAll, v.y, lane), __shfl_sync(kAll, v.z, lane),
                     __shfl_sync(kAll, v.w, lane));
}

/// Sum over the four lanes of a quad; every lane gets it.
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/// v[i] for a run-time i without local memory.
template <int kSize>
__device__ __forceinline__ float pick(const float (&v)[kSize], int i) {
  float result = v[0];
#pragma unroll
  for (int j = 1; j < kSize; ++j) result = i == j ? v[j] : result;
  return result;
}

/// The four lanes of a row of a fragment have a word each of four blocks of eight columns: then each has one block.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&words)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t t = threadIdx.x % 4;
  // First the two of each half, then the halves.
  uint32_t halves[4], out[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t given = __shfl_xor_sync(kAll, t & 1 ? words[2 * i] : words[2 * i + 1], 1);
    halves[2 * i] = t & 1 ? given : words[2 * i];
    halves[2 * i + 1] = t & 1 ? words[2 * i + 1] : given;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t given = __shfl_xor_sync(kAll, t & 2 ? halves[i] : halves[2 + i], 2);
    out[i] = t & 2 ? given : halves[i];
    out[2 + i] = t & 2 ? halves[2 + i] : given;
  }
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace moefy
