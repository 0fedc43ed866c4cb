// What the dense path needs between its two library products.
#include "dependency.cuh"
#include "element.cuh"
#include "experts.cuh"

namespace moefy {
namespace {

/// pre [num_tokens, G * d_ff + rank] -> h [num_tokens, d_ff + rank]. A thread takes kPer neurons, 8 or 1, that lie side
/// by side; blockIdx.y covers tokens.
template <class T, int kPer>
__device__ __forceinline__ void activate_hidden(const moefy_activate_params& p) {
  const moefy_neurons& n = p.neurons;
  const uint32_t first = (blockIdx.x * blockDim.x + threadIdx.x) * kPer;
  if (first >= num_neurons(n)) return;
  const uint64_t pre_stride = static_cast<uint64_t>(n.glu + 1) * n.d_ff + n.rank;
  const uint32_t low = input_row(n, first);
  const uint32_t high = n.glu ? up_row(n, first) : low;
  NeuronConstants constants[kPer];
  uint32_t experts[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    constants[i] = neuron_constants(n, first + i);
    experts[i] = first + i < routed_neurons(n) ? (first + i) / n.expert_width : kNoExpert;
  }
  launch_dependents();
  wait_for_dependencies();
  for (uint32_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
    const T* pre = static_cast<const T*>(p.pre) + token * pre_stride;
    T* hidden = static_cast<T*>(p.hidden) + token * static_cast<uint64_t>(num_neurons(n)) + first;
    float gates[kPer], ups[kPer];
    if constexpr (kPer == 8) {
      Eight<T> both[2];
      both[0].load_fresh(pre + low, 0, 8);
      both[1].load_fresh(pre + high, 0, 8);
      both[0].to_floats(gates);
      both[1].to_floats(ups);
    } else {
      gates[0] = to_float(pre[low]);
      ups[0] = to_float(pre[high]);
    }
    alignas(16) T values[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value = neuron_value<T>(n, first + i, constants[i], gates[i], ups[i]);
      if (p.mask != nullptr && experts[i] != kNoExpert) {
        const bool runs = selects(p.mask, n.num_experts, token, experts[i]);
        value = runs ? value * gate_of(p.gates, n.num_experts, token, experts[i]) : 0.0f;
      }
      values[i] = from_float<T>(value);
    }
    if constexpr (kPer == 8) {
#pragma unroll
      for (int i = 0; i < Eight<T>::kVectors; ++i) {
        reinterpret_cast<uint4*>(hidden)[i] = reinterpret_cast<const uint4*>(values)[i];
      }
    } else {
      hidden[0] = values[0];
    }
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_DENSE_ACTIVATE(name, type, per)                                               \
  extern "C" __global__ void __launch_bounds__(256)                                         \
      moefy_dense_activate_##name##_##per(const __grid_constant__ moefy_activate_params p) { \
    moefy::activate_hidden<type, per>(p);                                                   \
  }

MOEFY_DENSE_ACTIVATE(f32, float, 1)
MOEFY_DENSE_ACTIVATE(f32, float, 8)
MOEFY_DENSE_ACTIVATE(f16, __half, 1)
MOEFY_DENSE_ACTIVATE(f16, __half, 8)
MOEFY_DENSE_ACTIVATE(bf16, __nv_bfloat16, 1)
MOEFY_DENSE_ACTIVATE(bf16, __nv_bfloat16, 8)
