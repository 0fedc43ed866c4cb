// The op `ffn_few`: a whole layer for few tokens, once the first layer of the router is there. Two launches.
//
// moefy_ffn_few: every block finishes the router and selects by itself, which costs less than to wait for another
// launch. The executed neurons of the tokens' union are dealt out one by one over the blocks, so that any width of
// expert fills the chip. A block streams whole rows of its neurons through a ring in shared memory, multiplies them with
// all tokens, and keeps its share of y in registers: a warp owns a slice of d_model in both products.
// moefy_ffn_few_combine adds the shares in their order.
#include "bulk_copy.cuh"
#include "dependency.cuh"
#include "experts.cuh"
#include "mma.cuh"
#include "router.cuh"
#include "select.cuh"

namespace moefy {
namespace {

constexpr int kThreads = MOEFY_FFN_FEW_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = MOEFY_FFN_FEW_TILE;
constexpr int kIssuer = kWarps - 1;  // the warp that asks for rows
constexpr uint32_t kMaskWords = MOEFY_FFN_FEW_EXPERTS / 32;
constexpr uint32_t kStepColumns = 32;  // columns of d_model of one step of a warp

/// Bytes from one row of w_in to the next in shared memory, 64 more than a multiple of 128: two rows' 64 bytes side by
/// side meet different banks.
__device__ __forceinline__ uint32_t in_row_stride(uint32_t row_bytes) { return (row_bytes + 63) / 128 * 128 + 64; }
/// The same of w_out, 16 more: so do eight rows' 16 bytes.
__device__ __forceinline__ uint32_t out_row_stride(uint32_t row_bytes) { return (row_bytes + 111) / 128 * 128 + 16; }

/// What a neuron in the ring is: where its weights are, and whose tokens it gets.
struct RingEntry {
  uint32_t neuron;
  uint32_t expert;  // kNoExpert: all tokens
};

/// What has a fixed size in shared memory.
template <int kTiles>
struct Fixed {
  uint64_t barriers[2][MOEFY_FFN_FEW_STAGES];  // rows of w_in, rows of w_out
  uint64_t router_barrier;
  uint32_t masks[kTiles * kTile][kMaskWords];
  uint32_t union_ids[MOEFY_FFN_FEW_EXPERTS];
  uint32_t token_bits[MOEFY_FFN_FEW_EXPERTS];
  RingEntry entries[MOEFY_FFN_FEW_STAGES][16];
  alignas(16) float sums[kWarps][kTiles][16][kTile];
  alignas(16) uint16_t hidden[kTiles][kTile][16];
};

/// The rest, one after the other, each at a multiple of 128 bytes: the host adds up the same sizes.
struct Sized {
  float* scores;        // [num_tokens, round_up_32(num_experts)], then as keys, later gates
  float* first;         // [num_tokens, padded_first(first_width)]
  unsigned char* ring;  // before there are neurons: the second layer of the router, then what selection sorts

  __device__ Sized(const moefy_router_select_params& r, unsigned char* memory) {
    const auto round_up = [](uint32_t bytes) { return (bytes + 127) / 128 * 128; };
    scores = reinterpret_cast<float*>(memory);
    memory += round_up(4 * r.num_tokens * round_up_32(r.num_experts));
    first = reinterpret_cast<float*>(memory);
    ring = memory + round_up(4 * r.num_tokens * padded_first(first_width(r)));
  }
};

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kFullWarp, v, step);
  return v;
}

/// A row of keys becomes a row of gates; a warp does it.
__device__ __forceinline__ void keys_to_gates(moefy_gate gate, uint32_t num_experts, const uint32_t* mask,
                                              float* row) {
  if (gate == MOEFY_GATE_ONE) return;
  float max = -INFINITY;
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) {
    const uint32_t key = __float_as_uint(row[e]);
    row[e] = key == 0 ? -INFINITY : key_score(key);  // NaN counts as -inf
    max = fmaxf(max, row[e]);
  }
  if (gate == MOEFY_GATE_SCORE) return;
  max = warp_max(max);
  float sum = 0.0f;
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) {
    row[e] = expf(row[e] - max);
    if (gate == MOEFY_GATE_SOFTMAX || (mask[e / 32] >> (e % 32) & 1)) sum += row[e];
  }
  sum = warp_sum(sum);
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) row[e] /= sum;
}

