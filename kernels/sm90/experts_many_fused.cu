// The op `experts` for many tokens on Hopper, both products of narrow experts in one launch: the output of every (expert,
// token) pair, expert by expert. moefy_experts_many_sum does the rest.
//
// A persistent grid takes tiles of up to 192 pairs of one expert. One warpgroup copies: token rows are gathered straight from
// x, the copy engine brings the weights. The other three multiply 64 pairs each. Sums of the first product lie in their
// registers just as the second takes its first factor, so h of a tile stays there; weights of the second product come into the
// same ring of stages while the first one ends.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "store_lines.cuh"

namespace moefy {
namespace {

constexpr int kGroups = 3;  // that multiply
constexpr uint32_t kTokens = kGroups * 64;
constexpr uint32_t kThreads = kCopiers + kGroups * 128;
constexpr uint32_t kDepth = 64;  // of d_model in one stage of the first product
constexpr int kRowBytes = 2 * kDepth;
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;
constexpr uint32_t kColumns = 128;  // of y in one stage of the second product
constexpr uint32_t kStripe = 64;    // columns of a block of weights

/// A stage has rows of x, then kRows rows of w_in, or as many rows of w_out, then biases and means of those neurons. Of a
/// narrower expert that includes rows of the next one, which h has zeros for.
template <int kRows>
constexpr uint32_t kStageBytes = (kTokens + kRows) * kRowBytes;
template <int kRows>
constexpr uint32_t kOutputBytes = kColumns / kStripe * kRows * kRowBytes;
template <int kRows>
constexpr int kStages = kRows == 128 ? 5 : kRows == 64 ? 6 : 7;
static_assert(kOutputBytes<128> + 2 * 128 * sizeof(float) <= kStageBytes<128>, "");

// ---- tiles ----

constexpr uint32_t kSizes = 9;
__device__ __forceinline__ uint32_t size_of(uint32_t i) { return kTokens - i * 16; }

/// Exclusive sums of the groups' numbers of tiles, in shared memory; the last entry is the number of tiles. Pairs of a tile are so
/// many at most that no block has much more to do than the others: a tile costs its rows, and its weights, which are as much as two
/// rows for each neuron. A warp looks at each size, and that of the best one writes.
template <int kRows>
__device__ __forceinline__ void count_best_tiles(const moefy_experts_params& p, uint32_t* tile_offsets) {
  static_assert(kSizes <= kThreads / 32 && kSizes <= 16, "a warp for each size, four bits for its number");
  __shared__ uint32_t costs[kSizes];
  const uint32_t groups = num_groups(p.neurons), warp = threadIdx.x / 32, lane = lane_id(), size = size_of(warp);
  const auto tiles_of = [&](uint32_t i) { return i < groups ? ceil_div(rows_of(p, find_group(p, i)).count, size) : 0; };
  if (warp < kSizes) {
    uint32_t tiles = 0;
    for (uint32_t i = lane; i < groups; i += 32) tiles += tiles_of(i);
    tiles = __reduce_add_sync(kFullWarp, tiles);
    if (lane == 0) costs[warp] = ceil_div(tiles, gridDim.x) * (size + 2 * kRows + 64) * 16 + warp;
  }
  __syncthreads();
  uint32_t least = costs[0];
#pragma unroll
  for (uint32_t i = 1; i < kSizes; ++i) least = min(least, costs[i]);
  if (warp == least % 16) {
    uint32_t before = 0;
    for (uint32_t first = 0; first < groups; first += 32) {
      const uint32_t tiles = tiles_of(first + lane), sum = prefix_sum(tiles);
      if (first + lane < groups) tile_offsets[first + lane] = before + sum - tiles;
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    if (lane == 0) tile_offsets[groups] = before;
  }
  __syncthreads();
}

/// Pairs of an expert, or tokens where all run the neurons.
struct Tile {
  Group group;
  RowRange tokens;
};

/// Tiles of a group are as equal as they can be.
__device__ __forceinline__ Tile tile_of(const moefy_experts_params& p, const uint32_t* tile_offsets, uint32_t tile) {
  const uint32_t index = find_tile(tile_offsets, num_groups(p.neurons), tile);
  Tile found;
  found.group = find_group(p, index);
  const RowRange all = rows_of(p, found.group);
  const uint32_t share = ceil_div(all.count, tile_offsets[index + 1] - tile_offsets[index]);
  const uint32_t first = (tile - tile_offsets[index]) * share;
  found.tokens = {all.begin + first, min(all.count - first, share)};
  return found;
}

// ---- copies ----

template <int kRows>
__device__ __forceinline__ void copy_tiles(const moefy_experts_fused_params& pairs, const uint32_t* tile_offsets,
                                           uint32_t memory, const Pipeline<kStages<kRows>, true>& pipeline) {
  constexpr int kPasses = kTokens / kRowsPerPass;
  const moefy_experts_params& p = pairs.experts;
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x, chunk = thread % kChunks, pass_row = thread / kChunks;
  const uint32_t num_tiles = tile_offsets[num_groups(n)], row_chunks = n.d_model / 8;
  const uint4* const x = static_cast<const uint4*>(p.x);
  Copier<kStages<kRows>, true> copier(pipeline);
  for (uint32_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const Tile tile = tile_of(p, tile_offsets, index);
    // Rows that this thread copies a chunk of. Read whether they exist or not: under a condition each would wait for the last.
    uint32_t rows[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t row = min(pass_row + i * kRowsPerPass, tile.tokens.count - 1);
      rows[i] = token_of(p, tile.group, tile.tokens.begin + row) * row_chunks;
    }
#pragma unroll 1
    for (uint32_t k = 0; k < n.d_model; k += kDepth) {
      const uint32_t slot = copier.begin(), to = memory + slot * kStageBytes<kRows>;
      if (thread == 0) {
        barrier_expect(pipeline.full(slot), kRows * kRowBytes);
        copy_box(to + kTokens * kRowBytes, pairs.w_in, {k, tile.group.first_neuron, 0, 0}, pipeline.full(slot));
      }
      const uint32_t own = k / 8 + chunk;
      const bool exists = own < row_chunks;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        // What is beyond the tile's last row gives rows that are not stored.
        const uint32_t row = pass_row + i * kRowsPerPass;
        if (row >= tile.tokens.count) continue;
        copy_async(to + swizzled<kRowBytes>(row, chunk), x + rows[i] + (exists ? own : 0), exists);
      }
      copier.end();
    }
    // Each pair is found again by its token and expert.
    for (uint32_t row = thread; tile.group.expert != kNoExpert && row < tile.tokens.count; row += kCopiers) {
      const uint64_t token = token_of(p, tile.group, tile.tokens.begin + row);
      p.pair_rows[token * n.num_experts + tile.group.expert] = tile.tokens.begin + row;
    }
#pragma unroll 1
    for (uint32_t column0 = 0; column0 < n.d_model; column0 += kColumns) {
      const uint32_t slot = copier.begin(), to = memory + slot * kStageBytes<kRows>;
      if (thread == 0) {
        barrier_expect(pipeline.full(slot), kOutputBytes<kRows>);
#pragma unroll
        for (uint32_t stripe = 0; stripe < kColumns / kStripe; ++stripe) {
          copy_box(to + stripe * kRows * kRowBytes, pairs.w_out,
                   {column0 + stripe * kStripe, tile.group.first_neuron, 0, 0}, pipeline.full(slot));
        }
      }
      const uint32_t neuron = tile.group.first_neuron + thread;
      if (column0 == 0 && thread < tile.group.width && neuron < n.d_ff) {
        const uint32_t at = to + kOutputBytes<kRows> + thread * sizeof(float);
        if (n.b_in != nullptr) copy_async_word(at, n.b_in + neuron);
        if (n.mean != nullptr) copy_async_word(at + kRows * sizeof(float), n.mean + neuron);
      }
      copier.end();
    }
  }
}

// ---- products ----

__device__ __forceinline__ float2 load_shared_two(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

/// Gates of row `row` of a tile and of the one eight further.
__device__ __forceinline__ void find_gates(const moefy_experts_params& p, const Tile& tile, uint32_t row,
                                           float (&gates)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = row + 8 * half;
    const bool has_gate = p.gates != nullptr && tile.group.expert != kNoExpert && own < tile.tokens.count;
    const uint32_t token = has_gate ? token_of(p, tile.group, tile.tokens.begin + own) : 0;
    gates[half] = has_gate ? gate_of(p.gates, p.neurons.num_experts, token, tile.group.expert) : 1.0f;
  }
}

/// h of this lane's two rows, from the sums, which are used up: four words for each 16 neurons, as the second product takes
/// them. `constants` are in shared memory: biases, then means. Zeros beyond the group's last neuron.
///
/// A loop moves sums and words down instead of going up: unrolled, every tile would wait for tens of kilobytes of
/// instructions.
template <class T, int kRows, class Activation>
__device__ __forceinline__ void activate_sums(const moefy_neurons& n, const Group& group, uint32_t constants,
                                              const float (&gates)[2], float (&sums)[kRows / 2],
                                              uint32_t (&h)[kRows / 16][4], Activation) {
  constexpr int kSteps = kRows / 16, kAtOnce = kRows == 128 ? 4 : 2;
  const uint32_t t = threadIdx.x % 4;
  const bool has_constants = group.first_neuron < n.d_ff;
  const auto constants_of = [&](const float* values, uint32_t at) {
    return has_constants && values != nullptr ? load_shared_two(constants + at * sizeof(float)) : make_float2(0.0f, 0.0f);
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) h[i][j] = 0;
  }
#pragma unroll 1
  for (int step = 0; step < kSteps; step += kAtOnce) {
#pragma unroll
    for (int i = 0; i + kAtOnce < kSteps; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) h[i][j] = h[i + kAtOnce][j];
    }
#pragma unroll
    for (int block = 0; block < 2 * kAtOnce; ++block) {
      const uint32_t at = step * 16 + block * 8 + 2 * t;
      const float2 bias = constants_of(n.b_in, at), mean = constants_of(n.mean, kRows + at);
      const uint32_t exist = at + 1 < group.width ? 0xffffffffu : at < group.width ? 0xffffu : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* pre = sums + block * 4 + 2 * half;
        const float first = gates[half] * (activate<T>(Activation::value, pre[0] + bias.x) - mean.x);
        const float second = gates[half] * (activate<T>(Activation::value, pre[1] + bias.y) - mean.y);
        h[kSteps - kAtOnce + block / 2][block % 2 * 2 + half] = pack_two<T>(first, second) & exist;
      }
    }
#pragma unroll
    for (int i = 0; i + 8 * kAtOnce < kRows / 2; ++i) sums[i] = sums[i + 8 * kAtOnce];
  }
}

