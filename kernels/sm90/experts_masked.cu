// The op `experts` for many tokens that run most experts, on Hopper: both products as of the whole layer, with zeros in h for
// what a token does not select. A launch each. The first one is also that of a dense layer under masks, where it can multiply
// while the router works.
//
// A persistent grid takes items of 128 tokens by some neurons, or columns of y. One thread asks the copy engine for everything,
// two warpgroups multiply. Items of the first product are short, and phi takes long: warpgroups take items by turns, so that
// one multiplies while the other stores. In the second product each has 64 of an item's tokens.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "store_lines.cuh"

namespace moefy {
namespace {

constexpr uint32_t kTokens = 128;
constexpr uint32_t kDepth = 64;  // of a stage
constexpr uint32_t kRowBytes = kDepth * 2;
constexpr uint32_t kTokenBytes = kTokens * kRowBytes;  // of a stage; weights follow
constexpr uint32_t kBlockBytes = kDepth * kRowBytes;   // of 64 columns of w_out

/// `kAcross`: neurons or columns of an item.
template <uint32_t kAcross>
constexpr uint32_t kStageBytes = kTokenBytes + kAcross* kRowBytes;
template <uint32_t kAcross>
constexpr int kStages = kAcross == 192 ? 5 : 6;

template <uint32_t kAcross>
using Ring = Pipeline<kStages<kAcross>, true>;

/// Calls for each item of this block with its first token, the first of its part of `total`, and how many items follow.
template <uint32_t kAcross, class Call>
__device__ __forceinline__ void for_each_item(const moefy_experts_params& p, uint32_t total, const Call& call) {
  const uint32_t of_tile = ceil_div(total, kAcross), num_items = ceil_div(p.num_tokens, kTokens) * of_tile;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    call(item / of_tile * kTokens, item % of_tile * kAcross, (num_items - 1 - item) / gridDim.x);
  }
}

/// Asks for every stage of every item: `weights(to, first, k, full)` for the weights of one.
template <uint32_t kAcross, class Weights>
__device__ __forceinline__ void copy_items(const moefy_experts_masked_params& p, uint32_t total, uint32_t depth,
                                           uint32_t memory, const Ring<kAcross>& pipeline, const Weights& weights) {
  Copier<kStages<kAcross>, true> copier(pipeline);
  for_each_item<kAcross>(p.experts, total, [&](uint32_t token0, uint32_t first, uint32_t) {
#pragma unroll 1
    for (uint32_t k = 0; k < depth; k += kDepth) {
      const uint32_t slot = copier.begin(), to = memory + slot * kStageBytes<kAcross>, full = pipeline.full(slot);
      barrier_expect(full, kStageBytes<kAcross>);
      copy_box(to, p.rows, k, token0, full);
      weights(to + kTokenBytes, first, k, full);
      copier.end_by_engine();
    }
  });
}

/// Adds up the products of a stage: of 64 tokens from `tokens` on and all its weights.
template <class T, bool kByColumns, int kSums>
__device__ __forceinline__ void multiply_stage(float (&c)[kSums], uint32_t tokens, uint32_t weights, bool adds) {
  constexpr uint32_t kNextStep = (kByColumns ? 16 * kRowBytes : 32) / 16;
  const uint64_t a = operand_of_rows(tokens);
  const uint64_t b = kByColumns ? operand_of_columns(weights, kBlockBytes) : operand_of_rows(weights);
#pragma unroll
  for (uint32_t step = 0; step < kDepth / 16; ++step) {
    wgmma<T, kByColumns>(c, a + 2 * step, b + kNextStep * step, adds || step > 0);
  }
}

// ---- first product ----

constexpr uint32_t kNeurons = 128;            // of an item
constexpr uint32_t kParts = kTokens / 64;     // of its tokens, that are multiplied one after the other

/// Of the neurons of an item, for one warpgroup.
struct Constants {
  float bias[kNeurons];
  float mean[kNeurons];
};

constexpr uint32_t kBlocks = kNeurons / 8;
static_assert(2 * kBlocks <= 32, "bits of two rows");

/// Bits of the item's blocks of eight neurons that a row of a tile runs, and above them those of the row eight further. A lane
/// of a quad looks at a quarter of the blocks, at all of its words together.
__device__ __forceinline__ uint32_t find_selected(const moefy_experts_params& p, uint32_t token, uint32_t first) {
  constexpr uint32_t kMine = kBlocks / 4;
  const moefy_neurons& n = p.neurons;
  const uint32_t words = ceil_div(n.num_experts, 32), valid = valid_tokens(p), part = threadIdx.x % 4 * kMine;
  const uint32_t* rows[2];
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    rows[half] = p.mask + static_cast<uint64_t>(min(token + 8 * half, p.num_tokens - 1)) * words;
  }
  uint32_t expert = (first + part * 8) / n.expert_width, beyond = first + part * 8 - expert * n.expert_width;
  uint32_t found[kMine][2];
#pragma unroll
  for (uint32_t i = 0; i < kMine; ++i) {
    const bool exists = first + (part + i) * 8 < n.d_ff, routed = expert < n.num_experts;
    const uint32_t word = routed ? expert / 32 : 0;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      found[i][half] = ((rows[half][word] >> (expert % 32)) | !routed) & exists;
    }
    beyond += 8;
    const bool next = beyond >= n.expert_width;
    expert += next;
    beyond -= next ? n.expert_width : 0;
  }
  uint32_t bits = 0;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
    for (uint32_t i = 0; i < kMine; ++i) {
      bits |= (token + 8 * half < valid ? found[i][half] : 0) << (half * kBlocks + part + i);
    }
  }
  bits |= __shfl_xor_sync(0xffffffffu, bits, 1);
  return bits | __shfl_xor_sync(0xffffffffu, bits, 2);
}

