// The op `experts` for few tokens: launches that stream every executed neuron once.
//
// moefy_experts_few_hidden computes h of the union of the tokens' experts, moefy_experts_few_output multiplies it by the
// output rows, each block those of a share of the neurons, and moefy_add_shares adds the shares. Every block finds the union
// in the masks by itself, which costs less than a launch that does, and the second kernel asks for its first rows while the
// first one still runs. Neurons, not experts, are dealt out: any width of expert fills the chip. Weights go from memory
// straight into fragments, 16 bytes a lane, and the next ones are under way while these are multiplied: a sum over k may
// run in any order as long as both factors agree on it, so a lane takes the k that it can load at once. Every sum has a
// fixed order.
#include <type_traits>

#include "experts_few.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kWarps = 8;
constexpr uint32_t kThreads = kWarps * 32;
constexpr int kTile = 8;  // tokens of one fragment

template <class T>
constexpr int kVector = kChunkBytes / sizeof(T);

/// Products of two times eight rows with eight tokens, all loaded in chunks of 16 bytes: lane 4g + t brings chunk t of
/// rows g and g + 8 and of token g.
template <class T>
struct Dots {
  float c[4] = {};

  __device__ void add(uint4 low, uint4 high, uint4 x) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
    mma(c, first, x.x, x.y, T());
    mma(c, second, x.z, x.w, T());
  }

  __device__ void finish(float (&out)[4]) const {
    for (int i = 0; i < 4; ++i) out[i] = c[i];
  }
};

template <>
struct Dots<float> {
  float c[2][kTile] = {};

  __device__ void add(uint4 low, uint4 high, uint4 x) {
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      const float4 of_token = shuffle(as_float4(x), token * 4 + threadIdx.x % 4);
      c[0][token] = dot(as_float4(low), of_token, c[0][token]);
      c[1][token] = dot(as_float4(high), of_token, c[1][token]);
    }
  }

  __device__ void finish(float (&out)[4]) const {
    float sums[2][kTile];
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      sums[0][token] = quad_sum(c[0][token]);
      sums[1][token] = quad_sum(c[1][token]);
    }
    const int t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) out[i] = pick(sums[i / 2], 2 * t + i % 2);
  }
};

/// The blocks share the neurons evenly. One takes 16 rows of w_in at a time (16 neurons, or 8 of a GLU with gate and up
/// rows together), and less at the end of its share; its warps split d_model.
template <class T, int kTiles>
__device__ __forceinline__ void few_hidden(const moefy_experts_params& p) {
  constexpr int kUnroll = 4;
  constexpr uint32_t kStep = 4 * kVector<T>;  // of a warp's part of d_model
  constexpr uint32_t kBatch = kWarps * kUnroll * kStep;
  constexpr uint32_t kTokens = kTiles * kTile;
  constexpr int kItems = (16 * kTokens + kThreads - 1) / kThreads;  // values of h of a thread
  __shared__ Union<kThreads> united;
  __shared__ float sums[2][kWarps][16][kTokens];
  const moefy_neurons& n = p.neurons;
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t k0 = warp * kUnroll * kStep + t * kVector<T>;
  const uint32_t token0 = blockIdx.y * kTokens;
  const uint32_t per_group = n.glu ? 8 : 16;
  const uint32_t num_batches = ceil_div(n.d_model, kBatch);
  const T* w_in = static_cast<const T*>(n.w_in);
  const T* x = static_cast<const T*>(p.x) + static_cast<uint64_t>(token0 + g) * n.d_model;
  Executed<kThreads> executed(p, united);
  const Shares shares(gridDim.x);
  wait_for_dependencies();
  // Not earlier: the next kernel reads masks before it waits for this one.
  launch_dependents();
  executed.find(p, united);
  const uint32_t begin = shares.begin(executed.all, blockIdx.x), end = shares.begin(executed.all, blockIdx.x + 1);
  // Columns come in fours; the last ones may be nobody's.
  const uint32_t end_of_columns = blockIdx.x + 1 < gridDim.x ? end : ceil_div(end, 4) * 4;

  const T *row_low, *row_high;
  bool has_low, has_high;
  const auto begin_group = [&](uint32_t first) {
    uint32_t expert;
    const uint32_t low = executed.find(first + g, expert);
    const uint32_t high = n.glu ? up_row(n, low) : input_row(n, executed.find(first + g + 8, expert));
    row_low = w_in + static_cast<uint64_t>(input_row(n, low)) * n.d_model;
    row_high = w_in + static_cast<uint64_t>(high) * n.d_model;
    has_low = first + g < end;
    has_high = n.glu ? has_low : first + g + 8 < end;
  };
  uint4 next[kUnroll][2];
  const auto load = [&](uint32_t batch) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t k = batch * kBatch + u * kStep + k0;
      next[u][0] = load_streaming_if(has_low && k < n.d_model, row_low + k);
      next[u][1] = load_streaming_if(has_high && k < n.d_model, row_high + k);
    }
  };
  if (begin < end_of_columns) {
    begin_group(begin);
    load(0);
  }
  uint32_t turn = 0;
