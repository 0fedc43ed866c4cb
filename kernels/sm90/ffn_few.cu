// The op `ffn_few`: a whole layer for few tokens in three launches, each of which begins while the one before it runs.
//
// moefy_router_select of Hopper routes, where it can. Elsewhere moefy_ffn_few_router computes the first layer of the router,
// and every block of moefy_ffn_few finishes it and selects by itself, which costs less than to wait for another launch.
// moefy_ffn_few: the executed neurons of the tokens' union are dealt out one by one over the blocks, so that any width of
// expert fills the chip. A block streams whole rows of its neurons through a ring in shared memory, multiplies them with
// all tokens, and keeps its share of y in registers: a warp owns a slice of d_model in both products.
// moefy_add_shares adds the shares in their order.
//
// For one token of a small layer, what costs is the number of instructions that wait for each other: loads are
// predicated and never branched around, and code that runs once stays in loops.
#include "ffn_few.cuh"
#include "router.cuh"
#include "select.cuh"

namespace moefy {
namespace few {
namespace {

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
  uint64_t router_barrier;
  uint64_t parts_barrier;
  uint32_t max_keys[kTiles * kTile];  // of each token
  uint32_t masks[kTiles * kTile][kMaskWords];
  uint32_t warp_counts[kWarps];
  uint32_t union_ids[MOEFY_FFN_FEW_EXPERTS];
  uint32_t token_bits[MOEFY_FFN_FEW_EXPERTS];
  RingEntry entries[MOEFY_FFN_FEW_STAGES][16];
  alignas(16) Sums<kTiles> sums;
  alignas(16) uint16_t hidden[kTiles][kTile][16];
};

__host__ __device__ constexpr uint32_t round_up_128(uint32_t bytes) { return (bytes + 127) / 128 * 128; }

/// The rest, one after the other, each at a multiple of 128 bytes: the host adds up the same sizes.
struct Sized {
  uint32_t* keys;        // [num_tokens, round_up_32(num_experts)], later gates
  unsigned char* parts;  // [kParts * num_tokens] rows of `hidden` numbers of bf16
  // Before there are neurons: the second layer of the router, then its products, then what selection sorts.
  unsigned char* ring;

  __device__ Sized(const moefy_router_select_params& r, unsigned char* memory) {
    keys = reinterpret_cast<uint32_t*>(memory);
    parts = memory + round_up_128(4 * r.num_tokens * round_up_32(r.num_experts));
    ring = parts + (r.hidden == 0 ? 0 : kParts * r.num_tokens * in_row_stride(2 * r.hidden));
    ring += (128 - (ring - memory) % 128) % 128;
  }
};

/// The second layer of the router on tensor cores: products [num_experts, columns] of its rows with the parts of the
/// first layer, whose sum is exact. A column is a part of a token; columns come in eights.
struct SecondLayer {
  const moefy_ffn_few_params& p;
  const Sized& shared;
  float* products;
  uint32_t columns;