/// h of a warp's 16 rows of a tile, from its sums. `kMore`: there are gates or means. No value waits for a condition: nobody
/// hides a branch here.
template <class T, bool kMore, class Activation>
__device__ __forceinline__ void store_hidden(const moefy_experts_params& p, const Constants& constants,
                                             uint32_t selected, uint32_t token0, uint32_t first,
                                             const float (&c)[kNeurons / 2], Activation) {
  const moefy_neurons& n = p.neurons;
  const uint32_t lane = threadIdx.x % 32;
  const auto two = [](const float* values) { return *reinterpret_cast<const float2*>(values); };
  const auto pair = [&](int block, int half) {
    const uint32_t at = block * 8 + lane % 4 * 2;
    const float2 bias = two(constants.bias + at);
    const float* sums = c + block * 4 + 2 * half;
    float2 value = {activate<T>(Activation::value, sums[0] + bias.x), activate<T>(Activation::value, sums[1] + bias.y)};
    if constexpr (kMore) {
      const float2 mean = two(constants.mean + at);
      const uint32_t expert = (first + block * 8) / n.expert_width, token = token0 + lane / 4 + half * 8;
      const bool has_gate = p.gates != nullptr && expert < n.num_experts && token < p.num_tokens;
      const float gate = has_gate ? gate_of(p.gates, n.num_experts, token, expert) : 1.0f;
      value.x = gate * (value.x - mean.x);
      value.y = gate * (value.y - mean.y);
    }
    const bool runs = selected >> (half * kBlocks + block) & 1;
    return make_float2(runs ? value.x : 0.0f, runs ? value.y : 0.0f);
  };
  store_lines<T, kNeurons / 8>(n.d_ff - first, pair, [&](uint32_t row) {
    const uint64_t token = token0 + row;
    return token < p.num_tokens ? static_cast<T*>(p.hidden) + token * n.d_ff + first : nullptr;
  });
}

/// `kEarly`: masks are waited for when they are needed, and not before.
template <class T, bool kEarly>
__device__ __forceinline__ void multiply_hidden(const moefy_experts_params& p, uint32_t memory,
                                                const Ring<kNeurons>& pipeline, Constants (&constants)[2]) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group = thread / 128, row0 = thread % 128 / 32 * 16;
  const bool has_more = p.gates != nullptr || n.mean != nullptr;
  uint32_t item = 0;
  Multiplier<kStages<kNeurons>, true> multiplier(pipeline);
  for_each_item<kNeurons>(p, n.d_ff, [&](uint32_t token0, uint32_t first, uint32_t following) {
    const uint32_t turn = item++;
    if (turn % 2 != group) return;
    multiplier.go_to(turn * ceil_div(n.d_model, kDepth));
    // In turns, so that they can be noted while others still read the last item's.
    Constants& those = constants[turn / 2 % 2];
    const NeuronConstants found = neuron_constants(n, first + thread % 128);
    those.bias[thread % 128] = found.bias;
    those.mean[thread % 128] = found.mean;
    uint32_t selected[kParts];
    const auto find = [&] {
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        selected[part] = find_selected(p, token0 + part * 64 + row0 + thread % 32 / 4, first);
      }
    };
    if (!kEarly) find();
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    // Who would wait for a stage before the other one has seen its own would take an earlier phase for that.
    if (turn > 0) asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory");
    float c[kParts][kNeurons / 2];
#pragma unroll 1
    for (uint32_t k = 0; k < n.d_model; k += kDepth) {
      const uint32_t from = memory + multiplier.begin() * kStageBytes<kNeurons>;
      wgmma_fence();
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        multiply_stage<T, false>(c[part], from + part * 64 * kRowBytes, from + kTokenBytes, k > 0);
      }
      wgmma_commit();
      multiplier.end();
    }
    if (following > 0) asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory");
    multiplier.finish();
    if (kEarly) {
      wait_for_dependencies();
      find();
    }
    with_activation(n.activation, [&](auto known) {
      // A loop, for half the instructions.
#pragma unroll 1
      for (uint32_t part = 0; part < kParts; ++part) {
        const uint32_t token = token0 + part * 64 + row0;
        if (has_more) {
          store_hidden<T, true>(p, those, selected[0], token, first, c[0], known);
        } else {
          store_hidden<T, false>(p, those, selected[0], token, first, c[0], known);
        }
        selected[0] = selected[1];
#pragma unroll
        for (uint32_t i = 0; i < kNeurons / 2; ++i) c[0][i] = c[1][i];
      }
    });
  });
}

