// What the dense path needs between its two library products.
#include "dependency.cuh"
#include "element.cuh"
#include "experts.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = MOEFY_ACTIVATE_THREADS;

/// pre [num_tokens, G * d_ff + rank] -> h [num_tokens, d_ff + rank]. A thread takes kPer neurons, 8 or 1, that lie side
/// by side; blockIdx.y covers tokens.
template <class T, int kPer, class Activation>
__device__ __forceinline__ void activate_hidden(const moefy_activate_params& p, Activation) {
  moefy_neurons n = p.neurons;
  n.activation = Activation::value;
  const uint32_t first = (blockIdx.x * kThreads + threadIdx.x) * kPer;
  if (first >= num_neurons(n)) return;
  const uint64_t pre_stride = static_cast<uint64_t>(n.glu + 1) * n.d_ff + n.rank;
  const uint32_t low = input_row(n, first);
  const uint32_t high = n.glu ? up_row(n, first) : low;
  NeuronConstants constants[kPer];
  uint32_t experts[kPer];
  const uint32_t width = max(n.expert_width, 1u);
  uint32_t expert = first / width, inside = first % width;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    constants[i] = neuron_constants(n, first + i);
    experts[i] = p.mask != nullptr && expert < n.num_experts ? expert : kNoExpert;
    if (++inside < width) continue;
    inside = 0;
    ++expert;
  }
  const bool is_one_expert = experts[0] == experts[kPer - 1];
  // A block with one token loads before it knows whether it must: either way it waits once.
  const bool has_one = gridDim.y >= p.num_tokens;
  begin();
  for (uint32_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
    const T* pre = static_cast<const T*>(p.pre) + token * pre_stride;
    T* hidden = static_cast<T*>(p.hidden) + token * static_cast<uint64_t>(num_neurons(n)) + first;
    const auto factor_of = [&](uint32_t which) {
      if (which == kNoExpert) return 1.0f;
      return selects(p.mask, n.num_experts, token, which) ? gate_of(p.gates, n.num_experts, token, which) : 0.0f;
    };
    Eight<T> of_gates, of_ups;
    const auto load = [&](bool wanted) {
      of_gates.load_fresh(pre + low, 0, wanted ? 8 : 0);
      of_ups.load_fresh(pre + high, 0, wanted && n.glu ? 8 : 0);
    };
    if constexpr (kPer == 8) load(has_one);
    const float factor = factor_of(experts[0]);
    float gates[kPer], ups[kPer], values[kPer] = {};
    if (!is_one_expert || factor != 0.0f) {
      if constexpr (kPer == 8) {
        if (!has_one) load(true);
        of_gates.to_floats(gates);
        of_ups.to_floats(ups);
      } else {
        gates[0] = to_float(pre[low]);
        ups[0] = to_float(pre[high]);
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const float of_own = is_one_expert ? factor : factor_of(experts[i]);
        // Whatever is not selected counts as zero, even if it is infinite.
        if (of_own != 0.0f) values[i] = neuron_value<T>(n, first + i, constants[i], gates[i], ups[i]) * of_own;
      }
    }
    if constexpr (kPer == 8) {
      store_eight(hidden, values);
    } else {
      hidden[0] = from_float<T>(values[0]);
    }
  }
}

/// Zeros in h, 16 bytes at a time, where a token does not run the expert, whatever was there. blockIdx.y covers tokens.
__device__ __forceinline__ void mask_hidden(const moefy_activate_params& p) {
  constexpr uint32_t kBatch = 4;
  const moefy_neurons& n = p.neurons;
  const uint32_t chunk = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t expert = chunk / (n.expert_width * p.element_bytes / kChunkBytes);
  if (expert >= n.num_experts) return;
  const uint64_t row_bytes = static_cast<uint64_t>(num_neurons(n)) * p.element_bytes;
  char* const hidden = static_cast<char*>(p.hidden) + static_cast<uint64_t>(chunk) * kChunkBytes;
  begin();
#pragma unroll 1
  for (uint32_t first = blockIdx.y; first < p.num_tokens; first += kBatch * gridDim.y) {
    bool runs[kBatch];
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      runs[i] = selects(p.mask, n.num_experts, min(first + i * gridDim.y, p.num_tokens - 1), expert);
    }
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      const uint32_t token = first + i * gridDim.y;
      if (token < p.num_tokens && !runs[i]) *reinterpret_cast<uint4*>(hidden + token * row_bytes) = uint4{};
    }
  }
}

}  // namespace
}  // namespace moefy

extern "C" __global__ void __launch_bounds__(moefy::kThreads)
    moefy_dense_mask(const __grid_constant__ moefy_activate_params p) {
  moefy::mask_hidden(p);
}

#define MOEFY_DENSE_ACTIVATE(name, type, per)                                               \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads)                                        \
      moefy_dense_activate_##name##_##per(const __grid_constant__ moefy_activate_params p) { \
    moefy::with_activation(p.neurons.activation,                                            \
                           [&](auto known) { moefy::activate_hidden<type, per>(p, known); }); \
  }

MOEFY_DENSE_ACTIVATE(f32, float, 1)
MOEFY_DENSE_ACTIVATE(f32, float, 8)
MOEFY_DENSE_ACTIVATE(f16, __half, 1)
MOEFY_DENSE_ACTIVATE(f16, __half, 8)
MOEFY_DENSE_ACTIVATE(bf16, __nv_bfloat16, 1)
MOEFY_DENSE_ACTIVATE(bf16, __nv_bfloat16, 8)
