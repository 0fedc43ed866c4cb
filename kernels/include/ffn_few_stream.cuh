// Hopper: the executed neurons of a few tokens, from the scores of the router to each block's share of y.
//
// The executed neurons of the tokens' union are dealt out one by one over the blocks, so that any width of expert fills
// the chip. A block streams whole rows of its neurons through a ring in shared memory, multiplies them with all tokens, and
// keeps its share of y in registers: a warp owns a slice of d_model in both products.
//
// For one token of a small layer, what costs is the number of instructions that wait for each other: loads are
// predicated and never branched around, and code that runs once stays in loops.
#pragma once

#include "ffn_few.cuh"
#include "router.cuh"
#include "select.cuh"

namespace moefy {
namespace few {

constexpr uint32_t kMaskWords = MOEFY_FFN_FEW_EXPERTS / 32;

/// What a neuron in the ring is: where its weights are, and whose tokens it gets.
struct RingEntry {
  uint32_t neuron;
  uint32_t expert;  // kNoExpert: all tokens
};

/// What has a fixed size in shared memory.
template <int kTiles>
struct Fixed {
  uint64_t barriers[2][MOEFY_FFN_FEW_STAGES];  // rows of w_in, rows of w_out
  uint32_t least_keys[kTiles * kTile];  // that a token selects; kNoKey: none, 0: select_rows has to find out
  uint32_t masks[kTiles * kTile][kMaskWords];
  alignas(16) uint32_t warp_counts[kWarps];
  uint32_t union_ids[MOEFY_FFN_FEW_EXPERTS];
  uint32_t token_bits[MOEFY_FFN_FEW_EXPERTS];
  RingEntry entries[MOEFY_FFN_FEW_STAGES][16];
  alignas(16) Sums<kTiles> sums;
  alignas(16) uint16_t hidden[kTiles][kTile][16];
};

__host__ __device__ constexpr uint32_t round_up_128(uint32_t bytes) { return (bytes + 127) / 128 * 128; }

/// The rest, one after the other, each at a multiple of 128 bytes: the host adds up the same sizes.
struct Sized {
  uint32_t* keys;                // [num_tokens, round_up_32(num_experts)], later gates
  unsigned char* router_inputs;  // what the routing of a kernel needs beside the ring
  unsigned char* routing;        // the rest of what it needs: the router's, then what selection sorts
  unsigned char* ring;           // the same place where rows are asked for later

  /// `routing_bytes`: 0 where it is the ring's place.
  __device__ Sized(uint32_t num_tokens, uint32_t num_experts, unsigned char* memory, uint32_t router_bytes,
                   uint32_t routing_bytes)
      : keys(reinterpret_cast<uint32_t*>(memory)),
        router_inputs(memory + round_up_128(4 * num_tokens * round_up_32(num_experts))),
        routing(router_inputs + round_up_128(router_bytes)),
        ring(routing + round_up_128(routing_bytes)) {}
};

/// Asks for scores to be read instead of the router's, to where the keys will be.
__device__ __forceinline__ void ask_for_scores(const moefy_router_select_params& r, uint32_t num_tokens, uint32_t* keys) {
  if (r.imposed == nullptr) return;
#pragma unroll 1
  for (uint32_t e = threadIdx.x; e < r.num_experts; e += kThreads) {
#pragma unroll 4
    for (uint32_t token = 0; token < num_tokens; ++token) {
      copy_async_word(shared_address(keys + token * round_up_32(r.num_experts) + e), r.imposed + token * r.num_experts + e);
    }
  }
  copy_async_commit();
}

/// Waits for scores to be read instead of the router's, which are on their way to where the keys go.
__device__ __forceinline__ void wait_for_imposed(const moefy_router_select_params& r) {
  if (r.imposed == nullptr) return;
  copy_async_wait<0>();
  __syncthreads();
}

/// Scores as keys, and the least key that each token selects, by a warp for a token: `score_of` reads the score of a token
/// and an expert, which may lie where the keys go.
template <int kTiles, class Score>
__device__ __forceinline__ void make_keys(const moefy_router_select_params& r, uint32_t num_tokens, uint32_t num_valid,
                                          Fixed<kTiles>& fixed, uint32_t* keys, Score score_of) {
  constexpr int kAtOnce = 4;  // scores that a lane reads before it writes
  const uint32_t stride = round_up_32(r.num_experts);
#pragma unroll 1
  for (uint32_t token = threadIdx.x / 32; token < num_tokens; token += kWarps) {
    uint32_t largest = 0;
#pragma unroll 1
    for (uint32_t first = lane_id(); first < stride; first += 32 * kAtOnce) {
      float scores[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t e = first + i * 32;
        scores[i] = e < r.num_experts ? score_of(token, e) : -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t key = token < num_valid ? score_key(scores[i]) : 0, e = first + i * 32;
        if (e < stride) keys[token * stride + e] = key;
        largest = max(largest, key);
      }
    }
    const uint32_t least = plain_threshold(r.selection, r.num_experts, __reduce_max_sync(kFullWarp, largest));
    if (lane_id() == 0) fixed.least_keys[token] = token < num_valid ? least : kNoKey;
  }
  __syncthreads();
}

/// A row of keys becomes a row of gates; a warp does it.
__device__ __forceinline__ void keys_to_gates(moefy_gate gate, uint32_t num_experts, const uint32_t* mask,
                                              uint32_t* keys) {
  float* row = reinterpret_cast<float*>(keys);
  float max = -INFINITY;
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) {
    row[e] = keys[e] == 0 ? -INFINITY : key_score(keys[e]);  // NaN counts as -inf
    max = fmaxf(max, row[e]);
  }
  if (gate == MOEFY_GATE_SCORE) return;
  float sum = 0.0f;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, step));
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) {
    row[e] = expf(row[e] - max);
    if (gate == MOEFY_GATE_SOFTMAX || (mask[e / 32] >> (e % 32) & 1)) sum += row[e];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
#pragma unroll 1
  for (uint32_t e = lane_id(); e < num_experts; e += 32) row[e] /= sum;
}

