// Scores -> masks. One warp per token for up to 512 experts, one block of 8 warps beyond.

#include "select.cuh"

namespace moefy {

template <int kWarps>
__device__ __forceinline__ void select(const moefy_select_params& p, uint32_t token, uint32_t* scratch) {
  const bool valid = p.num_valid_tokens == nullptr || token < *p.num_valid_tokens;
  const SelectOutputs outputs{p.mask, p.counts, p.status};
  select_row(Team<kWarps>{}, p.scores + token * p.score_stride, token, valid, p.num_experts, p.selection, outputs,
             scratch);
}

}  // namespace moefy

// Dynamic shared memory: 4096 words for CUMULATIVE_SHARE, else nothing.
extern "C" __global__ void __launch_bounds__(256, 1) moefy_select(const __grid_constant__ moefy_select_params p) {
  extern __shared__ uint32_t scratch[];
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t token = blockIdx.x * 8 + warp;
  if (token < p.num_tokens) moefy::select<1>(p, token, scratch + warp * 512);
}

extern "C" __global__ void __launch_bounds__(256) moefy_select_wide(const __grid_constant__ moefy_select_params p) {
  extern __shared__ uint32_t scratch[];
  moefy::select<8>(p, blockIdx.x, scratch);
}
