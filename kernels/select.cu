// Scores -> masks. One warp per token.

#include "dependency.cuh"
#include "select.cuh"

// Dynamic shared memory: for each warp what select_row takes.
extern "C" __global__ void __launch_bounds__(256) moefy_select(const __grid_constant__ moefy_select_params p) {
  using namespace moefy;
  extern __shared__ uint32_t memory[];
  begin();
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t token = blockIdx.x * (blockDim.x / 32) + warp;
  if (token >= p.num_tokens) return;
  const bool valid = p.num_valid_tokens == nullptr || token < *p.num_valid_tokens;
  const SelectOutputs outputs{p.mask, p.counts, p.status};
  select_row(p.scores + token * p.score_stride, token, valid, p.num_experts, p.selection, outputs,
             memory + warp * p.words_per_warp);
}