/// Asks for the second layer of the router; one thread does it.
__device__ __forceinline__ void ask_for_router(const moefy_router_select_params& r, uint32_t element_bytes,
                                               uint32_t to, uint32_t barrier) {
  const uint32_t bytes = r.num_experts * r.hidden * element_bytes;
  barrier_expect(barrier, bytes);
  copy_bulk(to, r.w2, bytes, barrier);
}

/// Scores, masks and gates of all tokens.
template <class T, int kTiles>
__device__ __forceinline__ void route(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t stride = round_up_32(r.num_experts);
  load_first(r, 0, r.num_tokens, shared.first);
  __syncthreads();
  if (r.w2 != nullptr) {
    barrier_wait(shared_address(&fixed.router_barrier), 0);
    second_layer(r, reinterpret_cast<const T*>(shared.ring), shared.first, r.num_tokens, shared.scores, stride);
  } else {
    for (uint32_t i = threadIdx.x; i < r.num_tokens * r.num_experts; i += kThreads) {
      const uint32_t token = i / r.num_experts, e = i % r.num_experts;
      shared.scores[token * stride + e] = shared.first[token * padded_first(r.num_experts) + e];
    }
  }
  __syncthreads();
  if (p.scores != nullptr) {
    for (uint32_t i = threadIdx.x; i < r.num_tokens * r.num_experts; i += kThreads) {
      shared.scores[i / r.num_experts * stride + i % r.num_experts] = __ldcg(p.scores + i);
    }
    __syncthreads();
  }

  const uint32_t num_valid = valid_tokens(r);
  const uint32_t row_words = ceil_div(r.num_experts, 32);
#pragma unroll 1
  for (uint32_t token = warp; token < r.num_tokens; token += kWarps) {
    float* row = shared.scores + token * stride;
    uint32_t* keys = reinterpret_cast<uint32_t*>(row);
    uint32_t* words = fixed.masks[token];
#pragma unroll 1
    for (uint32_t e = lane_id(); e < stride; e += 32) {
      keys[e] = token < num_valid && e < r.num_experts ? score_key(row[e]) : 0;
    }
    __syncwarp();
    uint32_t* scratch = reinterpret_cast<uint32_t*>(shared.ring) + warp * MOEFY_FFN_FEW_EXPERTS;
    const bool selected = RowSelection{keys, scratch, r.num_experts, words}.run(r.selection);
    __syncwarp();
    if (blockIdx.x == 0) {
      if (r.mask != nullptr && lane_id() < row_words) r.mask[token * row_words + lane_id()] = words[lane_id()];
      if (r.status != nullptr && token < num_valid && !selected && lane_id() == 0) {
        atomicOr(r.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
      }
    }
    keys_to_gates(p.gate, r.num_experts, words, row);
  }
  // The copy engine writes next where threads have sorted.
  if (r.selection.rule == MOEFY_RULE_CUMULATIVE_SHARE) fence_for_copies();
  __syncthreads();
}

/// The union of the tokens' experts, with the tokens of each; returns its size.
template <int kTiles>
__device__ __forceinline__ uint32_t unite(const moefy_router_select_params& r, Fixed<kTiles>& fixed) {
  uint32_t size = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < r.num_experts; first += kThreads) {
    const uint32_t expert = first + threadIdx.x;
    uint32_t bits = 0;
    if (expert < r.num_experts) {
#pragma unroll 1
      for (uint32_t token = 0; token < r.num_tokens; ++token) {
        bits |= (fixed.masks[token][expert / 32] >> (expert % 32) & 1) << token;
      }
      fixed.token_bits[expert] = bits;
    }
    const uint32_t present = __ballot_sync(kFullWarp, bits != 0);
    const Team<kWarps> team;
    const uint2 sums = team.sum_before_and_all(__popc(present));
    if (bits != 0) fixed.union_ids[size + sums.x + __popc(present & ((1u << lane_id()) - 1))] = expert;
    size += sums.y;
  }
  __syncthreads();
  return size;
}

