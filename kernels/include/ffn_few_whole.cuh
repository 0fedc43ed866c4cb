// Hopper: all neurons of a narrow layer for up to eight tokens. A block has the rows of its neurons in shared memory before it
// is known which tokens select them, and h of the others is 0.
#pragma once

#include "ffn_few_stream.cuh"

namespace moefy {
namespace few {

constexpr uint32_t kWholeStages = MOEFY_FFN_FEW_WHOLE_STAGES, kStageNeurons = 16;

/// What has a fixed size in shared memory.
struct WholeFixed {
  Fixed<1> common;
  Sums<1> sums[kWholeStages];
  alignas(16) uint16_t hidden[kWholeStages][kTile][kStageNeurons];
};

/// kSteps: steps of 32 columns of d_model that a warp owns, at most.
template <class T, int kSteps>
struct Whole {
  static constexpr int kValues = kWholeStages * kStageNeurons * kTile / kThreads;
  using X = typename Slice<T, 1, kSteps>::X;
  using Y = float[kSteps * 2][1][4];

  const moefy_ffn_few_params& p;
  const uint32_t num_tokens;
  WholeFixed& fixed;
  const Sized shared;
  const Slice<T, 1, kSteps> slice;
  uint32_t neuron0, count;  // of the block
  NeuronConstants constants[kValues];

  __device__ Whole(const moefy_ffn_few_params& params, WholeFixed& fixed_memory, unsigned char* memory, uint32_t router_bytes)
      : p(params),
        num_tokens(params.router.num_tokens),
        fixed(fixed_memory),
        shared(num_tokens, params.router.num_experts, memory, router_bytes, params.routing_bytes),
        slice(params.neurons.d_model) {
    const uint32_t all = num_neurons(p.neurons), each = all / gridDim.x, rest = all % gridDim.x;
    neuron0 = blockIdx.x * each + min(blockIdx.x, rest);
    count = each + (blockIdx.x < rest);
  }

  __device__ uint32_t num_stages() const { return ceil_div(count, kStageNeurons); }
  __device__ uint32_t neurons_of(uint32_t stage) const { return min(count - stage * kStageNeurons, kStageNeurons); }
  __device__ uint32_t in_row(uint32_t index) const { return shared_address(shared.ring) + index * in_row_stride(slice.row_bytes); }
  __device__ uint32_t out_row(uint32_t index) const {
    return in_row(p.block_neurons) + index * out_row_stride(slice.row_bytes);
  }
  __device__ uint32_t barrier(bool of_out, uint32_t stage) const {
    return shared_address(&fixed.common.barriers[of_out][stage]);
  }

  /// While the kernel before this one runs. One barrier of the block later, rows can be asked for.
  __device__ void begin() {
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < num_stages(); ++stage) {
        for (uint32_t of_out = 0; of_out < 2; ++of_out) {
          barrier_init(barrier(of_out, stage));
          fence_barriers();
          barrier_expect(barrier(of_out, stage), neurons_of(stage) * slice.row_bytes);
        }
      }
    }
    if (p.neurons.d_model % kStepColumns != 0) {
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) slice.clear_row_end(shared.ring + i * in_row_stride(slice.row_bytes));
    }
  }

  /// What belongs to the neurons whose h this thread computes.
  __device__ void load_constants() {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t index = (threadIdx.x + i * kThreads) / kTile;
      constants[i] = index < count ? neuron_constants(p.neurons, neuron0 + index) : NeuronConstants{};
    }
  }

  /// Parts are the rows of w_in of each stage, then those of w_out. Asks for one, if there are so many; all warps do it together.
  __device__ void ask(uint32_t part) const {
    const bool of_out = part >= num_stages();
    const uint32_t stage = of_out ? part - num_stages() : part, slot = threadIdx.x / 32 + lane_id() * kWarps;
    if (stage >= num_stages() || slot >= neurons_of(stage)) return;
    const uint32_t index = stage * kStageNeurons + slot, neuron = neuron0 + index;
    const uint32_t row = of_out ? neuron : input_row(p.neurons, neuron);
    const char* from = static_cast<const char*>(of_out ? p.neurons.w_out : p.neurons.w_in);
    copy_bulk(of_out ? out_row(index) : in_row(index), from + static_cast<uint64_t>(row) * slice.row_bytes, slice.row_bytes,
              barrier(of_out, stage));
  }

  /// Until the rows of w_in of a stage are there.
  __device__ void wait_for(uint32_t stage) const { barrier_wait(barrier(false, stage), 0); }

  /// Products of all rows of w_in with this warp's columns of the tokens.
  __device__ void multiply_in(const X& x) const {
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages(); ++stage) {
      const uint32_t neurons = neurons_of(stage), low = in_row(stage * kStageNeurons);
      const uint32_t high = neurons > 8 ? in_row(stage * kStageNeurons + 8) : low;
      wait_for(stage);
      slice.multiply(low, high, min(neurons, 8u), neurons > 8 ? neurons - 8 : neurons, x, fixed.sums[stage]);
    }
  }

  /// h from the sums of all warps, 0 where a token does not select the expert. `plain`: keys say which it does.
  __device__ void find_hidden(bool plain) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const uint32_t at = threadIdx.x + i * kThreads, token = at % kTile, index = at / kTile;
      const uint32_t stage = index / kStageNeurons, slot = index % kStageNeurons, neuron = neuron0 + index;
      float value = 0.0f;
      if (index < count && token < num_tokens) {
        const float pre = sum_of_warps<1>(fixed.sums[stage], 0, slot, token);
        const bool is_routed = neuron < routed_neurons(p.neurons);
        // Exact, as in Stream.
        const uint32_t expert = is_routed ? static_cast<uint32_t>((neuron + 0.5f) * p.inverse_width) : 0;
        const uint32_t key = shared.keys[token * round_up_32(p.router.num_experts) + expert];
        const bool runs = !is_routed || (plain ? key >= fixed.common.least_keys[token]
                                               : fixed.common.masks[token][expert / 32] >> (expert % 32) & 1);
        if (runs) value = neuron_value<T>(p.neurons, neuron, constants[i], pre, 0.0f);
        if (runs && is_routed && p.gate != MOEFY_GATE_ONE) value *= __uint_as_float(key);
      }
      if (stage < num_stages()) reinterpret_cast<T&>(fixed.hidden[stage][token][slot]) = from_float<T>(value);
    }
  }

  /// This warp's columns of the block's share of y.
  __device__ void multiply_out(Y& y) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t column_bytes = kStepColumns * sizeof(T), inside = lane_id() / 8 % 2 * 16;
    const uint32_t bytes = slice.bytes_before(slice.row_bytes), first = bytes > inside ? inside : 0;
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages(); ++stage) {
      const uint32_t* of_token = reinterpret_cast<const uint32_t*>(fixed.hidden[stage][g]);
      const uint32_t h[2] = {of_token[t], of_token[t + 4]};
      const uint32_t row = min(lane_id() % 8 + lane_id() / 16 * 8, neurons_of(stage) - 1);
      const uint32_t from = out_row(stage * kStageNeurons + row) + (bytes > 0 ? slice.first_step * column_bytes : 0) + first;
      barrier_wait(barrier(true, stage), 0);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t w[4];
          load_matrices_transposed(w, from + slice.within(i * column_bytes + half * 32, bytes - first));
          mma(y[2 * i + half][0], w, h[0], h[1], T());
        }
      }
    }
  }
};

}  // namespace few
}  // namespace moefy