/// Any rule on any scores, a warp for a token. Not in line: code that is rarely run would lie between what always is.
template <int kTiles>
__device__ __noinline__ void select_rows(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, Sized shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t warp = threadIdx.x / 32, num_valid = valid_tokens(r);
#pragma unroll 1
  for (uint32_t token = warp; token < r.num_tokens; token += kWarps) {
    uint32_t* keys = shared.keys + token * round_up_32(r.num_experts);
    uint32_t* scratch = reinterpret_cast<uint32_t*>(shared.routing) + warp * MOEFY_FFN_FEW_EXPERTS;
    const bool selected = RowSelection{keys, scratch, r.num_experts, fixed.masks[token]}.run(r.selection);
    __syncwarp();
    const bool lost = blockIdx.x == 0 && r.status != nullptr && token < num_valid && !selected;
    if (lost && lane_id() == 0) atomicOr(r.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
    if (p.gate != MOEFY_GATE_ONE) keys_to_gates(p.gate, r.num_experts, fixed.masks[token], keys);
  }
  fence_for_copies();
  __syncthreads();
}

/// Whether the least keys say which experts run, and there are no gates.
template <int kTiles>
__device__ __forceinline__ bool is_plain(const moefy_ffn_few_params& p, uint32_t num_tokens, const Fixed<kTiles>& fixed) {
  return p.gate == MOEFY_GATE_ONE && __all_sync(kFullWarp, fixed.least_keys[min(lane_id(), num_tokens - 1)] != 0);
}

/// Whether this block is the one that tells others what was selected.
__device__ __forceinline__ bool writes_masks(const moefy_router_select_params& r) {
  return blockIdx.x == 0 && r.mask != nullptr;
}

/// The union of the tokens' experts, with the tokens of each; returns its size.
template <int kTiles>
__device__ __forceinline__ uint32_t unite(const moefy_ffn_few_params& p, uint32_t num_tokens, Fixed<kTiles>& fixed,
                                          const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t stride = round_up_32(r.num_experts), warp = threadIdx.x / 32;
  const bool plain = is_plain(p, num_tokens, fixed), writes = writes_masks(r);
  if (!plain) select_rows(p, fixed, shared);
  uint32_t size = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < r.num_experts; first += kThreads) {
    const uint32_t expert = first + threadIdx.x;
    const uint32_t existing = min(expert, r.num_experts - 1);
    uint32_t bits = 0;
    if (plain) {
#pragma unroll 1
      for (uint32_t token0 = 0; token0 < num_tokens; token0 += 2) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          const uint32_t token = min(token0 + i, num_tokens - 1);
          bits |= uint32_t(shared.keys[token * stride + existing] >= fixed.least_keys[token]) << token;
        }
      }
    } else {
#pragma unroll 1
      for (uint32_t token = 0; token < num_tokens; ++token) {
        bits |= (fixed.masks[token][existing / 32] >> (existing % 32) & 1) << token;
      }
    }
    if (expert >= r.num_experts) bits = 0;
    if (writes) {
#pragma unroll 1
      for (uint32_t token = 0; token < num_tokens; ++token) {
        const uint32_t word = __ballot_sync(kFullWarp, bits >> token & 1);
        if (lane_id() == 0 && expert < r.num_experts) r.mask[token * (stride / 32) + expert / 32] = word;
      }
    }
    const uint32_t present = __ballot_sync(kFullWarp, bits != 0);
    if (first > 0) __syncthreads();  // the last counts have been read
    if (lane_id() == 0) fixed.warp_counts[warp] = __popc(present);
    __syncthreads();
    uint32_t rank = size + __popc(present & ((1u << lane_id()) - 1));