__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, __half) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

__device__ __forceinline__ void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

/// Two 8x8 matrices, each transposed; lane 8i + r, i < 2, gives the address of row r of matrix i.
__device__ __forceinline__ void load_two_transposed(uint32_t (&m)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(address)
               : "memory");
}

/// kTiles: tiles of eight tokens. kSteps: steps of 32 columns of d_model that a warp owns, at most. kNeurons: neurons of
/// a stage, 8 or 16; a GLU takes 8, whose gate rows and up rows make one fragment.
template <class T, int kTiles, int kSteps, int kNeurons>
struct FfnFew {
  static constexpr int kValues = (kTiles * kTile * kNeurons + kThreads - 1) / kThreads;
  using X = uint4[kSteps][kTiles];
  using Y = float[kSteps * 2][kTiles][4];

  const moefy_ffn_few_params& p;
  Fixed<kTiles>& fixed;
  const Sized shared;
  const uint32_t row_bytes, in_rows;
  // This warp's columns.
  const uint32_t first_step, num_steps;
  uint32_t union_neurons = 0, my_neurons = 0;

  __device__ FfnFew(const moefy_ffn_few_params& params, Fixed<kTiles>& fixed_memory, unsigned char* memory)
      : p(params),
        fixed(fixed_memory),
        shared(params.router, memory),
        row_bytes(params.neurons.d_model * sizeof(T)),
        in_rows((params.neurons.glu + 1) * kNeurons),
        first_step(threadIdx.x / 32 * steps_per_warp()),
        num_steps(min(steps_per_warp(), all_steps() - min(first_step, all_steps()))) {}