/// Sums of the first product: those of the second where they are as many. Two arrays would not share registers.
template <int kSums>
__device__ __forceinline__ float (&first_sums(float (&)[kColumns / 2], float (&own)[kSums]))[kSums] {
  return own;
}
__device__ __forceinline__ float (&first_sums(float (&c)[kColumns / 2], float (&)[kColumns / 2]))[kColumns / 2] {
  return c;
}

template <class T, int kRows>
__device__ __forceinline__ void multiply_tiles(const moefy_experts_params& p, const uint32_t* tile_offsets,
                                               uint32_t memory, const Pipeline<kStages<kRows>, true>& pipeline) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group_token = thread / 128 * 64;
  const uint32_t first_row = group_token + thread % 128 / 32 * 16, num_tiles = tile_offsets[num_groups(n)];
  Multiplier<kStages<kRows>, true> multiplier(pipeline);
  const auto next_stage = [&] { return memory + multiplier.begin() * kStageBytes<kRows>; };
  for (uint32_t index = blockIdx.x; index < num_tiles; index += gridDim.x) {
    const Tile tile = tile_of(p, tile_offsets, index);
    if (group_token >= tile.tokens.count) {
      for (uint32_t stages = ceil_div(n.d_model, kDepth) + ceil_div(n.d_model, kColumns); stages > 0; --stages) {
        multiplier.begin();
        multiplier.end();
      }
      multiplier.finish();
      continue;
    }
    float gates[2];
    find_gates(p, tile, first_row + thread % 32 / 4, gates);
    float c[kColumns / 2], own[kRows / 2];
    auto& pre = first_sums(c, own);
#pragma unroll 1
    for (uint32_t k = 0; k < n.d_model; k += kDepth) {
      const uint32_t from = next_stage();
      const uint64_t a = operand_of_rows(from + group_token * kRowBytes);
      const uint64_t b = operand_of_rows(from + kTokens * kRowBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < int(kDepth / 16); ++step) {
        wgmma<T, false>(pre, a + 2 * step, b + 2 * step, k > 0 || step > 0);
      }
      wgmma_commit();
      multiplier.end();
    }
    multiplier.finish();
    uint32_t from = next_stage();
    uint32_t h[kRows / 16][4];
    with_activation(tile.group.first_neuron < n.d_ff ? n.activation : MOEFY_IDENTITY, [&](auto known) {
      activate_sums<T, kRows>(n, tile.group, from + kOutputBytes<kRows>, gates, pre, h, known);
    });
    T* const rows = static_cast<T*>(p.rows) + (place_of_rows(p, tile.group) + tile.tokens.begin) * n.d_model;
#pragma unroll 1
    for (uint32_t column0 = 0;; from = next_stage()) {
      const uint64_t b = operand_of_columns(from, kRows * kRowBytes);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step) wgmma<T, true>(c, h[step], b + 128 * step, step > 0);
      wgmma_commit();
      multiplier.end();
      multiplier.finish();
      store_lines<T, kColumns / 8>(
          n.d_model - column0,
          [&](int block, int half) {
            const float* sums = c + block * 4 + 2 * half;
            return make_float2(sums[0], sums[1]);
          },
          [&](uint32_t row) {
            const uint32_t pair = first_row + row;
            return pair < tile.tokens.count ? rows + static_cast<uint64_t>(pair) * n.d_model + column0 : nullptr;
          });
      column0 += kColumns;
      if (column0 >= n.d_model) break;
    }
  }
}

