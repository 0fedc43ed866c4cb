// The op `add_shares`: partial outputs -> y, the last launch of a layer for few tokens.
#include "activation.cuh"
#include "dependency.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "team.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32;

/// y of kColumns columns of one token: groups of threads take turns at the shares, then add up.
template <class T, uint32_t kColumns>
__device__ __forceinline__ void add_shares(const moefy_add_shares_params& p) {
  constexpr uint32_t kFours = kColumns / 4, kGroups = kThreads / kFours;
  constexpr int kBatch = kColumns == 32 ? 5 : 7;  // shares of 132 multiprocessors, or of seven clusters, at once
  __shared__ __align__(16) float sums[kWarps][kColumns];
  const uint64_t d_model = p.d_model;
  const uint32_t token = blockIdx.y;
  const uint32_t group = threadIdx.x / kFours;
  const uint32_t column = threadIdx.x % kFours * 4;
  const uint32_t column0 = blockIdx.x * kColumns;
  const uint32_t own = column0 + threadIdx.x;
  launch_dependents();
  float sum = 0.0f;
  if (threadIdx.x < kColumns && own < d_model && p.b_out != nullptr) sum = p.b_out[own];
  const float* from = p.shares + (static_cast<uint64_t>(group) * p.num_tokens + token) * d_model + column0 + column;
  const uint64_t step = static_cast<uint64_t>(kGroups) * p.num_tokens * d_model;
  const uint32_t num_shares = column0 + column < d_model ? p.num_shares : 0;
  wait_for_dependencies();
  float4 v = {};
#pragma unroll 1
  for (uint32_t first = group; first < num_shares; first += kBatch * kGroups, from += kBatch * step) {
    uint4 shares[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      shares[i] = load_fresh_vector_if(first + i * kGroups < num_shares, from + i * step);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float4 share = as_float4(shares[i]);
      v = make_float4(v.x + share.x, v.y + share.y, v.z + share.z, v.w + share.w);
    }
  }
#pragma unroll
  for (uint32_t step = kFours; step < 32; step *= 2) {
    v.x += __shfl_xor_sync(kFullWarp, v.x, step);
    v.y += __shfl_xor_sync(kFullWarp, v.y, step);
    v.z += __shfl_xor_sync(kFullWarp, v.z, step);
    v.w += __shfl_xor_sync(kFullWarp, v.w, step);
  }
  if (lane_id() < kFours) *reinterpret_cast<float4*>(&sums[threadIdx.x / 32][column]) = v;
  __syncthreads();
  if (threadIdx.x >= kColumns || own >= d_model) return;
#pragma unroll
  for (uint32_t warp = 0; warp < kWarps; ++warp) sum += sums[warp][threadIdx.x];
  const bool valid = p.num_valid_tokens == nullptr || token < *p.num_valid_tokens;
  static_cast<T*>(p.y)[token * d_model + own] = from_float<T>(valid ? sum : 0.0f);
}

}  // namespace
}  // namespace moefy

#define MOEFY_ADD_SHARES(name, type, columns)                                                  \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads)                                \
      moefy_add_shares_##name##_##columns(const __grid_constant__ moefy_add_shares_params p) { \
    moefy::add_shares<type, columns>(p);                                                       \
  }

MOEFY_ADD_SHARES(f32, float, 32)
MOEFY_ADD_SHARES(f32, float, 64)
MOEFY_ADD_SHARES(f16, __half, 32)
MOEFY_ADD_SHARES(f16, __half, 64)
MOEFY_ADD_SHARES(bf16, __nv_bfloat16, 32)
MOEFY_ADD_SHARES(bf16, __nv_bfloat16, 64)