  __device__ uint32_t all_steps() const { return ceil_div(p.neurons.d_model, kStepColumns); }
  __device__ uint32_t steps_per_warp() const { return ceil_div(all_steps(), kWarps); }
  __device__ uint32_t in_stage(uint32_t stage) const {
    return shared_address(shared.ring) + stage * in_rows * in_row_stride(row_bytes);
  }
  __device__ uint32_t out_stage(uint32_t stage) const {
    return in_stage(p.num_stages) + stage * kNeurons * out_row_stride(row_bytes);
  }
  __device__ uint32_t in_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[0][stage]); }
  __device__ uint32_t out_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[1][stage]); }

  /// Neurons of a block of them that exist.
  __device__ uint32_t count(uint32_t block) const { return min(my_neurons - block * kNeurons, uint32_t(kNeurons)); }

  /// Asks for the rows of w_in of a block of neurons; one warp does it.
  __device__ void issue_in(uint32_t block) const {
    const moefy_neurons& n = p.neurons;
    const uint32_t stage = block % p.num_stages;
    const uint32_t slot = lane_id() % kNeurons;
    const bool runs = slot < count(block) && lane_id() < in_rows;
    RingEntry entry = {0, kNoExpert};
    const uint32_t index = blockIdx.x + (block * kNeurons + slot) * gridDim.x;
    if (index < union_neurons) {
      entry.expert = fixed.union_ids[index / n.expert_width];
      entry.neuron = entry.expert * n.expert_width + index % n.expert_width;
    } else {
      entry.neuron = routed_neurons(n) + index - union_neurons;
    }
    if (runs && lane_id() < kNeurons) fixed.entries[stage][slot] = entry;
    if (lane_id() == 0) barrier_expect(in_barrier(stage), count(block) * (n.glu + 1) * row_bytes);
    __syncwarp();
    if (!runs) return;
    const uint64_t row = lane_id() < kNeurons ? input_row(n, entry.neuron) : up_row(n, entry.neuron);
    copy_bulk(in_stage(stage) + lane_id() * in_row_stride(row_bytes),
              static_cast<const char*>(n.w_in) + row * row_bytes, row_bytes, in_barrier(stage));
  }

  /// The same for w_out, after issue_in.
  __device__ void issue_out(uint32_t block) const {
    const uint32_t stage = block % p.num_stages;
    if (lane_id() == 0) barrier_expect(out_barrier(stage), count(block) * row_bytes);
    __syncwarp();
    if (lane_id() >= count(block)) return;
    const uint64_t row = fixed.entries[stage][lane_id()].neuron;
    copy_bulk(out_stage(stage) + lane_id() * out_row_stride(row_bytes),
              static_cast<const char*>(p.neurons.w_out) + row * row_bytes, row_bytes, out_barrier(stage));
  }

  /// Lane 4g + t takes 16 bytes of token g of every tile: the k of a step in an order in which w_in is read too.
  __device__ void load_x(X& x) const {
    const uint32_t g = lane_id() / 4;
    const uint32_t column = first_step * kStepColumns + lane_id() % 4 * 8;
    const T* from = static_cast<const T*>(p.router.x) + g * p.neurons.d_model + column;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const bool inside =
            i < num_steps && tile * kTile + g < p.router.num_tokens && column + i * kStepColumns < p.neurons.d_model;
        x[i][tile] = inside ? __ldcg(reinterpret_cast<const uint4*>(from + tile * kTile * p.neurons.d_model +
                                                                    i * kStepColumns))
                            : uint4{};
      }
    }
  }

  /// Products of a stage's rows of w_in with this warp's columns of the tokens.
  __device__ void multiply_in(uint32_t stage, const X& x) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    float c[kTiles][4] = {};
    // Beyond the last row, another one: nobody looks at its sums.
    const uint32_t row_stride = in_row_stride(row_bytes);
    const uint32_t low = in_stage(stage) + g * row_stride + first_step * (kStepColumns * sizeof(T)) + t * 16;
    const uint32_t high = in_rows == 16 ? low + 8 * row_stride : low;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= num_steps) break;
      const uint4 a = load_shared_vector(low + i * (kStepColumns * sizeof(T)));
      const uint4 b = load_shared_vector(high + i * (kStepColumns * sizeof(T)));
      const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        mma(c[tile], first, x[i][tile].x, x[i][tile].y, T());
        mma(c[tile], second, x[i][tile].z, x[i][tile].w, T());
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&fixed.sums[threadIdx.x / 32][tile][g + half * 8][2 * t]) =
            make_float2(c[tile][2 * half], c[tile][2 * half + 1]);
      }
    }
  }

  /// Adds a stage's rows of w_out, weighted by h, to this warp's columns of y.
  __device__ void multiply_out(Y& y, uint32_t stage, uint32_t neurons) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    uint32_t h[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t* of_token = reinterpret_cast<const uint32_t*>(fixed.hidden[tile][g]);
      h[tile][0] = of_token[t];
      h[tile][1] = of_token[t + 4];
    }
    // Of neurons that do not exist, h is 0; their rows would be whatever was there before.
    const uint32_t row = min(lane_id() % 8 + (kNeurons == 16 ? lane_id() / 16 * 8 : 0), neurons - 1);
    const uint32_t from = out_stage(stage) + row * out_row_stride(row_bytes) +
                          (first_step * kStepColumns + lane_id() / 8 % 2 * 8) * sizeof(T);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (i >= num_steps) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = from + (i * kStepColumns + half * 16) * sizeof(T);
        if constexpr (kNeurons == 16) {
          uint32_t w[4];
          load_matrices_transposed(w, at);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) mma(y[2 * i + half][tile], w, h[tile][0], h[tile][1], T());
        } else {
          uint32_t w[2];
          load_two_transposed(w, at);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) mma_k8(y[2 * i + half][tile], w[0], w[1], h[tile][0], T());
        }
      }
    }
  }

  /// A neuron and a token whose h a thread computes.
  struct Value {
    uint32_t tile, token, slot;
    bool runs;
    RingEntry entry;
    NeuronConstants constants;
  };

  __device__ Value find_value(uint32_t index, uint32_t stage, uint32_t neurons) const {
    Value v = {index / (kTile * kNeurons), index % kTile, index / kTile % kNeurons, false, {}, {}};
    v.runs = v.tile < kTiles && v.slot < neurons;
    if (!v.runs) return v;
    v.entry = fixed.entries[stage][v.slot];
    const uint32_t token = v.tile * kTile + v.token;
    v.runs = v.entry.expert == kNoExpert || (fixed.token_bits[v.entry.expert] >> token & 1);
    if (v.runs) v.constants = neuron_constants(p.neurons, v.entry.neuron);
    return v;
  }

  /// h from the sums of all warps.
  __device__ float hidden_value(const Value& v) const {
    float pre = 0.0f, up = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      pre += fixed.sums[w][v.tile][v.slot][v.token];
      if (kNeurons == 8) up += fixed.sums[w][v.tile][v.slot + 8][v.token];
    }
    float value = neuron_value(p.neurons, v.entry.neuron, v.constants, pre, up);
    if (v.entry.expert != kNoExpert && p.gate != MOEFY_GATE_ONE) {
      value *= shared.scores[(v.tile * kTile + v.token) * round_up_32(p.router.num_experts) + v.entry.expert];
    }
    return value;
  }

  __device__ void run() {
    const moefy_neurons& n = p.neurons;
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < p.num_stages; ++stage) {
        barrier_init(in_barrier(stage));
        barrier_init(out_barrier(stage));
      }
      barrier_init(shared_address(&fixed.router_barrier));
      fence_for_copies();
      if (p.router.w2 != nullptr) {
        ask_for_router(p.router, sizeof(T), shared_address(shared.ring), shared_address(&fixed.router_barrier));
      }
    }
    launch_dependents();
    wait_for_dependencies();
    X x;
    load_x(x);
    route<T>(p, fixed, shared);
    union_neurons = unite(p.router, fixed) * n.expert_width;
    const uint32_t all = union_neurons + n.shared + n.rank;
    my_neurons = all > blockIdx.x ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0;
    const uint32_t num_blocks = ceil_div(my_neurons, kNeurons);
    // Where d_model is no multiple of 32, the last step reads beyond a row: x is 0 there, so w_in must be a number.
    if (n.d_model % kStepColumns != 0) {
      const uint32_t end = ceil_div(row_bytes, 64) * 64;
      for (uint32_t i = threadIdx.x; i < p.num_stages * in_rows; i += kThreads) {
        unsigned char* row = shared.ring + i * in_row_stride(row_bytes);
        for (uint32_t k = row_bytes; k < end; k += 16) *reinterpret_cast<uint4*>(row + k) = uint4{};
      }
      __syncthreads();
    }
    if (warp == kIssuer) {
#pragma unroll 1
      for (uint32_t block = 0; block < min(num_blocks, p.num_stages); ++block) {
        issue_in(block);
        issue_out(block);
      }
    }
    __syncthreads();

    Y y = {};
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      const uint32_t stage = block % p.num_stages, parity = block / p.num_stages & 1;
      const uint32_t neurons = count(block);
      // What a thread needs beside the sums is asked for early.
      Value values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = find_value(threadIdx.x + i * kThreads, stage, neurons);
      barrier_wait(in_barrier(stage), parity);
      multiply_in(stage, x);
      __syncthreads();
      if (warp == kIssuer && block + p.num_stages < num_blocks) issue_in(block + p.num_stages);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const Value& v = values[i];
        if (v.tile >= kTiles) continue;
        reinterpret_cast<T&>(fixed.hidden[v.tile][v.token][v.slot]) = from_float<T>(v.runs ? hidden_value(v) : 0.0f);
      }
      __syncthreads();
      barrier_wait(out_barrier(stage), parity);
      multiply_out(y, stage, neurons);
      if (block + p.num_stages < num_blocks) {
        __syncthreads();
        if (warp == kIssuer) issue_out(block + p.num_stages);
      }
    }
    store(y);
  }

  __device__ void store(const Y& y) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint64_t d_model = p.neurons.d_model;
    const uint32_t column = first_step * kStepColumns + g;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t token = tile * kTile + 2 * t + odd;
        if (token >= p.router.num_tokens) continue;
        float* to = p.partials + (static_cast<uint64_t>(blockIdx.x) * p.router.num_tokens + token) * d_model + column;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (i >= num_steps) break;
