// The op `experts` for many tokens, second product, on Hopper, where many of the pairs exist: y of 128 tokens by 256 columns
// at a time, over all neurons that one of the tokens runs. What a token does not run is a zero in shared memory, not a read.
//
// One warpgroup copies: rows of h, from wherever the pairs of a token are; the copy engine brings the weights. The other two
// multiply 64 tokens each.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "store_lines.cuh"

namespace moefy {
namespace {

constexpr uint32_t kTokens = 128;
constexpr uint32_t kColumns = 256;
constexpr uint32_t kDepth = 64;  // neurons of a stage: rows of 128 bytes of h
constexpr int kRowBytes = 128;
constexpr uint32_t kHiddenBytes = kTokens * kRowBytes;
constexpr uint32_t kBlockBytes = kDepth * kRowBytes;  // of 64 columns of weights
constexpr uint32_t kBlocks = kColumns / 64;
constexpr uint32_t kStageBytes = kHiddenBytes + kBlocks * kBlockBytes;
constexpr int kStages = 4;
constexpr uint32_t kWords = kTokens / 32;

/// In shared memory: of each expert the tokens of the tile that select it, and the row of h of the first of them, which those
/// of the others follow; experts that any of them selects; stages that have one; whether a stage is the tile's last.
struct Lists {
  uint4* tokens;        // [num_experts]
  uint32_t* first_row;  // [num_experts]
  uint32_t* selected;   // [ceil(num_experts/32)]
  uint32_t* stages;     // [ceil(num_neurons/64/32)]
  uint32_t* is_last;    // [kStages]

  __device__ Lists(unsigned char* memory, const moefy_neurons& n) {
    tokens = reinterpret_cast<uint4*>(memory);
    first_row = reinterpret_cast<uint32_t*>(tokens + n.num_experts);
    selected = first_row + n.num_experts;
    stages = selected + ceil_div(n.num_experts, 32);
    is_last = stages + ceil_div(num_neurons(n), 32 * kDepth);
  }
};

/// A tile of y.
struct Tile {
  uint32_t token0;
  uint32_t column0;
};

__device__ __forceinline__ uint32_t num_tiles(const moefy_experts_params& p) {
  return ceil_div(p.num_tokens, kTokens) * ceil_div(p.neurons.d_model, kColumns);
}

__device__ __forceinline__ Tile tile_of(const moefy_experts_params& p, uint32_t index) {
  const uint32_t across = ceil_div(p.neurons.d_model, kColumns);
  return {index / across * kTokens, index % across * kColumns};
}

__device__ __forceinline__ void sync_copiers() { asm volatile("bar.sync 1, %0;" ::"n"(kCopiers) : "memory"); }

/// Whether one of the neurons from `neuron` to kDepth further runs. Those that all tokens run follow the experts'.
__device__ __forceinline__ bool runs(const moefy_neurons& n, const Lists& lists, uint32_t neuron) {
  if (neuron + kDepth > routed_neurons(n)) return true;
  const uint32_t last = (neuron + kDepth - 1) / n.expert_width;
  for (uint32_t expert = neuron / n.expert_width; expert <= last; ++expert) {
    if (lists.selected[expert / 32] >> (expert % 32) & 1) return true;
  }
  return false;
}

/// Fills the lists for the tile of tokens that begins at `token0`; a warp takes 32 of them.
__device__ __forceinline__ void list_tokens(const moefy_experts_params& p, const Lists& lists, uint32_t token0) {
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t num_experts = p.neurons.num_experts, row_words = ceil_div(num_experts, 32);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, valid = valid_tokens(p);
  const auto mask_of = [&](uint32_t token, uint32_t word) {
    return token < valid ? __ldcg(p.mask + static_cast<uint64_t>(token) * row_words + word) : 0;
  };
  for (uint32_t word = threadIdx.x; word < row_words; word += kCopiers) lists.selected[word] = 0;
  sync_copiers();
  for (uint32_t word = 0; word < row_words; ++word) {
    const uint32_t own = mask_of(token0 + threadIdx.x, word);
    uint32_t mine = 0;
#pragma unroll
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t tokens = __ballot_sync(kAll, own >> i & 1);
      mine = lane == i ? tokens : mine;
    }
    const uint32_t expert = word * 32 + lane;
    if (expert < num_experts) reinterpret_cast<uint32_t*>(lists.tokens + expert)[warp] = mine;
    const uint32_t any = __reduce_or_sync(kAll, own);
    if (lane == 0) atomicOr(lists.selected + word, any);
  }
  sync_copiers();
  for (uint32_t expert = threadIdx.x; expert < num_experts; expert += kCopiers) {
    const uint4 tokens = lists.tokens[expert];
    const uint32_t words[kWords] = {tokens.x, tokens.y, tokens.z, tokens.w};
    uint32_t first = kTokens;
#pragma unroll
    for (int word = kWords - 1; word >= 0; --word) {
      if (words[word] != 0) first = word * 32 + __ffs(words[word]) - 1;
    }
    lists.first_row[expert] = first == kTokens ? p.max_pairs : row_of_pair(p, token0 + first, expert);
  }
  const uint32_t num_stages = ceil_div(num_neurons(p.neurons), kDepth);
  for (uint32_t first = warp * 32; first < num_stages; first += kCopiers) {
    const uint32_t stage = first + lane;
    const uint32_t some = __ballot_sync(kAll, stage < num_stages && runs(p.neurons, lists, stage * kDepth));
    if (lane == 0) lists.stages[first / 32] = some;
  }
  sync_copiers();
}

/// Goes through the stages of a tile: at least the first, so that there are sums.
class Stages {
 public:
  __device__ Stages(const Lists& lists, uint32_t num_stages) : lists_(lists), words_(ceil_div(num_stages, 32)) {
    bits_ = lists.stages[0];
    next();
    if (!exists()) stage_ = 0;
  }

