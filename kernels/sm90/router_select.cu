// Hopper's router for few tokens: tokens -> scores -> masks in one launch of one cluster; the scores of a token go to the
// block that selects for it.
#include "cluster_router.cuh"

namespace moefy {
namespace few {
namespace {

/// kSteps: as of Slice.
template <class T, int kSteps, bool kOneToken>
__device__ __forceinline__ void route(const moefy_router_select_params& p, unsigned char* memory) {
  __shared__ RouterFixed fixed;
  __shared__ __align__(16) Sums<1> sums;
  __shared__ uint32_t max_key, count;
  const Slice<T, 1, kSteps> slice(p.d_model);
  const uint32_t num_tokens = kOneToken ? 1 : p.num_tokens;
  const ClusterRouter<T, kSteps, true> router(p, num_tokens, fixed, sums, slice, memory);
  const uint32_t token = router.rank;
  static_assert(kClusterBlocks >= kTile, "tokens have a block each");
  const bool selects = token < num_tokens;
  router.begin(selects ? p.num_experts * sizeof(float) : 0, true);
  if (threadIdx.x == 0) max_key = count = 0;
  touch(p);
  launch_dependents();
  wait_for_cluster();
  wait_for_dependencies();

  typename Slice<T, 1, kSteps>::X x;
  slice.load(p.x, num_tokens, x);
  // Scores to be read instead, of at most MOEFY_FFN_FEW_EXPERTS experts.
  constexpr int kOfThread = MOEFY_FFN_FEW_EXPERTS / kThreads;
  float imposed[kOfThread] = {};
  if (selects && p.imposed != nullptr) {
    const float* from = p.imposed + static_cast<uint64_t>(token) * p.num_experts;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t e = threadIdx.x + i * kThreads;
      if (e < p.num_experts) imposed[i] = __ldcg(from + e);
    }
  }
  const bool valid = token < valid_tokens(p);
  router.first_layer(x);
  router.wait_for_first();
  float* const scores = router.end;  // [round_up_32(num_experts)], which become keys; then what selection sorts
  const auto send = [&](uint32_t e, uint32_t token0, const auto& of_tokens) {
    constexpr uint32_t kTokens = sizeof(of_tokens) / sizeof(float);
#pragma unroll
    for (uint32_t i = 0; i < kTokens; ++i) {
      if (threadIdx.x % router.template kTeam<kTokens> != i || token0 + i >= num_tokens) continue;
      store_async(scores + router.expert0 + e, of_tokens[i], &fixed.scores_barrier, token0 + i);
    }
  };
  if (kOneToken) {
    router.template second_layer<1>(send);
  } else {
    router.template second_layer<4>(send);
  }
  if (!selects) return;

  wait_for_stores(&fixed.scores_barrier);
  const uint32_t row = round_up_32(p.num_experts);
  uint32_t* const keys = reinterpret_cast<uint32_t*>(scores);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const uint32_t e = threadIdx.x + i * kThreads;
    if (e >= row) break;
    const bool exists = e < p.num_experts && valid;
    const float score = exists ? scores[e] : 0.0f;
    if (e < p.num_experts && p.scores != nullptr) p.scores[static_cast<uint64_t>(token) * p.num_experts + e] = score;
    const uint32_t key = exists ? score_key(p.imposed != nullptr ? imposed[i] : score) : 0;
    keys[e] = key;
    const uint32_t largest = __reduce_max_sync(kFullWarp, key);
    if (lane_id() == 0) atomicMax(&max_key, largest);
  }
  __syncthreads();
  uint32_t* const mask = p.mask + static_cast<uint64_t>(token) * (row / 32);
  select_by_block(p, token, valid, RowSelection{keys, keys + row, p.num_experts, mask}, max_key, &count);
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: what ClusterRouter takes, and its scores.
#define MOEFY_ROUTER_SELECT(name, type, steps, tokens)                                                                \
  extern "C" __global__ void __cluster_dims__(MOEFY_ROUTER_SELECT_BLOCKS, 1, 1)                                       \
      __launch_bounds__(MOEFY_FFN_FEW_THREADS, 1)                                                                     \
          moefy_router_select_##name##_##steps##_##tokens(const __grid_constant__ moefy_router_select_params p) {     \
    extern __shared__ __align__(128) unsigned char memory[];                                                          \
    moefy::few::route<type, steps, tokens == 1>(p, memory);                                                           \
  }
#define MOEFY_ROUTER_SELECT_OF(name, type)  \
  MOEFY_ROUTER_SELECT(name, type, 4, 1)     \
  MOEFY_ROUTER_SELECT(name, type, 4, 8)     \
  MOEFY_ROUTER_SELECT(name, type, 16, 1)    \
  MOEFY_ROUTER_SELECT(name, type, 16, 8)

MOEFY_ROUTER_SELECT_OF(f16, __half)
MOEFY_ROUTER_SELECT_OF(bf16, __nv_bfloat16)
