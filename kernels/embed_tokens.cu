// The op `embed_tokens`: the sum of a token's word, position and token-type embeddings. A warp a token.
#include "activation.cuh"
#include "dependency.cuh"

namespace moefy {
namespace {

template <class T>
__device__ __forceinline__ void embed_tokens(const moefy_embed_tokens_params& p) {
  const uint32_t token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  begin();
  if (token >= p.num_tokens) return;
  const uint32_t width = p.d_model;
  const T* word = static_cast<const T*>(p.words) + static_cast<uint64_t>(p.token_ids[token]) * width;
  const bool has_positions = p.positions != nullptr, has_type = p.token_type != nullptr;
  const uint64_t position = has_positions ? p.position_ids[token] : 0;
  const T* at = static_cast<const T*>(p.positions) + position * width;
  T* y = static_cast<T*>(p.y) + static_cast<uint64_t>(token) * width;
  for (uint32_t i = threadIdx.x % 32 * 8; i < width; i += 32 * 8) {
    float sum[8], part[8];
    Eight<T> values;
    values.template load<true>(word, i, width);
    values.to_floats(sum);
    if (has_positions) {
      values.template load<true>(at, i, width);
      values.to_floats(part);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += part[k];
    }
    if (has_type) {
      values.template load<true>(static_cast<const T*>(p.token_type), i, width);
      values.to_floats(part);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] += part[k];
    }
    store_eight(y + i, sum);
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_EMBED_TOKENS(name, type)                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                    \
      moefy_embed_tokens_##name(const __grid_constant__ moefy_embed_tokens_params p) { \
    moefy::embed_tokens<type>(p);                                                      \
  }

MOEFY_EMBED_TOKENS(f32, float)
MOEFY_EMBED_TOKENS(f16, __half)
MOEFY_EMBED_TOKENS(bf16, __nv_bfloat16)
