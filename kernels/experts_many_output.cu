// The op `experts` for many tokens, second product: the output of every (expert, token) pair, expert by expert.
//
// A persistent grid takes tiles of 128 pairs of one expert by 128 columns of y. The columns come in slabs, one launch each,
// and after each moefy_experts_many_sum adds its outputs up: so the workspace is bounded whatever the masks select. The
// stages of one tile are under way while the last one is multiplied, because an expert is only a few stages deep.
#include "expert_groups.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kPairs = 128;
constexpr uint32_t kColumns = 128;
constexpr int kDepthBytes = 128;  // of h in one stage
constexpr int kHiddenBytes = kPairs * kDepthBytes;
constexpr int kWeightBytes = kColumns * kDepthBytes;
constexpr int kStageBytes = kHiddenBytes + kWeightBytes;
// How eight warps share a tile.
constexpr int kWarpsAcross = 2, kWarpsDown = 4;
constexpr int kDown = kPairs / kWarpsDown / 16;       // fragments of 16 pairs
constexpr int kAcross = kColumns / kWarpsAcross / 8;  // fragments of 8 columns

template <class T>
constexpr uint32_t kDepth = kDepthBytes / sizeof(T);  // neurons of a stage

/// Adds the products of 16 neurons; for f32, of 8.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[kDown][kAcross][4], uint32_t h, uint32_t w, uint32_t pair0,
                                         uint32_t column0, uint32_t step) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t a[kDown][4];
#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    load_matrices(a[i], h + swizzled<kDepthBytes>(pair0 + i * 16 + lane % 16, step * 2 + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < kAcross; j += 2) {
    uint32_t b[4];
    const uint32_t neuron = step * 16 + lane % 16;
    load_matrices_transposed(b, w + swizzled<kColumns * 2>(neuron, column0 / 8 + j + lane / 16));
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      mma(c[i][j], a[i], b[0], b[1], T());
      mma(c[i][j + 1], a[i], b[2], b[3], T());
    }
  }
}

__device__ __forceinline__ float load_shared(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}

template <>
__device__ __forceinline__ void multiply<float>(float (&c)[kDown][kAcross][4], uint32_t h, uint32_t w, uint32_t pair0,
                                                uint32_t column0, uint32_t step) {
  const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (uint32_t k = step * 8; k < step * 8 + 8; ++k) {
    float a[kDown][2];
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[i][half] = load_shared(h + swizzled<kDepthBytes>(pair0 + i * 16 + half * 8 + g, k / 4) + k % 4 * 4);
      }
    }
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const uint32_t column = column0 + j * 8 + 2 * t;
      const uint32_t at = w + swizzled<kColumns * 4>(k, column / 4) + column % 4 * 4;
      const float b[2] = {load_shared(at), load_shared(at + 4)};
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) c[i][j][r] = fmaf(a[i][r / 2], b[r % 2], c[i][j][r]);
      }
    }
  }
}

/// A tile of a group: which pairs, and which columns of y.
struct Tile {
  Group group;
  RowRange rows;
  uint32_t column0;
};

__device__ __forceinline__ Tile tile_of(const moefy_experts_params& p, const Slab& slab, const uint32_t* tile_offsets,
                                        uint32_t tile) {
  const uint32_t index = find_tile(tile_offsets, num_groups(p.neurons), tile);
  const uint32_t inside = tile - tile_offsets[index], across = ceil_div(slab.end - slab.first, kColumns);
  Tile found;
  found.group = find_group(p, index);
  const RowRange all = rows_of(p, found.group);
  const uint32_t first = inside / across * kPairs;
  found.rows = {all.begin + first, min(all.count - first, kPairs)};
  found.column0 = slab.first + inside % across * kColumns;
  return found;
}