template <class T, int kRows>
__device__ __forceinline__ void many_fused(const moefy_experts_fused_params& pairs) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const moefy_experts_params& p = pairs.experts;
  uint32_t* tile_offsets = reinterpret_cast<uint32_t*>(memory + kStages<kRows> * kStageBytes<kRows>);
  const Pipeline<kStages<kRows>, true> pipeline(kCopiers + 1, kGroups * 4);
  if (threadIdx.x == 0) {
    prefetch_map(pairs.w_in);
    prefetch_map(pairs.w_out);
  }
  begin_before_many();
  // Both ask for where the experts' pairs end, and wait for it together.
  const bool runs = is_fused(p);
  count_best_tiles<kRows>(p, tile_offsets);
  if (!runs) return;
  if (threadIdx.x < kCopiers) {
    become_copier<kGroups>();
    copy_tiles<kRows>(pairs, tile_offsets, shared_address(memory), pipeline);
  } else {
    become_multiplier<kGroups>();
    multiply_tiles<T, kRows>(p, tile_offsets, shared_address(memory), pipeline);
  }
}

}  // namespace
}  // namespace moefy

// rows: of a group's neurons at most. Dynamic shared memory: 200, 192 or 196 KB of stages for 128, 64 or 32 rows, and
// num_experts + 3 words.
#define MOEFY_EXPERTS_MANY_PAIRS(name, type, rows)                                                     \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                                     \
      moefy_experts_many_fused_##name##_##rows(const __grid_constant__ moefy_experts_fused_params p) { \
    moefy::many_fused<type, rows>(p);                                                                  \
  }

MOEFY_EXPERTS_MANY_PAIRS(f16, __half, 32)
MOEFY_EXPERTS_MANY_PAIRS(f16, __half, 64)
MOEFY_EXPERTS_MANY_PAIRS(f16, __half, 128)
MOEFY_EXPERTS_MANY_PAIRS(bf16, __nv_bfloat16, 32)
MOEFY_EXPERTS_MANY_PAIRS(bf16, __nv_bfloat16, 64)
MOEFY_EXPERTS_MANY_PAIRS(bf16, __nv_bfloat16, 128)
