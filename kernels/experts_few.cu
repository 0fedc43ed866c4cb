// The op `experts` for few tokens: two launches that stream every executed neuron once.
//
// moefy_experts_few_hidden computes h of the union of the tokens' experts, moefy_experts_few_combine multiplies it by
// the output rows. Neurons, not experts, are dealt out: any width of expert fills the chip. Weights go from memory
// straight into fragments, 16 bytes a lane: a sum over k may run in any order as long as both factors agree on it, so a
// lane takes the k that it can load at once. Every sum has a fixed order.
#include "experts.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr int kWarps = 8;
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

/// Number of executed neurons: `routed` of the union's experts, then the shared and the linear ones.
struct Executed {
  uint32_t routed;
  uint32_t all;

  __device__ explicit Executed(const moefy_experts_params& p)
      : routed(*p.num_union * p.neurons.expert_width), all(routed + p.neurons.shared + p.neurons.rank) {}

  /// Expert and neuron of a column of h; a column beyond the last gets a neuron whose weights can be read.
  __device__ void find(const moefy_experts_params& p, uint32_t column, uint32_t& expert, uint32_t& neuron) const {
    expert = kNoExpert;
    neuron = 0;
    if (column < routed) {
      expert = p.union_ids[column / p.neurons.expert_width];
      neuron = expert * p.neurons.expert_width + column % p.neurons.expert_width;
    } else if (column < all) {
      neuron = routed_neurons(p.neurons) + column - routed;
    }
  }
};

/// One block takes 16 rows of w_in at a time (16 neurons, or 8 of a GLU with gate and up rows together); its warps
/// split d_model.
template <class T, int kTiles>
__device__ __forceinline__ void few_hidden(const moefy_experts_params& p) {
  constexpr int kStep = kWarps * 4 * kVector<T>;
  constexpr int kUnroll = 4;
  __shared__ float sums[kWarps][16][kTiles * kTile];
  const moefy_neurons& n = p.neurons;
  const int warp = threadIdx.x / 32;
  const int g = threadIdx.x % 32 / 4;
  const int t = threadIdx.x % 4;
  const uint32_t token0 = blockIdx.y * kTiles * kTile;
  const T* w_in = static_cast<const T*>(n.w_in);
  const T* x[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint32_t token = token0 + tile * kTile + g;
    x[tile] = token < p.num_tokens ? static_cast<const T*>(p.x) + token * n.d_model : nullptr;
  }

  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (uint32_t i = threadIdx.x; i < p.num_arrivals; i += blockDim.x) p.arrivals[i] = 0;
  }

  const Executed executed(p);
  const uint32_t per_group = n.glu ? 8 : 16;
  const uint32_t num_groups = ceil_div(executed.all, 16) * (16 / per_group);
  for (uint32_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    uint32_t expert, low, high;
    executed.find(p, group * per_group + g, expert, low);
    if (n.glu) {
      high = up_row(n, low);
    } else {
      executed.find(p, group * per_group + g + 8, expert, high);
      high = input_row(n, high);
    }
    const T* row_low = w_in + input_row(n, low) * n.d_model;
    const T* row_high = w_in + high * n.d_model;

    Dots<T> dots[kTiles];
    // The bound is the same for all lanes of a warp: they work together.
    for (uint64_t first = warp * 4 * kVector<T>; first < n.d_model; first += kUnroll * kStep) {
      const uint64_t k = first + t * kVector<T>;
      uint4 w[kUnroll][2];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool inside = k + u * kStep < n.d_model;
        w[u][0] = inside ? load_streaming(row_low + k + u * kStep) : uint4{};
        w[u][1] = inside ? load_streaming(row_high + k + u * kStep) : uint4{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const bool inside = x[tile] != nullptr && k + u * kStep < n.d_model;
          const T* from = x[tile] + k + u * kStep;
          dots[tile].add(w[u][0], w[u][1], inside ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{});
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float c[4];
      dots[tile].finish(c);
      for (int i = 0; i < 4; ++i) sums[warp][g + i / 2 * 8][tile * kTile + 2 * t + i % 2] = c[i];
    }
    __syncthreads();

    for (uint32_t i = threadIdx.x; i < per_group * kTiles * kTile; i += blockDim.x) {
      const uint32_t row = i % per_group;
      const uint32_t token = i / per_group;
      float pre = 0.0f;
      float up = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        pre += sums[w][row][token];
        if (n.glu) up += sums[w][row + 8][token];
      }
      const uint32_t column = group * per_group + row;
      uint32_t expert, neuron;
      executed.find(p, column, expert, neuron);
      const uint32_t global = token0 + token;
      const bool runs = column < executed.all && global < p.num_tokens &&
                        (expert == kNoExpert || selects(p.mask, n.num_experts, global, expert));
      float value = 0.0f;
      if (runs) {
        value = neuron_value<T>(n, neuron, pre, up);
        if (expert != kNoExpert) value *= gate_of(p.gates, n.num_experts, global, expert);
      }
      static_cast<T*>(p.hidden)[global * p.hidden_stride + column] = from_float<T>(value);
      if (global == 0) p.neuron_ids[column] = neuron;
    }
    __syncthreads();
  }
}

