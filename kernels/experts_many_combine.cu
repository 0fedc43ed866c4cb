// The op `experts` for many tokens, second product: every expert's h times its output rows, summed for each token.
//
// A block owns 128 tokens by 64 columns of y and keeps their sums in shared memory while it goes through the experts in
// ascending order, so nothing is added by atomics and the order never changes. Of an expert it takes the rows of h of
// its own tokens, which are neighbours because an expert's tokens ascend.
#include "expert_groups.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr uint32_t kTokens = 128;
constexpr uint32_t kColumns = 64;
constexpr int kWarpsAcross = kColumns / 16;
constexpr int kWarpsDown = kWarps / kWarpsAcross;
constexpr int kBatch = 2;             // fragments of eight rows that a warp takes at a time, to hide latency
constexpr int kHiddenRowBytes = 128;  // of h in one stage
constexpr int kHiddenChunks = kHiddenRowBytes / kChunkBytes;
constexpr int kHiddenBytes = kTokens * kHiddenRowBytes;
constexpr int kWeightBytes = kHiddenRowBytes * kColumns;  // as many rows as h has columns
constexpr int kStageBytes = kWeightBytes + kHiddenBytes + kTokens * 4;
constexpr int kSumBytes = kTokens * kColumns * 4;

/// A group's rows of h that belong to this block.
struct Work {
  uint32_t begin;
  uint16_t count;
  uint16_t group;
};

/// Place of the sums of the columns 16 * `across` + g and that plus 8 of a token. Tokens whose lowest bits differ use
/// different banks.
__device__ __forceinline__ uint32_t sum_place(uint32_t token, uint32_t across, uint32_t g) {
  return token * kColumns + ((across * 8 + g) ^ (token % 4 * 4)) * 2;
}

/// First row of an expert whose token is at or beyond `token`.
__device__ uint32_t lower_bound(const uint32_t* token_ids, uint32_t count, uint32_t token) {
  uint32_t low = 0;
  while (count > 0) {
    const uint32_t half = count / 2;
    if (token_ids[low + half] < token) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

/// Lists the groups that have any of the block's tokens, in order; returns their number.
__device__ uint32_t list_work(const moefy_experts_params& p, uint32_t token0, Work* list) {
  __shared__ uint32_t warp_counts[kWarps];
  const uint32_t groups = num_groups(p.neurons);
  const int warp = threadIdx.x / 32;
  uint32_t length = 0;
  for (uint32_t first = 0; first < groups; first += kThreads) {
    const uint32_t index = first + threadIdx.x;
    Work work = {0, 0, static_cast<uint16_t>(index)};
    if (index < groups) {
      const Group group = find_group(p, index);
      const RowRange all = rows_of(p, group);
      uint32_t before = min(token0, all.count);
      uint32_t until = min(token0 + kTokens, all.count);
      if (group.expert != kNoExpert) {
        const uint32_t* ids = p.token_ids + all.begin;
        before = lower_bound(ids, all.count, token0);
        until = before + lower_bound(ids + before, min(all.count - before, kTokens), token0 + kTokens);
      }
      work.begin = all.begin + before;
      work.count = static_cast<uint16_t>(until - before);
    }
    const uint32_t found = __ballot_sync(0xffffffffu, work.count > 0);
    if (threadIdx.x % 32 == 0) warp_counts[warp] = __popc(found);
    __syncthreads();
    uint32_t at = length + __popc(found & ((1u << threadIdx.x % 32) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += warp_counts[w];
      length += warp_counts[w];
    }
    if (work.count > 0) list[at] = work;
    __syncthreads();
  }
  return length;
}

/// Walks through the stages: pieces of as many neurons of a group as fit.
template <int kNeurons>
struct Cursor {
  uint32_t item = 0;
  uint32_t neuron = 0;

  __device__ void advance(uint32_t width) {
    neuron += kNeurons;
    if (neuron >= width) {
      neuron = 0;
      ++item;
    }
  }
};

__device__ __forceinline__ uint32_t width_of(const moefy_neurons& n, uint32_t group) {
  return group < n.num_experts ? n.expert_width : group == n.num_experts ? n.shared : n.rank;
}

template <class V>
__device__ __forceinline__ V load_shared(uint32_t address) {
  return *static_cast<const V*>(__cvta_shared_to_generic(address));
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

/// 16 columns of a stage's weights, as a warp multiplies them.
template <class T>
struct Weights {
  static constexpr int kSteps = 2;  // of 32 neurons
  uint32_t a[kSteps][2][4];

  __device__ void load(uint32_t w, int across, uint32_t neurons) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * 32 >= neurons) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t neuron = (step * 2 + i) * 16 + lane % 8 + lane / 16 * 8;
        load_matrices_transposed(a[step][i], w + swizzled<kColumns * 2>(neuron, across * 2 + lane / 8 % 2));
      }
    }
  }

  /// Products with the eight rows of h that begin at `row`.
  __device__ void multiply(float (&c)[4], uint32_t h, uint32_t row, uint32_t neurons) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * 32 >= neurons) break;
      uint32_t b[4];
      load_matrices(b, h + swizzled<kHiddenRowBytes>(row + lane % 8, step * 4 + lane / 8));
      mma(c, a[step][0], b[0], b[1], T());
      mma(c, a[step][1], b[2], b[3], T());
    }
  }
};