  __device__ bool exists() const { return stage_ != kNone; }
  __device__ uint32_t stage() const { return stage_; }

  __device__ void next() {
    while (bits_ == 0 && ++word_ < words_) bits_ = lists_.stages[word_];
    stage_ = bits_ == 0 ? kNone : word_ * 32 + __ffs(bits_) - 1;
    bits_ &= bits_ - 1;
  }

 private:
  static constexpr uint32_t kNone = 0xffffffffu;
  const Lists& lists_;
  uint32_t words_, word_ = 0, bits_, stage_;
};


/// Where the rows of h are that this thread copies 8 neurons of: rows threadIdx.x / 8 + 16 i of a tile. Places are in units of
/// 8 neurons. Found once for all stages of an expert, because one warp on each scheduler does all this.
class Places {
 public:
  __device__ explicit Places(const Lists& lists) : lists_(lists) {}

  /// Goes to the tile of tokens at `token0`.
  __device__ void begin(uint32_t token0) {
    token0_ = token0;
    first_ = end_ = 0;
  }

  /// Goes to the 8 neurons from `neuron` on.
  __device__ void go_to(const moefy_experts_params& p, uint32_t neuron) {
    if (neuron >= end_) find(p, neuron);
    inside_ = (neuron - first_) / 8;
  }

  /// Place of row i, if it exists.
  __device__ const uint4* operator()(const uint4* hidden, int i) const { return hidden + rows_[i] + inside_; }
  __device__ bool exists(int i) const { return rows_[i] != kNowhere; }

 private:
  static constexpr uint32_t kNowhere = 0xffffffffu;

  __device__ void find(const moefy_experts_params& p, uint32_t neuron) {
    const moefy_neurons& n = p.neurons;
    const uint32_t routed = routed_neurons(n), row0 = threadIdx.x / 8;
    if (neuron < routed) {
      const uint32_t expert = neuron / n.expert_width, stride = p.hidden_stride / 8;
      first_ = expert * n.expert_width;
      end_ = first_ + n.expert_width;
      const uint4 tokens = lists_.tokens[expert];
      const uint32_t words[kWords] = {tokens.x, tokens.y, tokens.z, tokens.w};
      uint32_t before = lists_.first_row[expert];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = words[i / 2], bit = 1u << (row0 + i % 2 * 16);
        // Lists that are full end within an expert, and with them its rows.
        const uint32_t row = before + __popc(word & (bit - 1));
        rows_[i] = (word & bit) != 0 && row < p.max_pairs ? row * stride : kNowhere;
        if (i % 2 == 1) before += __popc(word);
      }
      return;
    }
    const bool is_linear = neuron >= n.d_ff;
    const uint32_t width = is_linear ? n.rank : n.shared, stride = round_up_8(width) / 8, valid = valid_tokens(p);
    first_ = is_linear ? n.d_ff : routed;
    const bool runs = neuron < first_ + width;
    end_ = runs ? first_ + round_up_8(width) : 0xffffffffu;
    const uint32_t base = (is_linear ? p.hidden_linear : p.hidden_shared) / 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t token = token0_ + row0 + i * 16;
      rows_[i] = runs && token < valid ? base + token * stride : kNowhere;
    }
  }

  const Lists& lists_;
  uint32_t token0_ = 0, first_ = 0, end_ = 0, inside_ = 0;
  uint32_t rows_[8];
};

