// What the dense path needs between its two library products.
#include "experts.cuh"

namespace moefy {
namespace {

/// pre [num_tokens, G * d_ff + rank] -> h [num_tokens, d_ff + rank]; a block column covers neurons, blockIdx.y tokens.
template <class T>
__device__ __forceinline__ void activate_hidden(const moefy_activate_params& p) {
  const moefy_neurons& n = p.neurons;
  const uint32_t neuron = blockIdx.x * blockDim.x + threadIdx.x;
  if (neuron >= num_neurons(n)) return;
  const uint64_t pre_stride = static_cast<uint64_t>(n.glu + 1) * n.d_ff + n.rank;
  const uint32_t low = input_row(n, neuron);
  const uint32_t high = n.glu ? up_row(n, neuron) : low;
  const uint32_t expert = neuron < routed_neurons(n) ? neuron / n.expert_width : kNoExpert;
  for (uint32_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
    const T* pre = static_cast<const T*>(p.pre) + token * pre_stride;
    float value = neuron_value<T>(n, neuron, to_float(pre[low]), to_float(pre[high]));
    if (p.mask != nullptr && expert != kNoExpert) {
      const bool runs = selects(p.mask, n.num_experts, token, expert);
      value = runs ? value * gate_of(p.gates, n.num_experts, token, expert) : 0.0f;
    }
    static_cast<T*>(p.hidden)[token * static_cast<uint64_t>(num_neurons(n)) + neuron] = from_float<T>(value);
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_DENSE_ACTIVATE(name, type)                                             \
  extern "C" __global__ void __launch_bounds__(256)                                  \
      moefy_dense_activate_##name(const __grid_constant__ moefy_activate_params p) { \
    moefy::activate_hidden<type>(p);                                                 \
  }

MOEFY_DENSE_ACTIVATE(f32, float)
MOEFY_DENSE_ACTIVATE(f16, __half)
MOEFY_DENSE_ACTIVATE(bf16, __nv_bfloat16)