/// The same early, but both warpgroups take half of the tokens of every item: where a block has one, that is half the time from
/// the masks to the end.
template <class T>
__device__ __forceinline__ void multiply_hidden_by_halves(const moefy_experts_params& p, uint32_t memory,
                                                          const Ring<kNeurons>& pipeline, Constants (&constants)[2]) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group = thread / 128, row0 = thread / 32 * 16;
  const bool has_more = p.gates != nullptr || n.mean != nullptr;
  Multiplier<kStages<kNeurons>, true> multiplier(pipeline);
  uint32_t item = 0;
  for_each_item<kNeurons>(p, n.d_ff, [&](uint32_t token0, uint32_t first, uint32_t) {
    Constants& those = constants[item++ % 2];
    const NeuronConstants found = neuron_constants(n, first + thread % 128);
    those.bias[thread % 128] = found.bias;
    those.mean[thread % 128] = found.mean;
    float c[kNeurons / 2];
#pragma unroll 1
    for (uint32_t k = 0; k < n.d_model; k += kDepth) {
      const uint32_t from = memory + multiplier.begin() * kStageBytes<kNeurons>;
      wgmma_fence();
      multiply_stage<T, false>(c, from + group * 64 * kRowBytes, from + kTokenBytes, k > 0);
      wgmma_commit();
      multiplier.end();
    }
    multiplier.finish();
    wait_for_dependencies();
    const uint32_t selected = find_selected(p, token0 + row0 + thread % 32 / 4, first);
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
    with_activation(n.activation, [&](auto known) {
      if (has_more) {
        store_hidden<T, true>(p, those, selected, token0 + row0, first, c, known);
      } else {
        store_hidden<T, false>(p, those, selected, token0 + row0, first, c, known);
      }
    });
  });
}

/// How the first product goes. Early: there are no lists, and the kernel before it lets it begin when the tokens are there.
enum class Way { kByTurns, kEarly, kEarlyByHalves };

template <class T, Way kWay>
__device__ __forceinline__ void masked_hidden(const moefy_experts_masked_params& masked) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(16) Constants constants[2][2];
  const moefy_experts_params& p = masked.experts;
  if constexpr (kWay == Way::kByTurns) {
    if (!begin_for_many(p)) return;
  } else {
    launch_dependents();
  }
  const Ring<kNeurons> pipeline(1, kWay == Way::kEarlyByHalves ? kMultipliers / 32 : kMultipliers / 32 / 2);
  if (threadIdx.x < kCopiers) {
    become_copier<2, true>();
    if (threadIdx.x > 0) return;
    copy_items<kNeurons>(masked, p.neurons.d_ff, p.neurons.d_model, shared_address(memory), pipeline,
                         [&](uint32_t to, uint32_t first, uint32_t k, uint32_t full) {
                           copy_box(to, masked.weights, k, first, full);
                         });
  } else {
    become_multiplier<2, true>();
    Constants(&own)[2] = constants[(threadIdx.x - kCopiers) / 128];
    if constexpr (kWay == Way::kEarlyByHalves) {
      multiply_hidden_by_halves<T>(p, shared_address(memory), pipeline, own);
    } else {
      multiply_hidden<T, kWay == Way::kEarly>(p, shared_address(memory), pipeline, own);
    }
  }
}

// ---- second product ----

