// What the kernels of the op `experts` share: which neurons run, and the value of one.
#pragma once

#include "activation.cuh"

namespace moefy {

constexpr uint32_t kNoExpert = 0xffffffffu;

__device__ __forceinline__ uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

/// Number of neurons in all: the linear ones come last.
__device__ __forceinline__ uint32_t num_neurons(const moefy_neurons& n) { return n.d_ff + n.rank; }

__device__ __forceinline__ uint32_t routed_neurons(const moefy_neurons& n) { return n.num_experts * n.expert_width; }

/// Row of w_in of a neuron; of a GLU's neuron the gate row.
__device__ __forceinline__ uint32_t input_row(const moefy_neurons& n, uint32_t neuron) {
  return neuron < n.d_ff ? neuron : neuron + n.glu * n.d_ff;
}

/// Row of w_in of a GLU's neuron: the up row, or for a linear neuron its only one.
__device__ __forceinline__ uint32_t up_row(const moefy_neurons& n, uint32_t neuron) { return neuron + n.d_ff; }

__device__ __forceinline__ bool selects(const uint32_t* mask, uint32_t num_experts, uint32_t token, uint32_t expert) {
  const uint64_t row = static_cast<uint64_t>(token) * ceil_div(num_experts, 32);
  return mask[row + expert / 32] >> (expert % 32) & 1;
}

__device__ __forceinline__ float gate_of(const float* gates, uint32_t num_experts, uint32_t token, uint32_t expert) {
  return gates == nullptr ? 1.0f : gates[static_cast<uint64_t>(token) * num_experts + expert];
}

/// What belongs to a neuron beside its rows.
struct NeuronConstants {
  float bias;
  float bias_up;
  float mean;
};

__device__ __forceinline__ NeuronConstants neuron_constants(const moefy_neurons& n, uint32_t neuron) {
  NeuronConstants c = {};
  if (neuron >= n.d_ff) return c;
  if (n.b_in != nullptr) {
    c.bias = n.b_in[neuron];
    if (n.glu) c.bias_up = n.b_in[n.d_ff + neuron];
  }
  if (n.mean != nullptr) c.mean = n.mean[neuron];
  return c;
}

/// Activation of a neuron above its mean, from its pre-activations without biases, for a result of type T. `up` counts
/// for a GLU only.
template <class T>
__device__ __forceinline__ float neuron_value(const moefy_neurons& n, uint32_t neuron, const NeuronConstants& c,
                                              float pre, float up) {
  if (neuron >= n.d_ff) return pre;
  float value = activate<T>(n.activation, pre + c.bias);
  if (n.glu) value *= up + c.bias_up;
  return value - c.mean;
}

template <class T>
__device__ __forceinline__ float neuron_value(const moefy_neurons& n, uint32_t neuron, float pre, float up) {
  return neuron_value<T>(n, neuron, neuron_constants(n, neuron), pre, up);
}

}  // namespace moefy