/// Sums of four neurons' output rows, weighted by h of eight tokens: lane 4g + t brings the g-th 16 bytes of columns of
/// neurons 4t to 4t + 3 and h of token g for the same neurons. c[j][i] belongs to column 2j + i / 2 of the lane's and
/// to token 2t + i % 2.
template <class T>
struct Rows {
  float c[kVector<T> / 2][4] = {};

  __device__ void add(const uint4 (&w)[4], const T* h) {
    const uint2 of_token = h == nullptr ? uint2{} : *reinterpret_cast<const uint2*>(h);
    const uint32_t words[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                                  {w[1].x, w[1].y, w[1].z, w[1].w},
                                  {w[2].x, w[2].y, w[2].z, w[2].w},
                                  {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a[4] = {
          __byte_perm(words[0][j], words[1][j], 0x5410), __byte_perm(words[0][j], words[1][j], 0x7632),
          __byte_perm(words[2][j], words[3][j], 0x5410), __byte_perm(words[2][j], words[3][j], 0x7632)};
      mma(c[j], a, of_token.x, of_token.y, T());
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

  __device__ void add(const uint4 (&w)[4], const float* h) {
    const float4 own = h == nullptr ? float4{} : *reinterpret_cast<const float4*>(h);
    const float4 row[4] = {as_float4(w[0]), as_float4(w[1]), as_float4(w[2]), as_float4(w[3])};
#pragma unroll
    for (int token = 0; token < kTile; ++token) {
      const float4 f = shuffle(own, token * 4 + threadIdx.x % 4);
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

/// One block takes eight vectors of columns (blockIdx.x) and a share of the neurons (blockIdx.y); the last block to
/// finish a stripe of columns adds the shares in their order.
template <class T, int kTiles>
__device__ __forceinline__ void few_combine(const moefy_experts_params& p) {
  constexpr int kPerTile = kVector<T> / 2 * 4;
  constexpr int kPerLane = kTiles * kPerTile;
  __shared__ float sums[kWarps / 2][kPerLane][32];
  __shared__ bool is_last;
  const moefy_neurons& n = p.neurons;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const uint32_t split = blockIdx.y;
  const uint32_t token0 = blockIdx.z * kTiles * kTile;
  const uint64_t column = (blockIdx.x * 8 + g) * kVector<T>;
  const T* w_out = static_cast<const T*>(n.w_out) + column;
  const T* hidden = static_cast<const T*>(p.hidden);

  Rows<T> rows[kTiles];
  const uint32_t executed = Executed(p).all;
  for (uint32_t first = (split * kWarps + warp) * 16; first < executed; first += kWarps * p.num_splits * 16) {
    const uint4 ids = *reinterpret_cast<const uint4*>(p.neuron_ids + first + 4 * t);
    const uint32_t id[4] = {ids.x, ids.y, ids.z, ids.w};
    uint4 w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = column < n.d_model ? load_streaming(w_out + id[i] * n.d_model) : uint4{};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t token = token0 + tile * kTile + g;
      rows[tile].add(w, token < p.num_tokens ? hidden + token * p.hidden_stride + first + 4 * t : nullptr);
    }
  }

  float own[kPerLane];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float c[kVector<T> / 2][4];
    rows[tile].finish(c);
#pragma unroll
    for (int i = 0; i < kPerTile; ++i) own[tile * kPerTile + i] = c[i / 4][i % 4];
  }
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) sums[warp - half][i][lane] = own[i];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) own[i] += sums[warp][i][lane];
    }
    __syncthreads();
  }

  const uint64_t stripe = static_cast<uint64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
  float* partials = p.partials + stripe * p.num_splits * kPerLane * 32;
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) partials[(split * kPerLane + i) * 32 + lane] = own[i];
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.arrivals + stripe, 1) == p.num_splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  const uint32_t valid = valid_tokens(p);
  for (int i = warp; i < kPerLane; i += kWarps) {
    const uint64_t at = column + i / 4 % (kVector<T> / 2) * 2 + i % 4 / 2;
    const uint32_t token = token0 + i / kPerTile * kTile + 2 * t + i % 2;
    if (at >= n.d_model || token >= p.num_tokens) continue;
    float sum = n.b_out == nullptr ? 0.0f : n.b_out[at];
    for (uint32_t s = 0; s < p.num_splits; ++s) sum += __ldcg(partials + (s * kPerLane + i) * 32 + lane);
    static_cast<T*>(p.y)[token * n.d_model + at] = from_float<T>(token < valid ? sum : 0.0f);
  }
}

}  // namespace
}  // namespace moefy

#define MOEFY_EXPERTS_FEW(name, type, tiles)                                                       \
  extern "C" __global__ void __launch_bounds__(moefy::kWarps * 32)                                 \
      moefy_experts_few_hidden_##name##_##tiles(const __grid_constant__ moefy_experts_params p) {  \
    moefy::few_hidden<type, tiles>(p);                                                             \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(moefy::kWarps * 32)                                 \
      moefy_experts_few_combine_##name##_##tiles(const __grid_constant__ moefy_experts_params p) { \
    moefy::few_combine<type, tiles>(p);                                                            \
  }

MOEFY_EXPERTS_FEW(f32, float, 1)
MOEFY_EXPERTS_FEW(f16, __half, 1)
MOEFY_EXPERTS_FEW(f16, __half, 2)
MOEFY_EXPERTS_FEW(f16, __half, 4)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 1)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 2)
MOEFY_EXPERTS_FEW(bf16, __nv_bfloat16, 4)