#pragma unroll
          for (int eight = 0; eight < 4; ++eight) {
            if (column + i * kStepColumns + eight * 8 < d_model) {
              to[i * kStepColumns + eight * 8] = y[2 * i + eight / 2][tile][eight % 2 * 2 + odd];
            }
          }
        }
      }
    }
  }
};

/// y of MOEFY_FFN_FEW_COLUMNS columns of one token: groups of 16 threads take turns at the shares, then add up.
template <class T>
__device__ __forceinline__ void combine(const moefy_ffn_few_params& p) {
  constexpr uint32_t kColumns = MOEFY_FFN_FEW_COLUMNS;
  constexpr uint32_t kGroups = 256 * 4 / kColumns;
  constexpr int kBatch = 9;  // shares of 132 multiprocessors at once
  __shared__ __align__(16) float sums[kGroups][kColumns];
  const uint64_t d_model = p.neurons.d_model;
  const uint32_t token = blockIdx.y;
  const uint32_t group = threadIdx.x / (kColumns / 4);
  const uint32_t column = threadIdx.x % (kColumns / 4) * 4;
  const uint32_t column0 = blockIdx.x * kColumns;
  const uint32_t own = column0 + threadIdx.x;
  launch_dependents();
  float sum = 0.0f;
  if (threadIdx.x < kColumns && own < d_model && p.neurons.b_out != nullptr) sum = p.neurons.b_out[own];
  wait_for_dependencies();
  float4 v = {};
  if (column0 + column < d_model) {
    const float* from = p.partials + (static_cast<uint64_t>(group) * p.router.num_tokens + token) * d_model + column0 +
                        column;
    const uint64_t step = static_cast<uint64_t>(kGroups) * p.router.num_tokens * d_model;
#pragma unroll 1
    for (uint32_t first = group; first < p.num_blocks; first += kBatch * kGroups, from += kBatch * step) {
      float4 shares[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool exists = first + i * kGroups < p.num_blocks;
        shares[i] = exists ? __ldcg(reinterpret_cast<const float4*>(from + i * step)) : float4{};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        v = make_float4(v.x + shares[i].x, v.y + shares[i].y, v.z + shares[i].z, v.w + shares[i].w);
      }
    }
  }
  *reinterpret_cast<float4*>(&sums[group][column]) = v;
  __syncthreads();
  if (threadIdx.x >= kColumns || own >= d_model) return;
#pragma unroll
  for (uint32_t g = 0; g < kGroups; ++g) sum += sums[g][threadIdx.x];
  static_cast<T*>(p.y)[token * d_model + own] = from_float<T>(token < valid_tokens(p.router) ? sum : 0.0f);
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: Sized, with a ring of ring_bytes.
#define MOEFY_FFN_FEW(name, type, tiles, steps, neurons, per_sm)                                              \
  extern "C" __global__ void __launch_bounds__(MOEFY_FFN_FEW_THREADS, per_sm)                                 \
      moefy_ffn_few_##name##_##tiles##_##steps##_##neurons(const __grid_constant__ moefy_ffn_few_params p) { \
    extern __shared__ __align__(128) unsigned char memory[];                                                  \
    __shared__ moefy::Fixed<tiles> fixed;                                                                     \
    moefy::FfnFew<type, tiles, steps, neurons>(p, fixed, memory).run();                                       \
  }
#define MOEFY_FFN_FEW_OF(name, type)                                                 \
  MOEFY_FFN_FEW(name, type, 1, 4, 8, 2)                                              \
  MOEFY_FFN_FEW(name, type, 1, 4, 16, 2)                                             \
  MOEFY_FFN_FEW(name, type, 1, 16, 8, 1)                                             \
  MOEFY_FFN_FEW(name, type, 1, 16, 16, 1)                                            \
  MOEFY_FFN_FEW(name, type, 2, 8, 8, 1)                                              \
  MOEFY_FFN_FEW(name, type, 2, 8, 16, 1)                                             \
  MOEFY_FFN_FEW(name, type, 4, 4, 8, 1)                                              \
  MOEFY_FFN_FEW(name, type, 4, 4, 16, 1)                                             \
  extern "C" __global__ void __launch_bounds__(256)                                  \
      moefy_ffn_few_combine_##name(const __grid_constant__ moefy_ffn_few_params p) { \
    moefy::combine<type>(p);                                                         \
  }

MOEFY_FFN_FEW_OF(f16, __half)
MOEFY_FFN_FEW_OF(bf16, __nv_bfloat16)
