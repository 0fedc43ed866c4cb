// What the kernels of the op `attention` share. Scores and outputs lie in fragments: a warp has 16 queries, a lane those of
// lane / 4 and 8 further, of every eight keys or columns the two at lane % 4 * 2.
#pragma once

#include "experts.cuh"
#include "mma.cuh"

namespace moefy {

constexpr unsigned kAll = 0xffffffffu;

/// What a block works on.
struct Place {
  uint32_t begin;   // first token of the sequence
  uint32_t length;  // of the sequence
  uint32_t query0;  // first query, within the sequence
  uint32_t head;

  __device__ Place(const moefy_attention_params& p, uint32_t queries) {
    begin = p.sequence_offsets[blockIdx.z];
    length = p.sequence_offsets[blockIdx.z + 1] - begin;
    query0 = blockIdx.x * queries;
    head = blockIdx.y;
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// Whether keys before `end` can be such that a query from `query0` on must not see them.
__device__ __forceinline__ bool hides_keys(const moefy_attention_params& p, const Place& place, uint32_t end,
                                           uint32_t query0) {
  return end > (p.is_causal ? min(query0, place.length) : place.length);
}

/// Scores of keys that a query must not see become -infinity.
template <int kAcross>
__device__ __forceinline__ void hide_keys(const moefy_attention_params& p, const Place& place, uint32_t key0,
                                          uint32_t query0, float (&scores)[kAcross][4]) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kAcross; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = key0 + n * 8 + 2 * (lane % 4) + i % 2, query = query0 + lane / 4 + i / 2 * 8;
      const bool sees = key < place.length && (!p.is_causal || key <= query);
      if (!sees) scores[n][i] = -INFINITY;
    }
  }
}

/// One step of a softmax over tiles of keys: scores become weights, and what was summed before is scaled to the new largest
/// score. The first tile has key 0, which every query sees, so that there is a largest one.
template <int kAcross, int kOut>
__device__ __forceinline__ void soften(float (&scores)[kAcross][4], float (&out)[kOut][4], float (&largest)[2],
                                       float (&sums)[2], float scale) {
  float kept[2], offset[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = largest[half];
#pragma unroll
    for (int n = 0; n < kAcross; ++n) most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
    kept[half] = fast_exp2((largest[half] - most) * scale);
    offset[half] = -most * scale;
    largest[half] = most;
    sums[half] *= kept[half];
  }
#pragma unroll
  for (int d = 0; d < kOut; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[d][i] *= kept[i / 2];
  }
#pragma unroll
  for (int n = 0; n < kAcross; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = fast_exp2(fmaf(scores[n][i], scale, offset[i / 2]));
      sums[i / 2] += scores[n][i];
    }
  }
}

/// Outputs of the 16 queries of a warp from `query0` on, divided by their sums.
template <class T, int kHead>
__device__ __forceinline__ void store_queries(const moefy_attention_params& p, const Place& place, uint32_t query0,
                                              const float (&out)[kHead / 8][4], const float (&sums)[2]) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = 1.0f / quad_sum(sums[half]);
    const uint32_t query = query0 + lane / 4 + half * 8;
    if (query >= place.length) continue;
    T* y = static_cast<T*>(p.y) + (static_cast<uint64_t>(place.begin + query) * p.num_heads + place.head) * kHead;
#pragma unroll
    for (int d = 0; d < kHead / 8; ++d) {
      const uint32_t two = pack<T>(out[d][2 * half] * factor, out[d][2 * half + 1] * factor);
      *reinterpret_cast<uint32_t*>(y + d * 8 + 2 * (lane % 4)) = two;
    }
  }
}

}  // namespace moefy