/// y of a warp's 16 rows of a tile, from its sums, which are used up.
template <class T, uint32_t kColumns>
__device__ __forceinline__ void store_output(const moefy_experts_params& p, uint32_t token0, uint32_t column0,
                                             float (&c)[kColumns / 2]) {
  constexpr uint32_t kAtOnce = 64;
  const moefy_neurons& n = p.neurons;
  const uint32_t lane = threadIdx.x % 32, own = token0 + lane / 4, valid = valid_tokens(p);
  const uint32_t end = min(column0 + kColumns, static_cast<uint32_t>(n.d_model));
#pragma unroll 1
  for (uint32_t column = column0; column < end; column += kAtOnce) {
    const auto pair = [&](int block, int half) {
      const uint32_t at = column + block * 8 + lane % 4 * 2;
      if (own + half * 8 >= valid || at >= end) return make_float2(0.0f, 0.0f);
      const float* sums = c + block * 4 + 2 * half;
      const float* bias = n.b_out == nullptr ? nullptr : n.b_out + at;
      return bias == nullptr ? make_float2(sums[0], sums[1]) : make_float2(sums[0] + bias[0], sums[1] + bias[1]);
    };
    store_lines<T, kAtOnce / 8>(end - column, pair, [&](uint32_t row) {
      const uint64_t token = token0 + row;
      return token < p.num_tokens ? static_cast<T*>(p.y) + token * n.d_model + column : nullptr;
    });
    move_down<kAtOnce / 2>(c);
  }
}

template <class T, uint32_t kColumns>
__device__ __forceinline__ void masked_output(const moefy_experts_masked_params& masked) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const moefy_experts_params& p = masked.experts;
  const moefy_neurons& n = p.neurons;
  if (!begin_for_many(p)) return;
  const Ring<kColumns> pipeline(1);
  if (threadIdx.x < kCopiers) {
    become_copier<2, true>();
    if (threadIdx.x > 0) return;
    copy_items<kColumns>(masked, n.d_model, n.d_ff, shared_address(memory), pipeline,
                         [&](uint32_t to, uint32_t first, uint32_t k, uint32_t full) {
#pragma unroll
                           for (uint32_t block = 0; block < kColumns / 64; ++block) {
                             copy_box(to + block * kBlockBytes, masked.weights, first + block * 64, k, full);
                           }
                         });
  } else {
    become_multiplier<2, true>();
    Multiplier<kStages<kColumns>, true> multiplier(pipeline);
    for_each_item<kColumns>(p, n.d_model, [&](uint32_t token0, uint32_t column0, uint32_t) {
      float c[kColumns / 2];
#pragma unroll 1
      for (uint32_t k = 0; k < n.d_ff; k += kDepth) {
        const uint32_t from = shared_address(memory) + multiplier.begin() * kStageBytes<kColumns>;
        wgmma_fence();
        multiply_stage<T, true>(c, from + (threadIdx.x - kCopiers) / 128 * 64 * kRowBytes, from + kTokenBytes, k > 0);
        wgmma_commit();
        multiplier.end();
      }
      multiplier.finish();
      store_output<T, kColumns>(p, token0 + (threadIdx.x - kCopiers) / 32 * 16, column0, c);
    });
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB of stages, 200 KB where 192 columns go across.
#define MOEFY_EXPERTS_MASKED_OUTPUT(name, type, columns)                                                      \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                                    \
      moefy_experts_masked_output_##name##_##columns(const __grid_constant__ moefy_experts_masked_params p) { \
    moefy::masked_output<type, columns>(p);                                                                   \
  }

#define MOEFY_EXPERTS_MASKED_HIDDEN(name, type, way)                                        \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                  \
      moefy_experts_masked_hidden##name(const __grid_constant__ moefy_experts_masked_params p) { \
    moefy::masked_hidden<type, moefy::Way::way>(p);                                         \
  }

#define MOEFY_EXPERTS_MASKED(name, type)                               \
  MOEFY_EXPERTS_MASKED_HIDDEN(_##name, type, kByTurns)                 \
  MOEFY_EXPERTS_MASKED_HIDDEN(_early_##name, type, kEarly)             \
  MOEFY_EXPERTS_MASKED_HIDDEN(_halves_##name, type, kEarlyByHalves)    \
  MOEFY_EXPERTS_MASKED_OUTPUT(name, type, 128)                         \
  MOEFY_EXPERTS_MASKED_OUTPUT(name, type, 192)

MOEFY_EXPERTS_MASKED(f16, __half)
MOEFY_EXPERTS_MASKED(bf16, __nv_bfloat16)