template <class T, int kStages>
__device__ __forceinline__ void many_output(const moefy_experts_params& p) {
  constexpr int kVector = kChunkBytes / sizeof(T);
  constexpr int kHiddenChunks = kDepthBytes / kChunkBytes;
  constexpr int kWeightChunks = kColumns / kVector;
  constexpr int kSteps = 4;  // of a stage
  extern __shared__ __align__(128) unsigned char memory[];
  uint32_t* tile_offsets = reinterpret_cast<uint32_t*>(memory + kStages * kStageBytes);
  const uint32_t stages = shared_address(memory);
  const moefy_neurons& n = p.neurons;
  begin();
  const Slab slab = find_slab<T>(p, num_pairs(p));
  if (slab.first >= slab.end) return;
  count_tiles<kThreads>(p, tile_offsets, [&](const Group& group) {
    const uint32_t down = group.width == 0 ? 0 : ceil_div(rows_of(p, group).count, kPairs);
    return down * ceil_div(slab.end - slab.first, kColumns);
  });

  // The stage that is asked for next.
  const uint32_t num_tiles = tile_offsets[num_groups(n)];
  uint32_t ahead = blockIdx.x, ahead_neuron = 0;
  Tile tile;
  if (ahead < num_tiles) tile = tile_of(p, slab, tile_offsets, ahead);
  const auto load = [&](uint32_t to) {
    const Group& group = tile.group;
    const T* hidden = static_cast<const T*>(p.hidden) + group.hidden + tile.rows.begin * group.hidden_stride;
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < kPairs * kHiddenChunks; i += kThreads) {
      const uint32_t row = i / kHiddenChunks, chunk = i % kHiddenChunks, neuron = ahead_neuron + chunk * kVector;
      const bool valid = row < tile.rows.count && neuron < group.hidden_stride;
      copy_async(to + swizzled<kDepthBytes>(row, chunk), hidden + (valid ? row * group.hidden_stride + neuron : 0), valid);
    }
    const T* w = static_cast<const T*>(n.w_out);
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < kDepth<T> * kWeightChunks; i += kThreads) {
      const uint32_t row = i / kWeightChunks, chunk = i % kWeightChunks, column = tile.column0 + chunk * kVector;
      const bool valid = ahead_neuron + row < group.width && column < slab.end;
      const uint64_t neuron = group.first_neuron + ahead_neuron + row;
      copy_async(to + kHiddenBytes + swizzled<kColumns * sizeof(T)>(row, chunk),
                 w + (valid ? neuron * n.d_model + column : 0), valid);
    }
    ahead_neuron += kDepth<T>;
    if (ahead_neuron < group.width) return;
    ahead_neuron = 0;
    ahead += gridDim.x;
    if (ahead < num_tiles) tile = tile_of(p, slab, tile_offsets, ahead);
  };

  uint32_t next = 0;
  for (; next < kStages - 1; ++next) {
    if (ahead < num_tiles) load(stages + next * kStageBytes);
    copy_async_commit();
  }
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t pair0 = warp / kWarpsAcross * kDown * 16, column0 = warp % kWarpsAcross * kAcross * 8;
  uint32_t stage = 0;
#pragma unroll 1
  for (uint32_t here = blockIdx.x; here < num_tiles; here += gridDim.x) {
    const Tile own = tile_of(p, slab, tile_offsets, here);
    float c[kDown][kAcross][4] = {};
#pragma unroll 1
    for (uint32_t neuron = 0; neuron < own.group.width; neuron += kDepth<T>, ++stage, ++next) {
      copy_async_wait<kStages - 2>();
      __syncthreads();
      if (ahead < num_tiles) load(stages + next % kStages * kStageBytes);
      copy_async_commit();
      const uint32_t from = stages + stage % kStages * kStageBytes;
      if (pair0 >= own.rows.count) continue;
#pragma unroll
      for (uint32_t step = 0; step < kSteps; ++step) multiply<T>(c, from, from + kHiddenBytes, pair0, column0, step);
    }
    T* rows = static_cast<T*>(p.rows) + place_of_rows(p, own.group) * slab.width + own.column0 - slab.first;
#pragma unroll
    for (int i = 0; i < kDown * 2; ++i) {
      const uint32_t pair = pair0 + i * 8 + g;
      if (pair >= own.rows.count) continue;
      T* to = rows + static_cast<uint64_t>(own.rows.begin + pair) * slab.width;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const uint32_t column = column0 + j * 8 + 2 * t;
        if (own.column0 + column >= slab.end) continue;
        store_two(to + column, c[i / 2][j][i % 2 * 2], c[i / 2][j][i % 2 * 2 + 1]);
      }
    }
  }
}

constexpr uint32_t kSumColumns = MOEFY_EXPERTS_MANY_SUM_COLUMNS;
static_assert(kSumColumns == 32 * 8, "eight for each lane");
constexpr uint32_t kListedWords = 2;                     // of a mask, whose rows are listed at once
constexpr uint32_t kMostListed = kListedWords * 32 + 2;  // and rows of shared and linear neurons

/// Which pairs have rows: those of the first so many experts, and of the next one those of the first so many tokens. Where
/// lists are full, they ended somewhere in the last one that has tokens, and tokens of an expert are in ascending order.
struct Listed {
  uint32_t experts;
  uint32_t tokens;
};