#pragma unroll 1
  for (uint32_t first = begin; first < end_of_columns; first += per_group, turn ^= 1) {
    // What belongs to this thread's values arrives while the rows do.
    const uint32_t column = first + threadIdx.x % per_group;
    uint32_t expert;
    const uint32_t neuron = executed.find(column, expert);
    const NeuronConstants constants = neuron_constants(n, neuron);
    float gates[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t token = token0 + (threadIdx.x + i * kThreads) / per_group;
      const bool runs = column < executed.all && token < p.num_tokens &&
                        (expert == kNoExpert || selects(p.mask, n.num_experts, token, expert));
      gates[i] = !runs ? 0.0f : expert == kNoExpert ? 1.0f : gate_of(p.gates, n.num_experts, token, expert);
    }

    Dots<T> dots[kTiles];
#pragma unroll 1
    for (uint32_t batch = 0; batch < num_batches; ++batch) {
      uint4 w[kUnroll][2];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        w[u][0] = next[u][0];
        w[u][1] = next[u][1];
      }
      if (batch + 1 < num_batches) {
        load(batch + 1);
      } else if (first + per_group < end_of_columns) {
        begin_group(first + per_group);
        load(0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t k = batch * kBatch + u * kStep + k0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const bool inside = k < n.d_model && token0 + tile * kTile + g < p.num_tokens;
          dots[tile].add(w[u][0], w[u][1], load_cached_vector_if(inside, x + tile * kTile * n.d_model + k));
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float c[4];
      dots[tile].finish(c);
      for (int i = 0; i < 4; ++i) sums[turn][warp][g + i / 2 * 8][tile * kTile + 2 * t + i % 2] = c[i];
    }
    // The only one of a turn: before a thread writes here again, all have passed that of the next turn.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t token = (threadIdx.x + i * kThreads) / per_group, row = threadIdx.x % per_group;
      if (token >= kTokens || column >= end_of_columns) continue;
      float pre = 0.0f, up = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        pre += sums[turn][w][row][token];
        if (n.glu) up += sums[turn][w][row + 8][token];
      }
      const float value = gates[i] == 0.0f ? 0.0f : gates[i] * neuron_value<T>(n, neuron, constants, pre, up);
      static_cast<T*>(p.hidden)[(token0 + token) * p.hidden_stride + column] = from_float<T>(value);
    }
  }
}

/// h of four neurons.
template <class T>
using Four = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

/// Sums of four neurons' output rows, weighted by h of eight tokens: lane 4g + t brings the g-th 16 bytes of columns of
/// neurons 4t to 4t + 3 and h of token g for the same neurons. c[j][i] belongs to column 2j + i / 2 of the lane's and
/// to token 2t + i % 2.
template <class T>
struct Rows {
  float c[kVector<T> / 2][4] = {};

  __device__ void add(const uint4 (&w)[4], uint2 h) {
    const uint32_t words[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                                  {w[1].x, w[1].y, w[1].z, w[1].w},
                                  {w[2].x, w[2].y, w[2].z, w[2].w},
                                  {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a[4] = {
          __byte_perm(words[0][j], words[1][j], 0x5410), __byte_perm(words[0][j], words[1][j], 0x7632),
          __byte_perm(words[2][j], words[3][j], 0x5410), __byte_perm(words[2][j], words[3][j], 0x7632)};
      mma(c[j], a, h.x, h.y, T());
    }
  }

  __device__ void finish(float (&out)[kVector<T> / 2][4]) const {
    for (int j = 0; j < kVector<T> / 2; ++j) {
      for (int i = 0; i < 4; ++i) out[j][i] = c[j][i];
    }
  }
};

template <>
struct Rows<float> {
  float c[kTile][4] = {};

  __device__ void add(const uint4 (&w)[4], uint4 h) {
    const float4 row[4] = {as_float4(w[0]), as_float4(w[1]), as_float4(w[2]), as_float4(w[3])};
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      const float4 f = shuffle(as_float4(h), token * 4 + threadIdx.x % 4);
      c[token][0] = dot(f, make_float4(row[0].x, row[1].x, row[2].x, row[3].x), c[token][0]);
      c[token][1] = dot(f, make_float4(row[0].y, row[1].y, row[2].y, row[3].y), c[token][1]);
      c[token][2] = dot(f, make_float4(row[0].z, row[1].z, row[2].z, row[3].z), c[token][2]);
      c[token][3] = dot(f, make_float4(row[0].w, row[1].w, row[2].w, row[3].w), c[token][3]);
    }
  }

  __device__ void finish(float (&out)[2][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      float sums[kTile];
#pragma unroll
      for (int token = 0; token < kTile; ++token) sums[token] = quad_sum(c[token][column]);
      out[column / 2][column % 2 * 2] = pick(sums, 2 * t);
      out[column / 2][column % 2 * 2 + 1] = pick(sums, 2 * t + 1);
    }
  }
};