template <>
struct Weights<float> {
  uint32_t from;
  uint32_t column;

  __device__ void load(uint32_t w, int across, uint32_t) {
    from = w;
    column = across * 16 + threadIdx.x % 32 / 4;
  }

  __device__ void multiply(float (&c)[4], uint32_t h, uint32_t row, uint32_t neurons) const {
    const int t = threadIdx.x % 4;
#pragma unroll 1
    for (uint32_t chunk = 0; chunk * 4 < neurons; ++chunk) {
      float a[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t at = column + i / 4 * 8;
        a[i / 4][i % 4] = load_shared<float>(from + swizzled<kColumns * 4>(chunk * 4 + i % 4, at / 4) + at % 4 * 4);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 b = load_shared<float4>(h + swizzled<kHiddenRowBytes>(row + 2 * t + r, chunk));
        c[r] = dot(make_float4(a[0][0], a[0][1], a[0][2], a[0][3]), b, c[r]);
        c[r + 2] = dot(make_float4(a[1][0], a[1][1], a[1][2], a[1][3]), b, c[r + 2]);
      }
    }
  }
};

/// Two neighbouring words, or zeros. A branch for each would cost more than the work.
__device__ __forceinline__ float2 load_if(bool valid, uint32_t address) {
  float2 v;
  asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.shared.v2.f32 {%0,%1}, [%2];}"
               : "=&f"(v.x), "=&f"(v.y)
               : "r"(address), "r"(static_cast<int>(valid))
               : "memory");
  return v;
}

__device__ __forceinline__ void store_if(bool valid, uint32_t address, float2 v) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p st.shared.v2.f32 [%0], {%1,%2};}" ::"r"(address), "f"(v.x),
               "f"(v.y), "r"(static_cast<int>(valid))
               : "memory");
}

/// Adds fragments of eight rows to the sums of the rows' tokens: the fragments `tile`, `tile` + kWarpsDown and so on.
__device__ __forceinline__ void add_to_sums(const float (&c)[kBatch][4], uint32_t sums, uint32_t tokens, int across,
                                            uint32_t tile, uint32_t rows) {
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  bool valid[kBatch][2];
  uint32_t places[kBatch][2];
  float2 values[kBatch][2];
  // All reads before the first write: they differ in place, but the compiler cannot know.
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const uint32_t row = (tile + j * kWarpsDown) * 8 + 2 * t;
    const uint2 token = load_shared<uint2>(tokens + row * 4);
    places[j][0] = sums + sum_place(token.x, across, g) * 4;
    places[j][1] = sums + sum_place(token.y, across, g) * 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      valid[j][r] = row + r < rows;
      values[j][r] = load_if(valid[j][r], places[j][r]);
    }
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      store_if(valid[j][r], places[j][r], {values[j][r].x + c[j][r], values[j][r].y + c[j][r + 2]});
    }
  }
}