  /// Adds the products of 16 rows of a matrix, from `row0` on, with 128 inputs from `k0` on.
  __device__ __forceinline__ void multiply(uint32_t row0, uint32_t w2, uint32_t k0) const {
    const moefy_router_select_params& r = p.router;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t row_bytes = 2 * r.hidden, part_stride = in_row_stride(row_bytes);
    const uint32_t num_parts = kParts * r.num_tokens;
    const uint32_t low = min(row0 + g, r.num_experts - 1), high = min(row0 + g + 8, r.num_experts - 1);
    const uint32_t rows = shared_address(shared.ring) + w2 * r.num_experts * row_bytes;
    uint32_t at[4];
    uint4 a[4], d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t k = k0 + i * 32 + t * 8;
      at[i] = k < r.hidden ? 2 * k : kNoExpert;
      const uint32_t offset = k < r.hidden ? 2 * k : 0;
      a[i] = load_shared_vector(rows + low * row_bytes + offset);
      d[i] = load_shared_vector(rows + high * row_bytes + offset);
    }
#pragma unroll 1
    for (uint32_t column0 = 0; column0 < columns; column0 += 8) {
      const bool exists = column0 + g < num_parts;
      const uint32_t part = shared_address(shared.parts) + (exists ? column0 + g : 0) * part_stride;
      float c[4][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 b = load_shared_vector(part + (at[i] == kNoExpert ? 0 : at[i]));
        if (at[i] == kNoExpert || !exists) b = uint4{};
        const uint32_t first[4] = {a[i].x, d[i].x, a[i].y, d[i].y}, second[4] = {a[i].z, d[i].z, a[i].w, d[i].w};
        mma(c[i], first, b.x, b.y, __nv_bfloat16());
        mma(c[i], second, b.z, b.w, __nv_bfloat16());
      }
      float* to = products + (row0 + g) * columns + column0 + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half, to += 8 * columns) {
        float2 sum = w2 + k0 == 0 ? float2{} : *reinterpret_cast<float2*>(to);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum.x += c[i][2 * half];
          sum.y += c[i][2 * half + 1];
        }
        *reinterpret_cast<float2*>(to) = sum;
      }
    }
  }

  __device__ __forceinline__ void run() const {
#pragma unroll 1
    for (uint32_t row0 = threadIdx.x / 32 * 16; row0 < p.router.num_experts; row0 += kWarps * 16) {
#pragma unroll 1
      for (uint32_t w2 = 0; w2 < p.num_w2; ++w2) {
#pragma unroll 1
        for (uint32_t k0 = 0; k0 < p.router.hidden; k0 += 128) multiply(row0, w2, k0);
      }
    }
  }
};

/// The masks of another launch.
template <int kTiles>
__device__ __forceinline__ void load_masks(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed) {
  const uint32_t row_words = ceil_div(p.router.num_experts, 32);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < p.router.num_tokens * row_words; i += kThreads) {
    fixed.masks[i / row_words][i % row_words] = __ldcg(p.router.mask + i);
  }
  __syncthreads();
}

/// Scores as keys, and the largest of each token. Scores to be read instead are on their way to where the keys go.
template <int kTiles>
__device__ __forceinline__ void score(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t stride = round_up_32(r.num_experts);
  const uint32_t columns = (kParts * r.num_tokens + 7) / 8 * 8;
  float* products = reinterpret_cast<float*>(shared.ring + round_up_128(p.num_w2 * r.num_experts * r.hidden * 2));
  if (p.w2 != nullptr) {
    barrier_wait(shared_address(&fixed.router_barrier), 0);
    barrier_wait(shared_address(&fixed.parts_barrier), 0);
    SecondLayer{p, shared, products, columns}.run();
    __syncthreads();
  }
  if (r.imposed != nullptr) {
    copy_async_wait<0>();
    __syncthreads();
  }
  const uint32_t num_valid = valid_tokens(r);
#pragma unroll 1
  for (uint32_t word = threadIdx.x / 32; word < r.num_tokens * (stride / 32); word += kWarps) {
    const uint32_t token = word / (stride / 32), e = word % (stride / 32) * 32 + lane_id();
    uint32_t* key = shared.keys + token * stride + e;
    const bool exists = e < r.num_experts;
    float s = 0.0f;
    if (p.w2 != nullptr) {
      const float* of_parts = products + (exists ? e : 0) * columns + token * kParts;
      s = activate(second_activation(r.kind), (of_parts[2] + of_parts[1]) + of_parts[0]);
    } else if (exists) {
      s = __ldcg(r.first + token * r.num_experts + e);
    }
    if (r.imposed != nullptr) s = __uint_as_float(*key);
    const uint32_t own = exists && token < num_valid ? score_key(s) : 0;
    *key = own;
    const uint32_t largest = __reduce_max_sync(kFullWarp, own);
    if (lane_id() == 0) atomicMax(&fixed.max_keys[token], largest);
  }
  __syncthreads();
}

