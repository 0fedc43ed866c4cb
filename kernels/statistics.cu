// Adds up what selection did: sums of integers, so their order does not matter. One warp a token.
#include "dependency.cuh"
#include "experts.cuh"

extern "C" __global__ void __launch_bounds__(256) moefy_statistics(const __grid_constant__ moefy_statistics_params p) {
  moefy::begin();
  const uint32_t token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= moefy::valid_tokens(p)) return;
  uint32_t k = 0;
  for (uint32_t expert = threadIdx.x % 32; expert < p.num_experts; expert += 32) {
    if (!moefy::selects(p.mask, p.num_experts, token, expert)) continue;
    ++k;
    atomicAdd(reinterpret_cast<unsigned long long*>(p.expert_counts) + expert, 1ull);
  }
  k = __reduce_add_sync(0xffffffffu, k);
  if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(p.k_histogram) + k, 1ull);
}