/// A block takes a stripe of columns (blockIdx.x) and a share of the neurons (blockIdx.y). Four warps lie side by side, so
/// that a row is read in long pieces, and two have different neurons.
template <class T, int kTiles>
__device__ __forceinline__ void few_output(const moefy_experts_params& p) {
  constexpr uint32_t kWide = sizeof(T) == 2 && kTiles == 1 ? 2 : 1;  // vectors of a lane, see WIDE in experts_few.rs
  constexpr uint32_t kAcross = 4;                                    // warps side by side
  constexpr uint32_t kDown = kWarps / kAcross;
  constexpr uint32_t kApart = 8 * kVector<T>;  // columns between a lane's vectors
  constexpr uint32_t kStripe = kAcross * kWide * kApart;
  constexpr uint32_t kTokens = kTiles * kTile;
  constexpr int kPerVector = kVector<T> / 2 * 4;  // sums of a lane, for a tile of tokens
  __shared__ Union<kThreads> united;
  __shared__ float sums[kAcross][kWide * kPerVector][32];
  const moefy_neurons& n = p.neurons;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t across = warp % kAcross, down = warp / kAcross;
  const uint32_t token0 = blockIdx.z * kTokens;
  const uint32_t column0 = blockIdx.x * kStripe + across * kWide * kApart + g * kVector<T>;
  const T* w_out = static_cast<const T*>(n.w_out) + column0;
  const T* hidden = static_cast<const T*>(p.hidden) + (token0 + g) * p.hidden_stride + 4 * t;
  launch_dependents();
  Executed<kThreads> executed(p, united);
  executed.find(p, united);
  const uint32_t worker = blockIdx.y * kDown + down, fours = ceil_div(executed.all, 4);
  const Shares shares(kDown * p.num_splits);
  uint32_t first = shares.begin(fours, worker) * 4;
  const uint32_t end = shares.begin(fours, worker + 1) * 4;

  uint4 next[kWide][4];
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t expert;
      const uint32_t column = first + 4 * t + i;
      const T* row = w_out + static_cast<uint64_t>(executed.find(column, expert)) * n.d_model;
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) {
        const bool exists = column < min(end, executed.all) && column0 + v * kApart < n.d_model;
        next[v][i] = load_streaming_if(exists, row + v * kApart);
      }
    }
  };
  if (first < end) load();
  wait_for_dependencies();
  Rows<T> rows[kTiles][kWide];
#pragma unroll 1
  while (first < end) {
    Four<T> h[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool exists = token0 + tile * kTile + g < p.num_tokens && first + 4 * t < end;
      h[tile] = exists ? *reinterpret_cast<const Four<T>*>(hidden + tile * kTile * p.hidden_stride + first) : Four<T>{};
    }
    uint4 w[kWide][4];
#pragma unroll
    for (uint32_t v = 0; v < kWide; ++v) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[v][i] = next[v][i];
    }
    first += 16;
    if (first < end) load();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) rows[tile][v].add(w[v], h[tile]);
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float own[kWide][kVector<T> / 2][4];
#pragma unroll
    for (uint32_t v = 0; v < kWide; ++v) rows[tile][v].finish(own[v]);
    if (tile > 0) __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kWide * kPerVector; ++i) {
      if (down == 1) sums[across][i][lane] = own[i / kPerVector][i % kPerVector / 4][i % 4];
    }
    __syncthreads();
    if (down == 1) continue;
#pragma unroll
    for (uint32_t i = 0; i < kWide * kPerVector; ++i) {
      own[i / kPerVector][i % kPerVector / 4][i % 4] += sums[across][i][lane];
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t token = token0 + tile * kTile + 2 * t + b;
      float* to = p.partials + (static_cast<uint64_t>(blockIdx.y) * p.num_tokens + token) * n.d_model + column0;
#pragma unroll
      for (uint32_t v = 0; v < kWide; ++v) {
        if (token >= p.num_tokens || column0 + v * kApart >= n.d_model) continue;
#pragma unroll
        for (int j = 0; j < kVector<T> / 2; j += 2) {
          const float4 four = {own[v][j][b], own[v][j][2 + b], own[v][j + 1][b], own[v][j + 1][2 + b]};
          __stcg(reinterpret_cast<float4*>(to + v * kApart + 2 * j), four);
        }
      }
    }
  }
}

}  // namespace
}  // namespace moefy

// blocks: of a multiprocessor, at least.
#define MOEFY_EXPERTS_FEW(name, type, tiles, blocks)                                               \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, blocks)                              \
      moefy_experts_few_hidden_##name##_##tiles(const __grid_constant__ moefy_experts_params p) {  \
    moefy::few_hidden<type, tiles>(p);                                                             \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, blocks)                              \
      moefy_experts_few_output_##name##_##tiles(const __grid_constant__ moefy_experts_params p) { \
    moefy::few_output<type, tiles>(p);                                                            \
  }

MOEFY_EXPERTS_FEW(f32, float, 1, 1)
MOEFY_EXPERTS_FEW(f16, __half, 1, 2)
MOEFY_EXPERTS_FEW(f16, __half, 2, 2)
MOEFY_EXPERTS_FEW(f16, __half, 4, 1)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 1, 2)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 2, 2)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 4, 1)
