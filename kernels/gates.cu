// Scores -> gates: softmax over all experts, or over the selected ones alone. One warp a token.
#include "dependency.cuh"
#include "experts.cuh"

namespace moefy {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ void gates(const moefy_gates_params& p) {
  begin();
  const uint32_t token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= p.num_tokens) return;
  const float* scores = p.scores + static_cast<uint64_t>(token) * p.num_experts;
  float* out = p.gates + static_cast<uint64_t>(token) * p.num_experts;
  float max = -INFINITY;
  for (uint32_t e = threadIdx.x % 32; e < p.num_experts; e += 32) max = fmaxf(max, scores[e]);  // skips NaN
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kAll, max, step));
  float sum = 0.0f;
  for (uint32_t e = threadIdx.x % 32; e < p.num_experts; e += 32) {
    const bool counts = !p.renormalise || selects(p.mask, p.num_experts, token, e);
    if (counts && !isnan(scores[e])) sum += expf(scores[e] - max);
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  for (uint32_t e = threadIdx.x % 32; e < p.num_experts; e += 32) out[e] = expf(scores[e] - max) / sum;
}

}  // namespace
}  // namespace moefy

extern "C" __global__ void __launch_bounds__(256) moefy_gates(const __grid_constant__ moefy_gates_params p) {
  moefy::gates(p);
}