__device__ __forceinline__ void copy_tiles(const moefy_experts_params& p, const moefy_tensor_map& w_out,
                                           const Lists& lists, uint32_t memory, const Pipeline<kStages, true>& pipeline) {
  const moefy_neurons& n = p.neurons;
  const uint32_t chunk = threadIdx.x % 8, row0 = threadIdx.x / 8, num_stages = ceil_div(num_neurons(n), kDepth);
  const uint4* hidden = static_cast<const uint4*>(p.hidden);
  Places places(lists);
  Copier<kStages, true> copier(pipeline);
  for (uint32_t index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const Tile tile = tile_of(p, index);
    list_tokens(p, lists, tile.token0);
    places.begin(tile.token0);
    Stages stages(lists, num_stages);
    while (stages.exists()) {
      const uint32_t neuron0 = stages.stage() * kDepth;
      stages.next();
      const uint32_t slot = copier.begin(), to = memory + slot * kStageBytes;
      if (threadIdx.x == 0) {
        const uint32_t full = pipeline.full(slot);
        lists.is_last[slot] = !stages.exists();
        barrier_expect(full, kBlocks * kBlockBytes);
#pragma unroll
        for (uint32_t block = 0; block < kBlocks; ++block) {
          copy_box(to + kHiddenBytes + block * kBlockBytes, w_out, {tile.column0 + block * 64, neuron0, 0, 0}, full);
        }
      }
      places.go_to(p, neuron0 + chunk * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool exists = places.exists(i);
        copy_async(to + swizzled<kRowBytes>(row0 + i * 16, chunk), exists ? places(hidden, i) : hidden, exists);
      }
      copier.end();
    }
    sync_copiers();  // everybody has read the lists
  }
}

template <class T>
__device__ __forceinline__ void multiply_tiles(const moefy_experts_params& p, const Lists& lists, uint32_t memory,
                                               const Pipeline<kStages, true>& pipeline) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group_token = thread / 128 * 64, valid = valid_tokens(p);
  Multiplier<kStages, true> multiplier(pipeline);
  for (uint32_t index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const Tile tile = tile_of(p, index);
    float c[kColumns / 2];
    bool adds = false, is_last = false;
#pragma unroll 1
    while (!is_last) {
      const uint32_t slot = multiplier.begin(), from = memory + slot * kStageBytes;
      // Read by the lane that says when the stage can be filled again.
      is_last = __shfl_sync(0xffffffffu, thread % 32 == 0 && lists.is_last[slot] != 0, 0);
      const uint64_t a = operand_of_rows(from + group_token * kRowBytes);
      const uint64_t b = operand_of_columns(from + kHiddenBytes, kBlockBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < int(kDepth / 16); ++step) {
        wgmma<T, true>(c, a + 2 * step, b + 128 * step, adds || step > 0);
      }
      wgmma_commit();
      multiplier.end();
      adds = true;
    }
    multiplier.finish();
    const uint32_t token0 = tile.token0 + group_token + thread % 128 / 32 * 16;
    const uint32_t row = token0 + thread % 32 / 4;
    T* y = static_cast<T*>(p.y) + tile.column0;
    store_lines<T, kColumns / 8>(
        n.d_model - tile.column0,
        [&](int block, int half) {
          const uint32_t column = tile.column0 + block * 8 + thread % 4 * 2;
          if (row + half * 8 >= valid || column >= n.d_model) return make_float2(0.0f, 0.0f);
          const float* sums = c + block * 4 + 2 * half;
          const float* bias = n.b_out == nullptr ? nullptr : n.b_out + column;
          return bias == nullptr ? make_float2(sums[0], sums[1]) : make_float2(sums[0] + bias[0], sums[1] + bias[1]);
        },
        [&](uint32_t row) {
          const uint64_t token = token0 + row;
          return token < p.num_tokens ? y + token * n.d_model : nullptr;
        });
  }
}

template <class T>
__device__ __forceinline__ void token_output(const moefy_experts_params& p, const moefy_tensor_map& w_out) {
  extern __shared__ __align__(1024) unsigned char memory[];
  if (!begin_for_many(p)) return;
  const Lists lists(memory + kStages * kStageBytes, p.neurons);
  const Pipeline<kStages, true> pipeline;
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_tiles(p, w_out, lists, shared_address(memory), pipeline);
  } else {
    become_multiplier();
    multiply_tiles<T>(p, lists, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB, 5 words for each expert, a bit for each and for every 64 neurons, and four words.
#define MOEFY_EXPERTS_MANY_TOKEN_OUTPUT(name, type)                                                  \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1) \
      moefy_experts_many_token_output_##name(const __grid_constant__ moefy_experts_engine_params p) { \
    moefy::token_output<type>(p.experts, p.weights);                                                    \
  }

MOEFY_EXPERTS_MANY_TOKEN_OUTPUT(f16, __half)
MOEFY_EXPERTS_MANY_TOKEN_OUTPUT(bf16, __nv_bfloat16)