__device__ __forceinline__ Listed find_listed(const moefy_experts_params& p, uint32_t pairs) {
  const uint32_t experts = p.neurons.num_experts;
  if (pairs < p.max_pairs) return {experts, 0};
  if (p.max_pairs == 0) return {0, 0};
  uint32_t whole = 0;
  for (uint32_t e = threadIdx.x % 32; e < experts; e += 32) whole += __ldcg(p.expert_offsets + e + 1) < p.max_pairs;
  return {__reduce_add_sync(0xffffffffu, whole), __ldcg(p.token_ids + p.max_pairs - 1) + 1};
}

/// Lists a warp's rows of a token in shared memory: those of its experts before expert `listed`, in ascending order from
/// word `word` of its mask on, and after the last word those of shared and linear neurons, which follow the pairs'. Returns
/// how many.
__device__ __forceinline__ uint32_t list_rows(const moefy_experts_params& p, uint32_t pairs, uint32_t listed,
                                              uint32_t token, uint32_t word, uint32_t list) {
  const moefy_neurons& n = p.neurons;
  const uint32_t lane = threadIdx.x % 32, words = ceil_div(n.num_experts, 32), experts = n.num_experts - word * 32;
  const uint32_t* const mask = p.mask + static_cast<uint64_t>(token) * words + word;
  const uint32_t* const pair_rows = p.pair_rows + static_cast<uint64_t>(token) * n.num_experts + word * 32 + lane;
  // Lane l finds the row of the l-th expert of a word. It is asked for whether the expert runs or not, so as not to wait
  // for the mask; what nobody wrote is not used.
  uint32_t bits[kListedWords], rows[kListedWords];
#pragma unroll
  for (uint32_t w = 0; w < kListedWords; ++w) {
    if (w * 32 >= experts) break;
    bits[w] = __ldcg(mask + w);
    if (w * 32 + lane < experts) rows[w] = __ldcg(pair_rows + w * 32);
  }
  uint32_t count = 0;
#pragma unroll
  for (uint32_t w = 0; w < kListedWords; ++w) {
    if (w * 32 >= experts) break;
    const uint32_t expert = (word + w) * 32 + lane;
    const bool exists = expert < listed && (bits[w] >> lane & 1);
    const uint32_t all = __ballot_sync(0xffffffffu, exists);
    if (exists) store_shared_word(list + (count + __popc(all & ((1u << lane) - 1))) * sizeof(uint32_t), rows[w]);
    count += __popc(all);
  }
  if (word + kListedWords < words) return count;
  uint32_t row = pairs + token;
  for (const uint32_t width : {n.shared, n.rank}) {
    if (width == 0) continue;
    store_shared_word(list + count++ * sizeof(uint32_t), row);
    row += p.num_tokens;
  }
  return count;
}