template <class T, int kStages>
__device__ __forceinline__ void many_combine(const moefy_experts_params& p) {
  constexpr int kVector = kChunkBytes / sizeof(T);
  constexpr int kNeurons = kHiddenRowBytes / sizeof(T);
  constexpr int kStep = 64 / sizeof(T);  // neurons of one call of multiply
  constexpr int kWeightChunks = kColumns / kVector;
  extern __shared__ __align__(128) unsigned char memory[];
  float* sums = reinterpret_cast<float*>(memory);
  const uint32_t stages = shared_address(memory) + kSumBytes;
  Work* list = reinterpret_cast<Work*>(memory + kSumBytes + kStages * kStageBytes);
  const moefy_neurons& n = p.neurons;
  const uint32_t token0 = blockIdx.y * kTokens;
  const uint64_t column0 = blockIdx.x * kColumns;
  const int warp = threadIdx.x / 32;
  const int across = warp % kWarpsAcross;
  const int first_tile = warp / kWarpsAcross;

  for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) sums[i] = 0.0f;
  const uint32_t length = list_work(p, token0, list);

  const auto load = [&](const Cursor<kNeurons>& cursor, uint32_t to) {
    const Work work = list[cursor.item];
    const Group group = find_group(p, work.group);
    const uint32_t left = min(group.width - cursor.neuron, kNeurons);
    const uint32_t padded = ceil_div(left, kStep) * kStep;
    const T* rows = static_cast<const T*>(n.w_out) + (group.first_neuron + cursor.neuron) * n.d_model;
    for (uint32_t i = threadIdx.x; i < padded * kWeightChunks; i += kThreads) {
      const uint32_t neuron = i / kWeightChunks;
      const uint64_t column = column0 + i % kWeightChunks * kVector;
      const bool valid = neuron < left && column < n.d_model;
      copy_async(to + swizzled<kColumns * sizeof(T)>(neuron, i % kWeightChunks),
                 valid ? rows + neuron * n.d_model + column : rows, valid);
    }
    const T* hidden = static_cast<const T*>(p.hidden) + group.hidden + work.begin * group.hidden_stride;
    for (uint32_t i = threadIdx.x; i < work.count * kHiddenChunks; i += kThreads) {
      const uint32_t row = i / kHiddenChunks;
      const uint64_t neuron = cursor.neuron + i % kHiddenChunks * kVector;
      const bool valid = neuron < group.hidden_stride;
      copy_async(to + kWeightBytes + swizzled<kHiddenRowBytes>(row, i % kHiddenChunks),
                 hidden + (valid ? row * group.hidden_stride + neuron : 0), valid);
    }
    if (threadIdx.x < work.count) {
      const uint32_t token = to + kWeightBytes + kHiddenBytes + threadIdx.x * 4;
      if (group.expert == kNoExpert) {
        store_shared(token, work.begin + threadIdx.x);
      } else {
        copy_async_word(token, p.token_ids + work.begin + threadIdx.x);
      }
    }
  };

  Cursor<kNeurons> ahead, now;
  uint32_t next = 0;
  for (; next < kStages - 1; ++next) {
    if (ahead.item < length) {
      load(ahead, stages + next * kStageBytes);
      ahead.advance(width_of(n, list[ahead.item].group));
    }
    copy_async_commit();
  }
  for (uint32_t stage = 0; now.item < length; ++stage, ++next) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (ahead.item < length) {
      load(ahead, stages + next % kStages * kStageBytes);
      ahead.advance(width_of(n, list[ahead.item].group));
    }
    copy_async_commit();

    // No other warp has these columns and rows, and the next stage waits for all warps, so that two never add to the
    // same token.
    const uint32_t from = stages + stage % kStages * kStageBytes;
    const Work work = list[now.item];
    const uint32_t width = width_of(n, work.group);
    const uint32_t neurons = min(width - now.neuron, kNeurons);
    Weights<T> weights;
    weights.load(from, across, neurons);
    for (uint32_t tile = first_tile; tile * 8 < work.count; tile += kBatch * kWarpsDown) {
      float c[kBatch][4] = {};
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        weights.multiply(c[j], from + kWeightBytes, (tile + j * kWarpsDown) * 8, neurons);
      }
      add_to_sums(c, shared_address(sums) - token0 * kColumns * 4, from + kWeightBytes + kHiddenBytes, across, tile,
                  work.count);
    }
    now.advance(width);
  }
  __syncthreads();

  const uint32_t valid = valid_tokens(p);
  for (uint32_t i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
    const uint32_t token = i / kColumns;
    const uint32_t at = i % kColumns;
    if (token0 + token >= p.num_tokens || column0 + at >= n.d_model) continue;
    float sum = sums[sum_place(token, at / 16, at % 8) + at / 8 % 2];
    if (n.b_out != nullptr) sum += n.b_out[column0 + at];
    static_cast<T*>(p.y)[(token0 + token) * n.d_model + column0 + at] =
        from_float<T>(token0 + token < valid ? sum : 0.0f);
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_EXPERTS_MANY_COMBINE(name, type, stages)                                               \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 2)                                   \
      moefy_experts_many_combine_##name##_##stages(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_combine<type, stages>(p);                                                            \
  }

// Three stages where shared memory allows it.
MOEFY_EXPERTS_MANY_COMBINE(f32, float, 2)
MOEFY_EXPERTS_MANY_COMBINE(f32, float, 3)
MOEFY_EXPERTS_MANY_COMBINE(f16, __half, 2)
MOEFY_EXPERTS_MANY_COMBINE(f16, __half, 3)
MOEFY_EXPERTS_MANY_COMBINE(bf16, __nv_bfloat16, 2)
MOEFY_EXPERTS_MANY_COMBINE(bf16, __nv_bfloat16, 3)