/// Whether the thresholds follow from the largest scores alone: dynamic-k without a cap, on rows without special values.
template <int kTiles>
__device__ __forceinline__ bool is_plain_threshold(const moefy_ffn_few_params& p, const Fixed<kTiles>& fixed) {
  const moefy_router_select_params& r = p.router;
  const moefy_selection& rule = r.selection;
  if (rule.rule != MOEFY_RULE_DYNAMIC_K || rule.max_experts < r.num_experts || p.gate != MOEFY_GATE_ONE) return false;
  const uint32_t key = lane_id() < r.num_tokens ? fixed.max_keys[lane_id()] : 0;
  const bool plain = key < kInfinityKey && key_score(key) > 0;
  return __all_sync(kFullWarp, plain || lane_id() >= valid_tokens(r)) && rule.threshold > 0;
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

/// Any rule on any scores, a warp for a token.
template <int kTiles>
__device__ __forceinline__ void select_rows(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t warp = threadIdx.x / 32, num_valid = valid_tokens(r);
#pragma unroll 1
  for (uint32_t token = warp; token < r.num_tokens; token += kWarps) {
    uint32_t* keys = shared.keys + token * round_up_32(r.num_experts);
    uint32_t* scratch = reinterpret_cast<uint32_t*>(shared.ring) + warp * MOEFY_FFN_FEW_EXPERTS;
    const bool selected = RowSelection{keys, scratch, r.num_experts, fixed.masks[token]}.run(r.selection);
    __syncwarp();
    const bool lost = blockIdx.x == 0 && r.status != nullptr && token < num_valid && !selected;
    if (lost && lane_id() == 0) atomicOr(r.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
    if (p.gate != MOEFY_GATE_ONE) keys_to_gates(p.gate, r.num_experts, fixed.masks[token], keys);
  }
  __syncthreads();
}

/// The union of the tokens' experts, with the tokens of each; returns its size.
template <int kTiles>
__device__ __forceinline__ uint32_t unite(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  const uint32_t stride = round_up_32(r.num_experts);
  const bool plain = !p.is_routed && is_plain_threshold(p, fixed);
  if (!plain && !p.is_routed) select_rows(p, fixed, shared);
  // Lane t has the threshold of token t.
  const float largest = key_score(fixed.max_keys[min(lane_id(), r.num_tokens - 1)]);
  const uint32_t own_least = max(score_key(r.selection.threshold * largest), 1u);
  const bool writes = !p.is_routed && blockIdx.x == 0 && r.mask != nullptr;
  uint32_t size = 0;
#pragma unroll 1
  for (uint32_t first = 0; first < r.num_experts; first += kThreads) {
    const uint32_t expert = first + threadIdx.x;
    const uint32_t existing = min(expert, r.num_experts - 1);
    uint32_t bits = 0;
#pragma unroll 2
    for (uint32_t token = 0; token < r.num_tokens; ++token) {
      const uint32_t least = __shfl_sync(kFullWarp, own_least, token);
      const bool selects = plain ? shared.keys[token * stride + existing] >= least
                                 : fixed.masks[token][existing / 32] >> (existing % 32) & 1;
      bits |= uint32_t(selects && expert < r.num_experts) << token;
    }
    if (writes) {
#pragma unroll 1
      for (uint32_t token = 0; token < r.num_tokens; ++token) {
        const uint32_t word = __ballot_sync(kFullWarp, bits >> token & 1);
        if (lane_id() == 0 && expert < r.num_experts) r.mask[token * (stride / 32) + expert / 32] = word;
      }
    }
    const uint32_t present = __ballot_sync(kFullWarp, bits != 0);
    if (first > 0) __syncthreads();  // the last counts have been read
    if (lane_id() == 0) fixed.warp_counts[threadIdx.x / 32] = __popc(present);
    __syncthreads();
    uint32_t rank = size + __popc(present & ((1u << lane_id()) - 1));
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = fixed.warp_counts[w];
      rank += w < int(threadIdx.x / 32) ? count : 0;
      size += count;
    }
    if (bits != 0) {
      fixed.union_ids[rank] = expert;
      fixed.token_bits[expert] = bits;
    }
  }
  // The copy engine writes next where threads have written.
  fence_for_copies();
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

/// kTiles: tiles of eight tokens. kSteps: steps of 32 columns of d_model that a warp owns, at most. kNeurons: neurons of
/// a stage, 8 or 16; a GLU takes 8, whose gate rows and up rows make one fragment.
template <class T, int kTiles, int kSteps, int kNeurons>
struct Stream {
  static constexpr int kValues = (kTiles * kTile * kNeurons + kThreads - 1) / kThreads;
  using Y = float[kSteps * 2][kTiles][4];

  const moefy_ffn_few_params& p;
  Fixed<kTiles>& fixed;
  const Sized shared;
  const Slice<T, kTiles, kSteps> slice;
  const uint32_t in_rows;
  uint32_t union_neurons = 0, my_neurons = 0;

  __device__ Stream(const moefy_ffn_few_params& params, Fixed<kTiles>& fixed_memory, unsigned char* memory)
      : p(params),
        fixed(fixed_memory),
        shared(params.router, memory),
        slice(params.neurons.d_model),
        in_rows((params.neurons.glu + 1) * params.stage_neurons) {}

  __device__ uint32_t in_stage(uint32_t stage) const {
    return shared_address(shared.ring) + stage * in_rows * in_row_stride(slice.row_bytes);
  }
  __device__ uint32_t out_stage(uint32_t stage) const {
    return in_stage(p.num_stages) + stage * p.stage_neurons * out_row_stride(slice.row_bytes);
  }
  __device__ uint32_t in_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[0][stage]); }
  __device__ uint32_t out_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[1][stage]); }

  /// Scores to be read instead of the router's, to where the keys will be.
  __device__ void ask_for_scores() const {
    const uint32_t num_experts = p.router.num_experts;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < p.router.num_tokens * num_experts; i += kThreads) {
      const uint32_t at = i / num_experts * round_up_32(num_experts) + i % num_experts;
      copy_async_word(shared_address(shared.keys + at), p.router.imposed + i);
    }
    copy_async_commit();
  }

  /// Neurons of a block of them that exist.
  __device__ uint32_t count(uint32_t block) const {
    return min(my_neurons - block * p.stage_neurons, p.stage_neurons);
  }

  __device__ RingEntry find(uint32_t index) const {
    const moefy_neurons& n = p.neurons;
    if (index >= union_neurons) return {routed_neurons(n) + index - union_neurons, kNoExpert};
    // Exact: indices are below 2^21, and half a step away from the next multiple.
    const uint32_t rank = static_cast<uint32_t>((index + 0.5f) * p.inverse_width);
    const uint32_t expert = fixed.union_ids[rank];
    return {expert * n.expert_width + index - rank * n.expert_width, expert};
  }

  /// Asks for the rows of w_in of a block of neurons, of w_out, or of both. All warps do it together, a lane for a row:
  /// to ask takes long enough to be shared.
  __device__ void issue(uint32_t block, bool in, bool out) const {
    const moefy_neurons& n = p.neurons;
    const uint32_t stage = block % p.num_stages, neurons = count(block);
    if (threadIdx.x == 0) {
      if (in) barrier_expect(in_barrier(stage), neurons * (n.glu + 1) * slice.row_bytes);
      if (out) barrier_expect(out_barrier(stage), neurons * slice.row_bytes);
    }
    // First the rows of w_in, then those of w_out.
    const uint32_t place = threadIdx.x / 32 + lane_id() * kWarps;
    const bool is_out = place >= in_rows;
    const uint32_t row_of_kind = is_out ? place - in_rows : place;
    const bool is_up = row_of_kind >= p.stage_neurons;  // of a GLU
    const uint32_t slot = is_up ? row_of_kind - p.stage_neurons : row_of_kind;
    if (slot >= neurons || (is_out ? !out || is_up : !in)) return;
    const RingEntry entry = find(blockIdx.x + (block * p.stage_neurons + slot) * gridDim.x);
    if (!is_out && !is_up) fixed.entries[stage][slot] = entry;
    const uint64_t row = is_up ? up_row(n, entry.neuron) : is_out ? entry.neuron : input_row(n, entry.neuron);
    const uint32_t to = is_out ? out_stage(stage) + slot * out_row_stride(slice.row_bytes)
                               : in_stage(stage) + place * in_row_stride(slice.row_bytes);
    const char* from = static_cast<const char*>(is_out ? n.w_out : n.w_in) + row * slice.row_bytes;
    copy_bulk(to, from, slice.row_bytes, is_out ? out_barrier(stage) : in_barrier(stage));
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
    const uint32_t from = out_stage(stage) + row * out_row_stride(slice.row_bytes);
    const uint32_t steps = slice.opaque_num_steps();
    // Columns beyond d_model, which nobody stores, get others: what comes after a row may be on its way.
    const auto within = [&](uint32_t offset) { return offset < slice.row_bytes ? offset : 0; };
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kNeurons == 16) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t w[4];
          load_matrices_transposed(w, from + within(slice.step_offset(i, steps) + (half * 2 + lane_id() / 8 % 2) * 16));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) mma(y[2 * i + half][tile], w, h[tile][0], h[tile][1], T());
        }
      } else {
        uint32_t w[4];
        load_matrices_transposed(w, from + within(slice.step_offset(i, steps) + lane_id() / 8 * 16));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma_k8(y[2 * i][tile], w[0], w[1], h[tile][0], T());
          mma_k8(y[2 * i + 1][tile], w[2], w[3], h[tile][0], T());
        }
      }
    }
  }

  /// Which h a thread computes, by number.
  struct Place {
    uint32_t tile, token, slot;

    __device__ explicit Place(uint32_t index)
        : tile(index / (kTile * kNeurons)), token(index % kTile), slot(index / kTile % kNeurons) {}
  };

  /// What it needs beside the sums.
  struct Value {
    RingEntry entry;  // the neuron is kNoExpert where nothing runs
    NeuronConstants constants;
  };

  __device__ Value find_value(const Place& at, uint32_t stage, uint32_t neurons) const {
    Value v = {{kNoExpert, kNoExpert}, {}};
    if (at.tile >= kTiles || at.slot >= neurons) return v;
    const RingEntry entry = fixed.entries[stage][at.slot];
    if (entry.expert != kNoExpert && !(fixed.token_bits[entry.expert] >> (at.tile * kTile + at.token) & 1)) return v;
    return {entry, neuron_constants(p.neurons, entry.neuron)};
  }

  /// h from the sums of all warps.
  __device__ float hidden_value(const Place& at, const Value& v) const {
    if (v.entry.neuron == kNoExpert) return 0.0f;
    float pre = 0.0f, up = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      pre += fixed.sums[w][at.tile][at.slot][at.token];
      if (kNeurons == 8) up += fixed.sums[w][at.tile][at.slot + 8][at.token];
    }
    float value = neuron_value<T>(p.neurons, v.entry.neuron, v.constants, pre, up);
    if (v.entry.expert != kNoExpert && p.gate != MOEFY_GATE_ONE) {
      const uint32_t token = at.tile * kTile + at.token;
      value *= __uint_as_float(shared.keys[token * round_up_32(p.router.num_experts) + v.entry.expert]);
    }
    return value;
  }

  __device__ void run() {
    const moefy_neurons& n = p.neurons;
    if (threadIdx.x == 0) {
      for (uint32_t stage = 0; stage < p.num_stages; ++stage) {
        barrier_init(in_barrier(stage));
        barrier_init(out_barrier(stage));
      }
      barrier_init(shared_address(&fixed.router_barrier));
      barrier_init(shared_address(&fixed.parts_barrier));
      fence_barriers();
      if (p.w2 != nullptr) {
        const uint32_t bytes = p.num_w2 * p.router.num_experts * p.router.hidden * 2;
        barrier_expect(shared_address(&fixed.router_barrier), bytes);
        copy_bulk(shared_address(shared.ring), p.w2, bytes, shared_address(&fixed.router_barrier));
      }
    }
    touch(p);
    launch_dependents();
    if (threadIdx.x < kTiles * kTile) fixed.max_keys[threadIdx.x] = 0;
    if (p.router.imposed != nullptr) {
      const uint32_t all = p.router.num_tokens * p.router.num_experts;
      for (uint32_t i = threadIdx.x * 32; i < all; i += kThreads * 32) prefetch(p.router.imposed + i);
    }
    __syncthreads();
    wait_for_dependencies();
    if (threadIdx.x == 0 && p.w2 != nullptr) {
      const uint32_t bytes = kParts * p.router.num_tokens * in_row_stride(2 * p.router.hidden);
      barrier_expect(shared_address(&fixed.parts_barrier), bytes);
      copy_bulk(shared_address(shared.parts), p.router.first, bytes, shared_address(&fixed.parts_barrier));
    }
    if (p.router.imposed != nullptr) ask_for_scores();
    typename Slice<T, kTiles, kSteps>::X x;
    slice.load(p.router.x, p.router.num_tokens, x);
    if (p.is_routed) {
      load_masks(p, fixed);
    } else {
      score(p, fixed, shared);
    }
    union_neurons = unite(p, fixed, shared) * n.expert_width;
    const uint32_t all = union_neurons + n.shared + n.rank;
    my_neurons = all > blockIdx.x ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0;
    const uint32_t num_blocks = ceil_div(my_neurons, p.stage_neurons);
#pragma unroll 1
    for (uint32_t block = 0; block < min(num_blocks, p.num_stages); ++block) issue(block, true, true);
    if (n.d_model % kStepColumns != 0) {
      for (uint32_t i = threadIdx.x; i < p.num_stages * in_rows; i += kThreads) {
        slice.clear_row_end(shared.ring + i * in_row_stride(slice.row_bytes));
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
      for (int i = 0; i < kValues; ++i) values[i] = find_value(Place(threadIdx.x + i * kThreads), stage, neurons);
      barrier_wait(in_barrier(stage), parity);
      // The second half of a fragment holds up rows, or neurons 8 to 15.
      const uint32_t low = in_stage(stage);
      const uint32_t half = n.glu ? p.stage_neurons : kNeurons == 16 ? 8 : 0;
      slice.multiply(low, low + half * in_row_stride(slice.row_bytes), min(p.stage_neurons, 8u), x, fixed.sums);
      __syncthreads();
      if (block + p.num_stages < num_blocks) issue(block + p.num_stages, true, false);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const Place at(threadIdx.x + i * kThreads);
        if (at.tile >= kTiles) continue;
        reinterpret_cast<T&>(fixed.hidden[at.tile][at.token][at.slot]) = from_float<T>(hidden_value(at, values[i]));
      }
      __syncthreads();
      barrier_wait(out_barrier(stage), parity);
      multiply_out(y, stage, neurons);
      if (block + p.num_stages < num_blocks) {
        __syncthreads();
        issue(block + p.num_stages, false, true);
      }
    }
    store(y);
  }

  __device__ void store(const Y& y) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint64_t d_model = p.neurons.d_model;
    const uint32_t column = slice.first_step * kStepColumns + g;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t token = tile * kTile + 2 * t + odd;
        if (token >= p.router.num_tokens) continue;
        float* to = p.partials + (static_cast<uint64_t>(blockIdx.x) * p.router.num_tokens + token) * d_model + column;
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
};

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: Sized, with a ring of ring_bytes.
#define MOEFY_FFN_FEW(name, type, tiles, steps, neurons, per_sm)                                              \
  extern "C" __global__ void __launch_bounds__(MOEFY_FFN_FEW_THREADS, per_sm)                                 \
      moefy_ffn_few_##name##_##tiles##_##steps##_##neurons(const __grid_constant__ moefy_ffn_few_params p) { \
    extern __shared__ __align__(128) unsigned char memory[];                                                  \
    __shared__ moefy::few::Fixed<tiles> fixed;                                                                \
    moefy::few::Stream<type, tiles, steps, neurons>(p, fixed, memory).run();                                  \
  }
#define MOEFY_FFN_FEW_OF(name, type)      \
  MOEFY_FFN_FEW(name, type, 1, 4, 8, 2)   \
  MOEFY_FFN_FEW(name, type, 1, 4, 16, 2)  \
  MOEFY_FFN_FEW(name, type, 1, 16, 8, 1)  \
  MOEFY_FFN_FEW(name, type, 1, 16, 16, 1) \
  MOEFY_FFN_FEW(name, type, 2, 8, 8, 1)   \
  MOEFY_FFN_FEW(name, type, 2, 8, 16, 1)  \
  MOEFY_FFN_FEW(name, type, 4, 4, 8, 1)   \
  MOEFY_FFN_FEW(name, type, 4, 4, 16, 1)

MOEFY_FFN_FEW_OF(f16, __half)
MOEFY_FFN_FEW_OF(bf16, __nv_bfloat16)