#pragma unroll
    for (uint32_t w = 0; w < kWarps; ++w) {
      const uint32_t count = fixed.warp_counts[w];
      rank += w < warp ? count : 0;
      size += count;
    }
    if (bits != 0) {
      fixed.union_ids[rank] = expert;
      fixed.token_bits[expert] = bits;
    }
  }
  __syncthreads();
  return size;
}

/// Stores a warp's columns of the block's share of y.
template <class T, int kTiles, int kSteps>
__device__ __forceinline__ void store_share(const moefy_ffn_few_params& p, uint32_t num_tokens,
                                            const Slice<T, kTiles, kSteps>& slice, const float (&y)[kSteps * 2][kTiles][4]) {
  const uint32_t g = lane_id() / 4, t = lane_id() % 4;
  const uint64_t d_model = p.neurons.d_model;
  const uint32_t column = slice.first_step * kStepColumns + g;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t token = tile * kTile + 2 * t + odd;
      if (token >= num_tokens) continue;
      float* to = p.partials + (static_cast<uint64_t>(blockIdx.x) * num_tokens + token) * d_model + column;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (i >= slice.num_steps) break;
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

/// kTiles: tiles of eight tokens. kSteps: steps of 32 columns of d_model that a warp owns, at most. kNeurons: neurons of
/// a stage, 8 or 16; a GLU takes 8, whose gate rows and up rows make one fragment.
template <class T, int kTiles, int kSteps, int kNeurons>
struct Stream {
  static constexpr int kValues = (kTiles * kTile * kNeurons + kThreads - 1) / kThreads;
  using X = typename Slice<T, kTiles, kSteps>::X;
  using Y = float[kSteps * 2][kTiles][4];

  /// The row that this thread asks for in every stage: first come those of w_in, of a GLU those of the gates, then those of
  /// w_out. Known before anything else is.
  struct RowPlace {
    uint32_t kind, slot;
    uint32_t to, stage_bytes;  // in the first stage, and from stage to stage
    uint32_t barrier;          // of the first stage
    const char* weights;
  };

  const moefy_ffn_few_params& p;
  const uint32_t num_tokens;
  Fixed<kTiles>& fixed;
  const Sized shared;
  const Slice<T, kTiles, kSteps> slice;
  const RowPlace place;
  uint32_t union_neurons = 0, all_neurons = 0, my_neurons = 0;

  /// `tokens`: a constant where the compiler is to know it.
  __device__ Stream(const moefy_ffn_few_params& params, uint32_t tokens, Fixed<kTiles>& fixed_memory,
                    unsigned char* memory, uint32_t router_bytes)
      : p(params),
        num_tokens(tokens),
        fixed(fixed_memory),
        shared(tokens, params.router.num_experts, memory, router_bytes, 0),
        slice(params.neurons.d_model),
        place(row_place()) {}

  __device__ uint32_t stage_neurons() const { return 1u << p.log_stage_neurons; }
  __device__ uint32_t out_kind() const { return p.neurons.glu + 1; }
  __device__ uint32_t in_rows() const { return out_kind() * stage_neurons(); }
  __device__ uint32_t in_stage(uint32_t stage) const {
    return shared_address(shared.ring) + stage * in_rows() * in_row_stride(slice.row_bytes);
  }
  __device__ uint32_t out_stage(uint32_t stage) const {
    return in_stage(p.num_stages) + stage * stage_neurons() * out_row_stride(slice.row_bytes);
  }
  __device__ uint32_t in_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[0][stage]); }
  __device__ uint32_t out_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[1][stage]); }

  /// While the kernel before this one runs. One barrier of the block later, the ring is ready.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < p.num_stages; ++stage) {
        barrier_init(in_barrier(stage));
        barrier_init(out_barrier(stage));
      }
      fence_barriers();
    }
  }

  /// Neurons of the n-th stage that exist. All stages' neurons are the block's own.
  __device__ uint32_t count(uint32_t block) const {
    return min(my_neurons - block * stage_neurons(), stage_neurons());
  }

  __device__ RingEntry find(uint32_t index) const {
    const moefy_neurons& n = p.neurons;
    const bool is_routed = index < union_neurons;
    // Exact: indices are below 2^21, and half a step away from the next multiple.
    const uint32_t rank = is_routed ? static_cast<uint32_t>((index + 0.5f) * p.inverse_width) : 0;
    const uint32_t expert = fixed.union_ids[rank];
    if (!is_routed) return {routed_neurons(n) + index - union_neurons, kNoExpert};
    return {expert * n.expert_width + index - rank * n.expert_width, expert};
  }

  __device__ RowPlace row_place() const {
    const uint32_t number = threadIdx.x / 32 + lane_id() * kWarps, kind = number >> p.log_stage_neurons;
    const uint32_t slot = number & (stage_neurons() - 1), stride = kind == out_kind() ? out_row_stride(slice.row_bytes)
                                                                                      : in_row_stride(slice.row_bytes);
    return {kind,
            slot,
            kind == out_kind() ? out_stage(0) + slot * stride : in_stage(0) + number * stride,
            (kind == out_kind() ? stage_neurons() : in_rows()) * stride,
            kind == out_kind() ? out_barrier(0) : in_barrier(0),
            static_cast<const char*>(kind == out_kind() ? p.neurons.w_out : p.neurons.w_in)};
  }

  /// Asks for a stage's rows of w_in, of w_out, or of both. All warps do it together, a lane for a row:
  /// to ask takes long enough to be shared.
  __device__ void ask(uint32_t block, uint32_t stage, bool in, bool out) const {
    const moefy_neurons& n = p.neurons;
    const uint32_t index = blockIdx.x + (block * stage_neurons() + place.slot) * gridDim.x;
    const bool is_out = place.kind == out_kind();
    if (place.kind > out_kind() || index >= all_neurons || !(is_out ? out : in)) return;
    const RingEntry entry = find(index);
    if (place.kind == 0) fixed.entries[stage][place.slot] = entry;
    const uint32_t row = is_out ? entry.neuron : place.kind == 1 ? up_row(n, entry.neuron) : input_row(n, entry.neuron);
    copy_bulk(place.to + stage * place.stage_bytes, place.weights + static_cast<uint64_t>(row) * slice.row_bytes,
              slice.row_bytes, place.barrier + stage * sizeof(uint64_t));
  }

  /// Tells the barriers how many bytes come; some may have come already. The last warp has the fewest rows to ask for.
  __device__ void expect(uint32_t block, uint32_t stage, bool in, bool out) const {
    if (threadIdx.x != kThreads - 1) return;
    const uint32_t bytes = count(block) * slice.row_bytes;
    if (in) barrier_expect(in_barrier(stage), bytes * out_kind());
    if (out) barrier_expect(out_barrier(stage), bytes);
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
    // Columns beyond d_model get others: what comes after a row may be on its way.
    const uint32_t column_bytes = kStepColumns * sizeof(T), inside = lane_id() / 8 % (kNeurons == 16 ? 2 : 4) * 16;
    const uint32_t bytes = slice.bytes_before(slice.row_bytes), first = bytes > inside ? inside : 0;
    const uint32_t from = out_stage(stage) + row * out_row_stride(slice.row_bytes) +
                          (bytes > 0 ? slice.first_step * column_bytes : 0) + first;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kNeurons == 16) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t w[4];
          load_matrices_transposed(w, from + slice.within(i * column_bytes + half * 32, bytes - first));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) mma(y[2 * i + half][tile], w, h[tile][0], h[tile][1], T());
        }
      } else {
        uint32_t w[4];
        load_matrices_transposed(w, from + slice.within(i * column_bytes, bytes - first));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_k8(y[2 * i][tile], w[0], w[1], h[tile][0], T());
          mma_k8(y[2 * i + 1][tile], w[2], w[3], h[tile][0], T());
        }
      }
    }
  }

  /// Which h a thread computes, by number.
  struct HiddenPlace {
    uint32_t tile, token, slot;

    __device__ explicit HiddenPlace(uint32_t index)
        : tile(index / (kTile * kNeurons)), token(index % kTile), slot(index / kTile % kNeurons) {}
  };

  /// What it needs beside the sums.
  struct Value {
    RingEntry entry;  // the neuron is kNoExpert where nothing runs
    NeuronConstants constants;
  };

  __device__ Value find_value(const HiddenPlace& at, uint32_t stage, uint32_t neurons) const {
    Value v = {{kNoExpert, kNoExpert}, {}};
    if (at.tile >= kTiles || at.slot >= neurons) return v;
    const RingEntry entry = fixed.entries[stage][at.slot];
    if (entry.expert != kNoExpert && !(fixed.token_bits[entry.expert] >> (at.tile * kTile + at.token) & 1)) return v;
    return {entry, neuron_constants(p.neurons, entry.neuron)};
  }

  /// h from the sums of all warps.
  __device__ float hidden_value(const HiddenPlace& at, const Value& v) const {
    if (v.entry.neuron == kNoExpert) return 0.0f;
    const float pre = sum_of_warps<kTiles>(fixed.sums, at.tile, at.slot, at.token);
    const float up = kNeurons == 8 ? sum_of_warps<kTiles>(fixed.sums, at.tile, at.slot + 8, at.token) : 0.0f;
    float value = neuron_value<T>(p.neurons, v.entry.neuron, v.constants, pre, up);
    if (v.entry.expert != kNoExpert && p.gate != MOEFY_GATE_ONE) {
      const uint32_t token = at.tile * kTile + at.token;
      value *= __uint_as_float(shared.keys[token * round_up_32(p.router.num_experts) + v.entry.expert]);
    }
    return value;
  }

  /// Selects, and runs what is selected for these tokens. Whoever used the ring before has said so to the copy engine.
  __device__ void run(const X& x) {
    const moefy_neurons& n = p.neurons;
    union_neurons = unite(p, num_tokens, fixed, shared) * n.expert_width;
    all_neurons = union_neurons + n.shared + n.rank;
#pragma unroll 1
    for (uint32_t block = 0; block < p.num_stages; ++block) ask(block, block, true, true);
    // Exact, as in `find`.
    my_neurons = all_neurons > blockIdx.x ? uint32_t((all_neurons - blockIdx.x - 0.5f) * p.inverse_blocks) + 1 : 0;
    const uint32_t num_blocks = (my_neurons + stage_neurons() - 1) >> p.log_stage_neurons;
#pragma unroll 1
    for (uint32_t block = 0; block < min(num_blocks, p.num_stages); ++block) expect(block, block, true, true);
    if (n.d_model % kStepColumns != 0) {
      for (uint32_t i = threadIdx.x; i < p.num_stages * in_rows(); i += kThreads) {
        slice.clear_row_end(shared.ring + i * in_row_stride(slice.row_bytes));
      }
    }
    __syncthreads();

    Y y = {};
    uint32_t stage = 0, parity = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      const uint32_t neurons = count(block);
      const bool goes_on = block + p.num_stages < num_blocks;
      // What a thread needs beside the sums is asked for early.
      Value values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] = find_value(HiddenPlace(threadIdx.x + i * kThreads), stage, neurons);
      barrier_wait(in_barrier(stage), parity);
      // The second half of a fragment holds up rows, or neurons 8 to 15.
      const uint32_t low = in_stage(stage);
      const uint32_t half = n.glu ? stage_neurons() : kNeurons == 16 ? 8 : 0;
      slice.multiply(low, low + half * in_row_stride(slice.row_bytes), min(stage_neurons(), 8u), x, fixed.sums);
      __syncthreads();
      if (goes_on) {
        ask(block + p.num_stages, stage, true, false);
        expect(block + p.num_stages, stage, true, false);
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const HiddenPlace at(threadIdx.x + i * kThreads);
        if (at.tile >= kTiles) continue;
        reinterpret_cast<T&>(fixed.hidden[at.tile][at.token][at.slot]) = from_float<T>(hidden_value(at, values[i]));
      }
      __syncthreads();
      barrier_wait(out_barrier(stage), parity);
      multiply_out(y, stage, neurons);
      if (goes_on) {
        __syncthreads();
        ask(block + p.num_stages, stage, false, true);
        expect(block + p.num_stages, stage, false, true);
      }
      if (++stage == p.num_stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    store_share(p, num_tokens, slice, y);
  }
};

}  // namespace few
}  // namespace moefy
