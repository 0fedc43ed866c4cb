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
constexpr uint32_t kRowPad = 16;  // bytes: neighbouring rows begin in other banks

/// What a neuron in the ring is: where its weights are, and whose tokens it gets.
struct RingEntry {
  uint32_t neuron;
  uint32_t expert;  // kNoExpert: all tokens
};

/// What has a fixed size in shared memory.
template <int kTiles>
struct Fixed {
  uint64_t barriers[2][MOEFY_FFN_FEW_STAGES];  // rows of w_in, rows of w_out
  uint32_t masks[kTiles * kTile][kMaskWords];
  uint32_t union_ids[MOEFY_FFN_FEW_EXPERTS];
  uint32_t token_bits[MOEFY_FFN_FEW_EXPERTS];
  RingEntry entries[MOEFY_FFN_FEW_STAGES][16];
  alignas(16) float sums[kWarps][kTiles][16][kTile];
  alignas(16) uint16_t hidden[kTiles][kTile][16];
};

/// The rest, one after the other, each at a multiple of 128 bytes: the host adds up the same sizes.
struct Sized {
  float* scores;  // [num_tokens, num_experts], later gates
  float* first;   // [num_tokens, padded(first_width)]
  unsigned char* ring;

  __device__ Sized(const moefy_router_select_params& r, unsigned char* memory) {
    const auto round_up = [](uint32_t bytes) { return (bytes + 127) / 128 * 128; };
    scores = reinterpret_cast<float*>(memory);
    memory += round_up(4 * r.num_tokens * r.num_experts);
    first = reinterpret_cast<float*>(memory);
    ring = memory + round_up(4 * r.num_tokens * padded(first_width(r)));
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

/// A row of scores becomes a row of gates; a warp does it.
__device__ __forceinline__ void scores_to_gates(moefy_gate gate, uint32_t num_experts, const uint32_t* mask,
                                                float* scores) {
  if (gate != MOEFY_GATE_SOFTMAX && gate != MOEFY_GATE_RENORMALISED) return;
  float max = -INFINITY;
  for (uint32_t e = lane_id(); e < num_experts; e += 32) max = fmaxf(max, scores[e]);  // skips NaN
  max = warp_max(max);
  float sum = 0.0f;
  for (uint32_t e = lane_id(); e < num_experts; e += 32) {
    const bool counts = gate == MOEFY_GATE_SOFTMAX || (mask[e / 32] >> (e % 32) & 1);
    if (counts && !isnan(scores[e])) sum += expf(scores[e] - max);
  }
  sum = warp_sum(sum);
  for (uint32_t e = lane_id(); e < num_experts; e += 32) scores[e] = expf(scores[e] - max) / sum;
}

/// Scores, masks, gates, and the union of the tokens' experts with the tokens of each; returns the size of the union.
template <class T, int kTiles, int kRounds>
__device__ __forceinline__ uint32_t route(const moefy_ffn_few_params& p, Fixed<kTiles>& fixed, const Sized& shared) {
  const moefy_router_select_params& r = p.router;
  SecondLayer<true, T, kRounds> second;
  if (r.w2 != nullptr) second.load(r);
  wait_for_dependencies();
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t width = first_width(r);
  const uint32_t num_valid = valid_tokens(r);
  for (uint32_t i = threadIdx.x; i < r.num_tokens * padded(width); i += kThreads) {
    const uint32_t token = i / padded(width), k = i % padded(width);
    shared.first[i] = k < width ? __ldcg(r.first + static_cast<uint64_t>(token) * width + k) : 0.0f;
  }
  __syncthreads();
  if (r.w2 != nullptr) {
    for (uint32_t token = 0; token < r.num_tokens; ++token) {
      second.run(r, shared.first + token * padded(width), shared.scores + token * r.num_experts);
    }
  } else {
    for (uint32_t i = threadIdx.x; i < r.num_tokens * r.num_experts; i += kThreads) {
      shared.scores[i] = shared.first[i / r.num_experts * padded(width) + i % r.num_experts];
    }
  }
  __syncthreads();
  if (p.scores != nullptr) {
    for (uint32_t i = threadIdx.x; i < r.num_tokens * r.num_experts; i += kThreads) {
      shared.scores[i] = __ldcg(p.scores + i);
    }
    __syncthreads();
  }

  for (uint32_t token = warp; token < r.num_tokens; token += kWarps) {
    float* scores = shared.scores + token * r.num_experts;
    uint32_t* words = fixed.masks[token];
    const bool valid = token < num_valid;
    uint32_t keys[kWordsPerWarp], mask[kWordsPerWarp];
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      const uint32_t expert = j * 32 + lane_id();
      keys[j] = valid && expert < r.num_experts ? score_key(scores[expert]) : 0;
    }
    // The ring is still empty: its memory can hold what CUMULATIVE_SHARE sorts.
    uint32_t* scratch = reinterpret_cast<uint32_t*>(shared.ring) + warp * MOEFY_FFN_FEW_EXPERTS;
    const Team<1> team;
    const bool selected = RowSelection<Team<1>>{team, keys, r.num_experts}.run(r.selection, scratch, mask);
    uint32_t word = 0;  // of this lane
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) word = lane_id() == uint32_t(j) ? mask[j] : word;
    if (lane_id() < kMaskWords) words[lane_id()] = word;
    __syncwarp();
    if (blockIdx.x == 0) {
      const uint32_t row_words = ceil_div(r.num_experts, 32);
      if (r.mask != nullptr && lane_id() < row_words) r.mask[token * row_words + lane_id()] = word;
      if (r.status != nullptr && valid && !selected && lane_id() == 0) {
        atomicOr(r.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
      }
    }
    scores_to_gates(p.gate, r.num_experts, words, scores);
  }
  __syncthreads();

  uint32_t size = 0;
  for (uint32_t first = 0; first < r.num_experts; first += kThreads) {
    const uint32_t expert = first + threadIdx.x;
    uint32_t bits = 0;
    if (expert < r.num_experts) {
      for (uint32_t token = 0; token < r.num_tokens; ++token) {
        bits |= (fixed.masks[token][expert / 32] >> (expert % 32) & 1) << token;
      }
      fixed.token_bits[expert] = bits;
    }
    const uint32_t present = __ballot_sync(kFullWarp, bits != 0);
    const Team<kWarps> team;
    const uint32_t before = team.sum_of_warps_before(__popc(present)) + __popc(present & ((1u << lane_id()) - 1));
    if (bits != 0) fixed.union_ids[size + before] = expert;
    size += team.sum(bits != 0);
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

/// kTiles: tiles of eight tokens. kColumns: groups of 16 columns of d_model that a warp owns, at most. kNeurons: neurons
/// of a stage, 8 or 16; a GLU takes 8, whose gate rows and up rows make one fragment.
template <class T, int kTiles, int kColumns, int kNeurons>
struct FfnFew {
  const moefy_ffn_few_params& p;
  Fixed<kTiles>& fixed;
  const Sized shared;
  const uint32_t row_bytes, row_stride, in_rows;
  uint32_t union_neurons = 0, my_neurons = 0;

  __device__ FfnFew(const moefy_ffn_few_params& params, Fixed<kTiles>& fixed_memory, unsigned char* memory)
      : p(params),
        fixed(fixed_memory),
        shared(params.router, memory),
        row_bytes(params.neurons.d_model * sizeof(T)),
        row_stride(row_bytes + kRowPad),
        in_rows((params.neurons.glu + 1) * kNeurons) {}

  __device__ uint32_t in_stage(uint32_t stage) const {
    return shared_address(shared.ring) + stage * in_rows * row_stride;
  }
  __device__ uint32_t out_stage(uint32_t stage) const {
    return in_stage(p.num_stages) + stage * kNeurons * row_stride;
  }
  __device__ uint32_t in_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[0][stage]); }
  __device__ uint32_t out_barrier(uint32_t stage) const { return shared_address(&fixed.barriers[1][stage]); }

  /// Neurons of a block of them that exist.
  __device__ uint32_t count(uint32_t block) const { return min(my_neurons - block * kNeurons, uint32_t(kNeurons)); }

  __device__ RingEntry find(uint32_t index) const {
    const moefy_neurons& n = p.neurons;
    const uint32_t global = blockIdx.x + index * gridDim.x;
    if (global >= union_neurons) return {routed_neurons(n) + global - union_neurons, kNoExpert};
    const uint32_t expert = fixed.union_ids[global / n.expert_width];
    return {expert * n.expert_width + global % n.expert_width, expert};
  }

  /// Asks for the rows of w_in of a block of neurons; one warp does it.
  __device__ void issue_in(uint32_t block) const {
    const uint32_t stage = block % p.num_stages;
    const uint32_t slot = lane_id() % kNeurons;
    const bool runs = slot < count(block) && lane_id() < in_rows;
    RingEntry entry = {};
    if (runs) entry = find(block * kNeurons + slot);
    if (runs && lane_id() < kNeurons) fixed.entries[stage][slot] = entry;
    if (lane_id() == 0) barrier_expect(in_barrier(stage), count(block) * (p.neurons.glu + 1) * row_bytes);
    __syncwarp();
    if (!runs) return;
    const uint64_t row =
        lane_id() < kNeurons ? input_row(p.neurons, entry.neuron) : up_row(p.neurons, entry.neuron);
    copy_bulk(in_stage(stage) + lane_id() * row_stride, static_cast<const char*>(p.neurons.w_in) + row * row_bytes,
              row_bytes, in_barrier(stage));
  }

  __device__ void issue_out(uint32_t block) const {
    const uint32_t stage = block % p.num_stages;
    if (lane_id() == 0) barrier_expect(out_barrier(stage), count(block) * row_bytes);
    __syncwarp();
    if (lane_id() >= count(block)) return;
    const uint64_t row = find(block * kNeurons + lane_id()).neuron;
    copy_bulk(out_stage(stage) + lane_id() * row_stride, static_cast<const char*>(p.neurons.w_out) + row * row_bytes,
              row_bytes, out_barrier(stage));
  }

  /// Fragments of x: the columns that this warp owns, of every token.
  __device__ void load_x(uint32_t (&x)[kColumns][kTiles][2], uint32_t column0, uint32_t num_columns) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t token = tile * kTile + g;
        const uint32_t* row = reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.router.x) +
                                                                token * p.neurons.d_model);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t column = column0 + i * 16 + half * 8 + 2 * t;
          const bool inside = i < num_columns && token < p.router.num_tokens && column < p.neurons.d_model;
          x[i][tile][half] = inside ? __ldcg(row + column / 2) : 0;
        }
      }
    }
  }

  /// Products of a stage's rows of w_in with this warp's slice of the tokens.
  __device__ void multiply_in(uint32_t stage, const uint32_t (&x)[kColumns][kTiles][2], uint32_t column0,
                              uint32_t num_columns) const {
    float c[kTiles][4] = {};
    const uint32_t row = min(lane_id() % 16, in_rows - 1);
    const uint32_t from = in_stage(stage) + row * row_stride + (column0 + lane_id() / 16 * 8) * sizeof(T);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i >= num_columns) break;
      uint32_t w[4];
      load_matrices(w, from + i * 16 * sizeof(T));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) mma(c[tile], w, x[i][tile][0], x[i][tile][1], T());
    }
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
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
  __device__ void multiply_out(float (&y)[kColumns][kTiles][4], uint32_t stage, uint32_t neurons, uint32_t column0, uint32_t num_columns) const {
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
    const uint32_t from = out_stage(stage) + row * row_stride + (column0 + lane_id() / 8 % 2 * 8) * sizeof(T);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i >= num_columns) break;
      if constexpr (kNeurons == 16) {
        uint32_t w[4];
        load_matrices_transposed(w, from + i * 16 * sizeof(T));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma(y[i][tile], w, h[tile][0], h[tile][1], T());
      } else {
        uint32_t w[2];
        load_two_transposed(w, from + i * 16 * sizeof(T));
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma_k8(y[i][tile], w[0], w[1], h[tile][0], T());
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
  static constexpr int kValues = (kTiles * kTile * kNeurons + kThreads - 1) / kThreads;

  /// h from the sums of all warps.
  __device__ float hidden_value(const Value& v) const {
    const moefy_neurons& n = p.neurons;
    float pre = 0.0f, up = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      pre += fixed.sums[w][v.tile][v.slot][v.token];
      if (kNeurons == 8 && n.glu) up += fixed.sums[w][v.tile][v.slot + 8][v.token];
    }
    const uint32_t token = v.tile * kTile + v.token;
    if (v.entry.expert != kNoExpert && !(fixed.token_bits[v.entry.expert] >> token & 1)) return 0.0f;
    float value = neuron_value(n, v.entry.neuron, v.constants, pre, up);
    if (v.entry.expert != kNoExpert && p.gate != MOEFY_GATE_ONE) {
      value *= shared.scores[token * p.router.num_experts + v.entry.expert];
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
    }
    fence_for_copies();
    launch_dependents();
    // A warp's columns: as many groups of 16 for each, the last warps may have fewer or none.
    const uint32_t groups = ceil_div(n.d_model, 16);
    const uint32_t per_warp = ceil_div(groups, kWarps);
    const uint32_t num_columns = min(per_warp, groups - min(warp * per_warp, groups));
    const uint32_t column0 = warp * per_warp * 16;
    const uint32_t size =
        p.router.num_experts <= 128 ? route<T, kTiles, 2>(p, fixed, shared) : route<T, kTiles, 8>(p, fixed, shared);
    uint32_t x[kColumns][kTiles][2];
    load_x(x, column0, num_columns);
    float y[kColumns][kTiles][4] = {};
    // Where d_model is an odd multiple of 8, the last fragment reads beyond a row: x is 0 there.
    for (uint32_t i = threadIdx.x; i < p.num_stages * in_rows; i += kThreads) {
      *reinterpret_cast<uint4*>(shared.ring + i * row_stride + row_bytes) = uint4{};
    }
    fence_for_copies();
    union_neurons = size * n.expert_width;
    const uint32_t all = union_neurons + n.shared + n.rank;
    my_neurons = all > blockIdx.x ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0;
    const uint32_t num_blocks = ceil_div(my_neurons, kNeurons);
    __syncthreads();
    if (warp == kIssuer) {
      for (uint32_t block = 0; block < min(num_blocks, p.num_stages); ++block) {
        issue_in(block);
        issue_out(block);
      }
    }
    __syncthreads();

    for (uint32_t block = 0; block < num_blocks; ++block) {
      const uint32_t stage = block % p.num_stages, parity = block / p.num_stages & 1;
      const uint32_t neurons = count(block);
      // One thread for each neuron and token; what it needs beside the sums is asked for early.
      Value values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const uint32_t index = threadIdx.x + i * kThreads;
        Value& v = values[i];
        v.token = index % kTile;
        v.slot = index / kTile % kNeurons;
        v.tile = index / (kTile * kNeurons);
        v.runs = v.tile < kTiles && v.slot < neurons;
        if (!v.runs) continue;
        v.entry = fixed.entries[stage][v.slot];
        v.constants = neuron_constants(n, v.entry.neuron);
      }
      barrier_wait(in_barrier(stage), parity);
      if (num_columns > 0) {
        multiply_in(stage, x, column0, num_columns);
      } else {
        for (uint32_t i = lane_id(); i < kTiles * 16 * kTile; i += 32) fixed.sums[warp][0][0][i] = 0.0f;
      }
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
      if (num_columns > 0) multiply_out(y, stage, neurons, column0, num_columns);
      if (block + p.num_stages < num_blocks) {
        __syncthreads();
        if (warp == kIssuer) issue_out(block + p.num_stages);
      }
    }
    store(y, column0, num_columns);
  }

  __device__ void store(const float (&y)[kColumns][kTiles][4], uint32_t column0, uint32_t num_columns) const {
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint64_t d_model = p.neurons.d_model;
    float* partials = p.partials + blockIdx.x * p.router.num_tokens * d_model;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i >= num_columns) break;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t token = tile * kTile + 2 * t + j % 2;
          const uint32_t column = column0 + i * 16 + g + j / 2 * 8;
          if (token < p.router.num_tokens && column < d_model) partials[token * d_model + column] = y[i][tile][j];
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
#pragma unroll 9
    for (uint32_t block = group; block < p.num_blocks; block += kGroups) {
      const uint64_t row = static_cast<uint64_t>(block) * p.router.num_tokens + token;
      const float4 share = __ldcg(reinterpret_cast<const float4*>(p.partials + row * d_model + column0 + column));
      v = make_float4(v.x + share.x, v.y + share.y, v.z + share.z, v.w + share.w);
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
#define MOEFY_FFN_FEW(name, type, tiles, columns, neurons)                                                       \
  extern "C" __global__ void __launch_bounds__(MOEFY_FFN_FEW_THREADS, 1)                                         \
      moefy_ffn_few_##name##_##tiles##_##neurons(const __grid_constant__ moefy_ffn_few_params p) {               \
    extern __shared__ __align__(128) unsigned char memory[];                                                     \
    __shared__ moefy::Fixed<tiles> fixed;                                                                        \
    moefy::FfnFew<type, tiles, columns, neurons> few(p, fixed, memory);                                          \
    few.run();                                                                                                   \
  }
#define MOEFY_FFN_FEW_OF(name, type)                                                                             \
  MOEFY_FFN_FEW(name, type, 1, 32, 8)                                                                            \
  MOEFY_FFN_FEW(name, type, 1, 32, 16)                                                                           \
  MOEFY_FFN_FEW(name, type, 2, 16, 8)                                                                             \
  MOEFY_FFN_FEW(name, type, 2, 16, 16)                                                                            \
  MOEFY_FFN_FEW(name, type, 4, 8, 8)                                                                             \
  MOEFY_FFN_FEW(name, type, 4, 8, 16)                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                              \
      moefy_ffn_few_combine_##name(const __grid_constant__ moefy_ffn_few_params p) {                             \
    moefy::combine<type>(p);                                                                                     \
  }

MOEFY_FFN_FEW_OF(f16, __half)
MOEFY_FFN_FEW_OF(bf16, __nv_bfloat16)