/// y of kSumColumns of the slab's columns of a token, for a warp: b_out and the outputs of its experts, in ascending order,
/// then the shared and the linear neurons'.
template <class T>
__device__ __forceinline__ void sum_of_token(const moefy_experts_params& p, const Slab& slab, uint32_t pairs,
                                             const Listed& listed, bool is_valid, uint32_t token, uint32_t first,
                                             uint32_t list) {
  constexpr uint32_t kPending = 4;             // rows that are under way
  constexpr uint32_t kLine = 128 / sizeof(T);  // columns
  constexpr uint32_t kLines = kSumColumns / kLine;
  const moefy_neurons& n = p.neurons;
  const uint32_t lane = threadIdx.x % 32, columns = slab.end - slab.first, column = first + lane * 8;
  const uint32_t experts = listed.experts + (token < listed.tokens);
  const uint32_t words = is_valid ? ceil_div(n.num_experts, 32) : 0;
  const uint32_t row_bytes = slab.width * sizeof(T);
  const bool exists = column < columns;
  // Lanes without columns of their own read the warp's first ones.
  const char* const rows = reinterpret_cast<const char*>(static_cast<const T*>(p.rows) + (exists ? column : first));
  const auto row_at = [&](const char* from, uint32_t i) {
    return from + static_cast<uint64_t>(load_shared_word(list + i * sizeof(uint32_t))) * row_bytes;
  };
  float sum[8] = {};
  if (is_valid && n.b_out != nullptr) {
    Eight<float> bias;
    const float* const b_out = n.b_out + slab.first;
    if (reinterpret_cast<uint64_t>(b_out) % kChunkBytes == 0) {
      bias.load<true>(b_out, column, columns);
    } else {
      bias.load<false>(b_out, column, columns);
    }
    bias.to_floats(sum);
  }
#pragma unroll 1
  for (uint32_t word = 0; word < words; word += kListedWords) {
    const uint32_t count = list_rows(p, pairs, experts, token, word, list);
    __syncwarp();
    Eight<T> pending[kPending];
    const auto ask = [&](uint32_t slot, uint32_t i) {
      if (i >= count) return;
      const char* const row = row_at(rows, i);
#pragma unroll
      for (int k = 0; k < Eight<T>::kVectors; ++k) pending[slot].vectors[k] = load_fresh_vector(row + k * kChunkBytes);
    };
#pragma unroll
    for (uint32_t slot = 0; slot < kPending; ++slot) ask(slot, slot);
#pragma unroll 1
    for (uint32_t i = 0; i < count; i += kPending) {
#pragma unroll
      for (uint32_t slot = 0; slot < kPending; ++slot) {
        if (i + slot >= count) break;
        float v[8];
        pending[slot].to_floats(v);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[k] += v[k];
        ask(slot, i + slot + kPending);
      }
    }
    // Nobody reads these rows again, all lanes having added theirs. Given up as whole lines, they are not written back to
    // memory.
#pragma unroll
    for (int k = 0; k < 8; ++k) asm volatile("" : "+f"(sum[k])::"memory");
    __syncwarp();
    if ((reinterpret_cast<uint64_t>(p.rows) | row_bytes) % 128 == 0) {
      const uint32_t own = first + lane % kLines * kLine;
      const char* const lines = reinterpret_cast<const char*>(static_cast<const T*>(p.rows) + own);
      for (uint32_t i = lane / kLines; i < count && own < columns; i += 32 / kLines) discard_line(row_at(lines, i));
    }
    __syncwarp();
  }
  T* const y = static_cast<T*>(p.y) + static_cast<uint64_t>(token) * n.d_model + slab.first + column;
  if (exists) store_eight(y, sum);
}

template <class T>
__device__ __forceinline__ void many_sum(const moefy_experts_params& p) {
  constexpr uint32_t kWarps = kThreads / 32;
  __shared__ uint32_t lists[kWarps][kMostListed];
  begin_before_many();
  const uint32_t valid = valid_tokens(p), pairs = num_pairs(p), warp = threadIdx.x / 32;
  const Slab slab = find_slab<T>(p, pairs);
  if (slab.first >= slab.end) return;
  const Listed listed = find_listed(p, pairs);
  // Pieces of a token lie side by side, so that its rows are read in one go.
  const uint32_t pieces = ceil_div(slab.end - slab.first, kSumColumns), warps = gridDim.x * kWarps;
  const uint32_t first = blockIdx.x * kWarps + warp, tokens_on = warps / pieces, pieces_on = warps % pieces;
  const uint32_t list = shared_address(lists[warp]);
  uint32_t token = first / pieces, piece = first % pieces;
#pragma unroll 1
  while (token < p.num_tokens) {
    sum_of_token<T>(p, slab, pairs, listed, token < valid, token, piece * kSumColumns, list);
    token += tokens_on;
    piece += pieces_on;
    if (piece < pieces) continue;
    piece -= pieces;
    ++token;
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory of the first: so many stages of 32 KB, and num_experts + 3 words.
#define MOEFY_EXPERTS_MANY_OUTPUT(name, type, stages)                                               \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                                  \
      moefy_experts_many_output_##name##_##stages(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_output<type, stages>(p);                                                            \
  }
// blocks: of a multiprocessor. With more of them registers spill, which costs more than they give.
#define MOEFY_EXPERTS_MANY_SUM(name, type, blocks)                                   \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, blocks)              \
      moefy_experts_many_sum_##name(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_sum<type>(p);                                                        \
  }

MOEFY_EXPERTS_MANY_OUTPUT(f32, float, 2)
MOEFY_EXPERTS_MANY_OUTPUT(f32, float, 5)
MOEFY_EXPERTS_MANY_OUTPUT(f16, __half, 2)
MOEFY_EXPERTS_MANY_OUTPUT(f16, __half, 5)
MOEFY_EXPERTS_MANY_OUTPUT(bf16, __nv_bfloat16, 2)
MOEFY_EXPERTS_MANY_OUTPUT(bf16, __nv_bfloat16, 5)
MOEFY_EXPERTS_MANY_SUM(f32, float, 2)
MOEFY_EXPERTS_MANY_SUM(f16, __half, 4)
MOEFY_EXPERTS_MANY_SUM(bf16, __nv_bfloat16, 4)
