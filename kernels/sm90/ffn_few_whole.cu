// The op `ffn_few` in two launches where the tokens together execute most neurons of a narrow layer: clusters of blocks route,
// each all tokens, while the rows of all neurons come; moefy_add_shares adds the shares.
#include "cluster_router.cuh"
#include "ffn_few_whole.cuh"

namespace moefy {
namespace few {
namespace {

template <class T, int kSteps, bool kTwoLayers>
__device__ __forceinline__ void run(const moefy_ffn_few_params& p, unsigned char* memory) {
  __shared__ WholeFixed fixed;
  __shared__ RouterFixed of_router;
  const moefy_router_select_params& r = p.router;
  const uint32_t num_tokens = r.num_tokens, score_tokens = ceil_div(num_tokens, 4) * 4;
  const uint32_t score_bytes = kTwoLayers ? r.num_experts * score_tokens * sizeof(float) : 0;
  Whole<T, kSteps> whole(p, fixed, memory, score_bytes);
  const ClusterRouter<T, kSteps, kTwoLayers> router(r, num_tokens, of_router, fixed.common.sums, whole.slice,
                                                    whole.shared.routing);
  float* const scores = reinterpret_cast<float*>(whole.shared.router_inputs);  // [num_experts, score_tokens]
  // Rows are asked for a part at a time: behind all of them the router would wait for its own (kernels/NOTES.md).
  whole.begin();
  router.begin(score_bytes, true);
  whole.ask(0);
  touch(p);
  launch_dependents();
  whole.load_constants();
  wait_for_cluster();
  if (whole.count > 0) whole.wait_for(0);
  whole.ask(1);
  wait_for_dependencies();

  typename Slice<T, 1, kSteps>::X x;
  whole.slice.load(r.x, num_tokens, x);
  ask_for_scores(r, num_tokens, whole.shared.keys);
  whole.ask(2);
  const uint32_t num_valid = valid_tokens(r);
  router.first_layer(x);
  whole.ask(3);
  whole.multiply_in(x);
  router.wait_for_first();
  float* const own = scores + router.expert0 * score_tokens;
  if (kTwoLayers) {
    router.template second_layer<4>([&](uint32_t e, uint32_t token0, const float (&score)[4]) {
      constexpr uint32_t kTeam = router.template kTeam<4>;
#pragma unroll
      for (uint32_t block = threadIdx.x % kTeam, i = 0; i < kClusterBlocks / kTeam; ++i, block += kTeam) {
        store_async(own + e * score_tokens + token0, make_float4(score[0], score[1], score[2], score[3]),
                    &of_router.scores_barrier, block);
      }
    });
  }
  for (uint32_t part = 4; part < 2 * whole.num_stages(); ++part) whole.ask(part);
  wait_for_stores(&of_router.scores_barrier);
  wait_for_imposed(r);
  const bool imposed = r.imposed != nullptr;
  const float* const from = imposed      ? reinterpret_cast<const float*>(whole.shared.keys)
                            : kTwoLayers ? scores
                                         : router.first;
  const uint32_t of_token = imposed ? round_up_32(r.num_experts) : kTwoLayers ? 1 : router.first_stride;
  const uint32_t of_expert = imposed || !kTwoLayers ? 1 : score_tokens;
  make_keys(r, num_tokens, num_valid, fixed.common, whole.shared.keys,
            [&](uint32_t token, uint32_t e) { return from[token * of_token + e * of_expert]; });
  const bool plain = is_plain(p, num_tokens, fixed.common);
  if (!plain || writes_masks(r)) unite(p, num_tokens, fixed.common, whole.shared);
  whole.find_hidden(plain);
  __syncthreads();
  typename Whole<T, kSteps>::Y y = {};
  whole.multiply_out(y);
  store_share(p, num_tokens, whole.slice, y);
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: Sized, whose routing is ClusterRouter or what selection sorts, and then the rows of a block.
#define MOEFY_FFN_FEW_WHOLE(name, type, layers)                                                                    \
  extern "C" __global__ void __cluster_dims__(MOEFY_ROUTER_SELECT_BLOCKS, 1, 1)                                    \
      __launch_bounds__(MOEFY_FFN_FEW_THREADS, 2)                                                                  \
          moefy_ffn_few_whole_##name##_##layers(const __grid_constant__ moefy_ffn_few_params p) {                  \
    extern __shared__ __align__(128) unsigned char memory[];                                                       \
    moefy::few::run<type, MOEFY_FFN_FEW_CLUSTER_STEPS, layers == 2>(p, memory);                                    \
  }

MOEFY_FFN_FEW_WHOLE(f16, __half, 1)
MOEFY_FFN_FEW_WHOLE(f16, __half, 2)
MOEFY_FFN_FEW_WHOLE(bf16, __nv_bfloat16, 1)
MOEFY_FFN_FEW_WHOLE(bf16, __nv_bfloat16, 2)
