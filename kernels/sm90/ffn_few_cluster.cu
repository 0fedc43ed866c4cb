// The op `ffn_few` in two launches, the second of which begins while the first one runs: clusters of blocks route, each all
// tokens, then every block selects by itself and runs its share of the executed neurons; moefy_add_shares adds the shares.
#include "cluster_router.cuh"
#include "ffn_few_stream.cuh"

namespace moefy {
namespace few {
namespace {

template <class T, int kSteps, int kNeurons, bool kTwoLayers, bool kOneToken>
__device__ __forceinline__ void run(const moefy_ffn_few_params& p, unsigned char* memory) {
  __shared__ Fixed<1> fixed;
  __shared__ RouterFixed of_router;
  const moefy_router_select_params& r = p.router;
  const uint32_t num_tokens = kOneToken ? 1 : r.num_tokens;
  const uint32_t score_tokens = kOneToken ? 1 : ceil_div(num_tokens, 4) * 4;
  const uint32_t score_bytes = kTwoLayers ? r.num_experts * score_tokens * sizeof(float) : 0;
  Stream<T, 1, kSteps, kNeurons> stream(p, num_tokens, fixed, memory, score_bytes);
  const ClusterRouter<T, kSteps, kTwoLayers> router(r, num_tokens, of_router, fixed.sums, stream.slice, stream.shared.ring);
  float* const scores = reinterpret_cast<float*>(stream.shared.router_inputs);  // [num_experts, score_tokens]
  stream.begin();
  router.begin(score_bytes, kOneToken);
  touch(p);
  launch_dependents();
  // Several tokens were slower where blocks arrived early (kernels/NOTES.md).
  if (kOneToken) {
    wait_for_cluster();
  } else {
    sync_cluster();
  }
  wait_for_dependencies();

  typename Slice<T, 1, kSteps>::X x;
  stream.slice.load(r.x, num_tokens, x);
  ask_for_scores(r, num_tokens, stream.shared.keys);
  const uint32_t num_valid = valid_tokens(r);
  router.first_layer(x);
  router.wait_for_first();
  // Every block gets all scores.
  float* const own = scores + router.expert0 * score_tokens;
  if (!kTwoLayers) {
    // The first layer gave the scores.
  } else if (kOneToken) {
    router.template second_layer<1>([&](uint32_t e, uint32_t, const float (&score)[1]) {
      store_async(own + e, score[0], &of_router.scores_barrier, threadIdx.x % kClusterBlocks);
    });
  } else {
    router.template second_layer<4>([&](uint32_t e, uint32_t token0, const float (&score)[4]) {
      constexpr uint32_t kTeam = router.template kTeam<4>;
#pragma unroll
      for (uint32_t block = threadIdx.x % kTeam, i = 0; i < kClusterBlocks / kTeam; ++i, block += kTeam) {
        store_async(own + e * score_tokens + token0, make_float4(score[0], score[1], score[2], score[3]),
                    &of_router.scores_barrier, block);
      }
    });
  }
  fence_for_copies();
  wait_for_stores(&of_router.scores_barrier);
  wait_for_imposed(r);
  const bool imposed = r.imposed != nullptr;
  const float* const from = imposed      ? reinterpret_cast<const float*>(stream.shared.keys)
                            : kTwoLayers ? scores
                                         : router.first;
  const uint32_t of_token = imposed ? round_up_32(r.num_experts) : kTwoLayers ? 1 : router.first_stride;
  const uint32_t of_expert = imposed || !kTwoLayers ? 1 : score_tokens;
  make_keys(r, num_tokens, num_valid, fixed, stream.shared.keys,
            [&](uint32_t token, uint32_t e) { return from[token * of_token + e * of_expert]; });
  if (!kTwoLayers) fence_for_copies();  // scores were read in the ring
  stream.run(x);
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: Sized, with ClusterRouter in the ring. Two blocks fit a multiprocessor, so that the next layer's can
// have the weights of its router before this one ends. For one token the compiler made slower code of 128 registers.
#define MOEFY_FFN_FEW_CLUSTER(name, type, layers, neurons, tokens, bounds)                               \
  extern "C" __global__ void __cluster_dims__(MOEFY_ROUTER_SELECT_BLOCKS, 1, 1) bounds                   \
      moefy_ffn_few_cluster_##name##_##layers##_##neurons##_##tokens(                                    \
          const __grid_constant__ moefy_ffn_few_params p) {                                              \
    extern __shared__ __align__(128) unsigned char memory[];                                             \
    moefy::few::run<type, MOEFY_FFN_FEW_CLUSTER_STEPS, neurons, layers == 2, tokens == 1>(p, memory);    \
  }
#define MOEFY_FFN_FEW_CLUSTER_TOKENS(name, type, layers, neurons) \
  MOEFY_FFN_FEW_CLUSTER(name, type, layers, neurons, 1, __maxnreg__(112)) \
  MOEFY_FFN_FEW_CLUSTER(name, type, layers, neurons, 8, __launch_bounds__(MOEFY_FFN_FEW_THREADS, 2))
#define MOEFY_FFN_FEW_CLUSTER_OF(name, type)      \
  MOEFY_FFN_FEW_CLUSTER_TOKENS(name, type, 1, 8)  \
  MOEFY_FFN_FEW_CLUSTER_TOKENS(name, type, 1, 16) \
  MOEFY_FFN_FEW_CLUSTER_TOKENS(name, type, 2, 8)  \
  MOEFY_FFN_FEW_CLUSTER_TOKENS(name, type, 2, 16)

MOEFY_FFN_FEW_CLUSTER_OF(f16, __half)
MOEFY_FFN_FEW_CLUSTER_OF(bf16, __nv_bfloat16)
