// Routers: tokens -> scores -> masks. All arithmetic is f32, whatever the type of weights and tokens.
//
// Few tokens: one kernel does it all, one block per token, each row of weights a dot product by a warp.
// Many tokens: one tiled product per layer, then moefy_select.

#include "element.cuh"
#include "select.cuh"

namespace moefy {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

__device__ __forceinline__ float activate(moefy_router_activation activation, float z) {
  switch (activation) {
    case MOEFY_ROUTER_ACTIVATION_ABS: return fabsf(z);
    case MOEFY_ROUTER_ACTIVATION_RELU: return fmaxf(z, 0.0f);
    case MOEFY_ROUTER_ACTIVATION_TANH: return tanhf(z);
    default: return 1.0f / (1.0f + expf(-z));
  }
}

__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  return sum_of_squares > 0 ? 1.0f / sqrtf(sum_of_squares) : 0.0f;
}

// ---- few tokens ----

constexpr uint32_t kFewWarps = 16;
constexpr uint32_t kRowsAtOnce = 4;  // loads in flight per warp

// A vector in shared memory, zero up to a multiple of 8.
__host__ __device__ constexpr uint32_t padded(uint32_t width) { return (width + 7) / 8 * 8; }

// out[n] = activation(<w[n], in> * scale * w_scale[n]), for a block; `in` and `out` lie in shared memory.
template <bool kAligned, class T>
__device__ __forceinline__ void layer_of_token(const T* __restrict__ w, const float* __restrict__ w_scale,
                                               const float* in, uint32_t in_width, uint32_t out_width, float scale,
                                               moefy_router_activation activation, float* out) {
  for (uint32_t n = threadIdx.x / 32 * kRowsAtOnce; n < out_width; n += kFewWarps * kRowsAtOnce) {
    float sums[kRowsAtOnce] = {};
#pragma unroll 2
    for (uint32_t k = lane_id() * 8; k < in_width; k += 32 * 8) {
      Eight<T> weights[kRowsAtOnce];
#pragma unroll
      for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
        const uint64_t row = min(n + r, out_width - 1);
        weights[r].template load<kAligned>(w + row * in_width, k, in_width);
      }
      float values[8];
      *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(in + k);
      *reinterpret_cast<float4*>(values + 4) = *reinterpret_cast<const float4*>(in + k + 4);
#pragma unroll
      for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
        float row[8];
        weights[r].to_floats(row);
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) sums[r] = fmaf(row[i], values[i], sums[r]);
      }
    }
#pragma unroll
    for (uint32_t r = 0; r < kRowsAtOnce; ++r) {
      const float sum = warp_sum(sums[r]);
      if (lane_id() == 0 && n + r < out_width) {
        out[n + r] = activate(activation, sum * scale * (w_scale == nullptr ? 1.0f : w_scale[n + r]));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void layer_of_token(const void* w, const float* w_scale, const float* in, uint32_t in_width,
                                               uint32_t out_width, float scale, moefy_router_activation activation,
                                               float* out) {
  const T* weights = static_cast<const T*>(w);
  if (in_width % 8 == 0) {
    layer_of_token<true>(weights, w_scale, in, in_width, out_width, scale, activation, out);
  } else {
    layer_of_token<false>(weights, w_scale, in, in_width, out_width, scale, activation, out);
  }
}

template <class T>
__device__ __forceinline__ void router_select(const moefy_router_select_params& p) {
  extern __shared__ __align__(16) float shared[];
  __shared__ float squares[kFewWarps];
  const bool has_hidden = p.w2 != nullptr;
  float* const x = shared;
  float* const hidden = x + padded(p.d_model);
  float* const scores = hidden + padded(p.hidden);
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(scores + p.num_experts);
  const uint32_t token = blockIdx.x;
  const bool valid = p.num_valid_tokens == nullptr || token < *p.num_valid_tokens;

  if (valid) {
    const T* __restrict__ row = static_cast<const T*>(p.x) + token * p.x_stride;
    float square = 0;
    for (uint32_t i = threadIdx.x; i < padded(p.d_model); i += kFewWarps * 32) {
      x[i] = i < p.d_model ? to_float(row[i]) : 0.0f;
      square = fmaf(x[i], x[i], square);
    }
    for (uint32_t i = p.hidden + threadIdx.x; i < padded(p.hidden); i += kFewWarps * 32) hidden[i] = 0;
    square = warp_sum(square);
    if (lane_id() == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    float scale = 1;
    if (p.kind == MOEFY_ROUTER_MOEFICATION || p.kind == MOEFY_ROUTER_CENTROID) {
      float sum = 0;
#pragma unroll
      for (uint32_t w = 0; w < kFewWarps; ++w) sum += squares[w];
      scale = inverse_norm(sum);
    }
    if (has_hidden) {
      const bool is_d2dmoe = p.kind == MOEFY_ROUTER_D2DMOE;
      layer_of_token<T>(p.w1, nullptr, x, p.d_model, p.hidden, scale,
                     is_d2dmoe ? MOEFY_ROUTER_ACTIVATION_RELU : MOEFY_ROUTER_ACTIVATION_TANH, hidden);
      __syncthreads();
      layer_of_token<T>(p.w2, nullptr, hidden, p.hidden, p.num_experts, 1.0f,
                     is_d2dmoe ? MOEFY_ROUTER_ACTIVATION_ABS : MOEFY_ROUTER_ACTIVATION_SIGMOID, scores);
    } else {
      const bool is_linear = p.kind == MOEFY_ROUTER_LINEAR;
      layer_of_token<T>(p.w1, p.w1_scale, x, p.d_model, p.num_experts, scale,
                     is_linear ? MOEFY_ROUTER_ACTIVATION_ABS : MOEFY_ROUTER_ACTIVATION_RELU, scores);
    }
  } else {
    for (uint32_t e = threadIdx.x; e < p.num_experts; e += kFewWarps * 32) scores[e] = 0;
  }
  __syncthreads();
  if (p.scores != nullptr) {
    for (uint32_t e = threadIdx.x; e < p.num_experts; e += kFewWarps * 32) {
      p.scores[uint64_t(token) * p.num_experts + e] = scores[e];
    }
  }
  if (threadIdx.x >= 32) return;
  const SelectOutputs outputs{p.mask, p.counts, p.status};
  select_row(Team<1>{}, scores, token, valid, p.num_experts, p.selection, outputs, scratch);
}

// ---- many tokens ----

constexpr uint32_t kTile = MOEFY_ROUTER_TILE;  // tokens, and outputs, of a block
constexpr uint32_t kDepth = 32;                // inputs per step
constexpr uint32_t kStride = kTile + 4;        // a row of a tile, aligned to 16 bytes

// A block of 256 threads, 4 tokens x 4 outputs each.
template <bool kAligned, class In, class W>
__device__ __forceinline__ void router_layer(const moefy_router_layer_params& p) {
  __shared__ __align__(16) float in_tile[kDepth][kStride], w_tile[kDepth][kStride];
  const uint32_t num_valid =
      p.num_valid_tokens == nullptr ? p.num_tokens : min(*p.num_valid_tokens, p.num_tokens);
  const uint32_t first_token = blockIdx.x * kTile, first_out = blockIdx.y * kTile;
  // Each thread brings 8 inputs of one token and of one output.
  const uint32_t loaded_row = threadIdx.x % kTile, loaded_depth = threadIdx.x / kTile * 8;
  const uint64_t in_row = min(first_token + loaded_row, p.num_tokens - 1);
  const uint64_t w_row = min(first_out + loaded_row, p.out_width - 1);
  const In* __restrict__ in = static_cast<const In*>(p.in) + in_row * p.in_stride;
  const W* __restrict__ w = static_cast<const W*>(p.w) + w_row * p.in_width;
  const uint32_t my_token = threadIdx.x / 16 * 4, my_out = threadIdx.x % 16 * 4;

  float sums[4][4] = {}, squares[4] = {};
  Eight<In> next_in;
  Eight<W> next_w;
  next_in.template load<kAligned>(in, loaded_depth, p.in_width);
  next_w.template load<kAligned>(w, loaded_depth, p.in_width);
  for (uint32_t depth = 0; depth < p.in_width; depth += kDepth) {
    float loaded_in[8], loaded_w[8];
    next_in.to_floats(loaded_in);
    next_w.to_floats(loaded_w);
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      in_tile[loaded_depth + i][loaded_row] = loaded_in[i];
      w_tile[loaded_depth + i][loaded_row] = loaded_w[i];
    }
    __syncthreads();
    // The next step's loads are under way during this step's arithmetic.
    next_in.template load<kAligned>(in, depth + kDepth + loaded_depth, p.in_width);
    next_w.template load<kAligned>(w, depth + kDepth + loaded_depth, p.in_width);
#pragma unroll 8
    for (uint32_t k = 0; k < kDepth; ++k) {
      const float4 a4 = *reinterpret_cast<const float4*>(&in_tile[k][my_token]);
      const float4 b4 = *reinterpret_cast<const float4*>(&w_tile[k][my_out]);
      const float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.unit_norm) squares[i] = fmaf(a[i], a[i], squares[i]);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t token = first_token + my_token + i;
    const float scale = p.unit_norm ? inverse_norm(squares[i]) : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t n = first_out + my_out + j;
      if (token >= p.num_tokens || n >= p.out_width) continue;
      const float w_scale = p.w_scale == nullptr ? 1.0f : p.w_scale[n];
      const float value = activate(p.activation, sums[i][j] * scale * w_scale);
      p.out[uint64_t(token) * p.out_width + n] = token < num_valid ? value : 0.0f;
    }
  }
}

}  // namespace moefy

// Dynamic shared memory: d_model and hidden, each up to a multiple of 8, + num_experts + 512 words. num_experts <= 512.
#define ROUTER_SELECT(suffix, type)                                                   \
  extern "C" __global__ void __launch_bounds__(512) moefy_router_select_##suffix(     \
      const __grid_constant__ moefy_router_select_params p) {                         \
    moefy::router_select<type>(p);                                                    \
  }
#define ROUTER_LAYER(suffix, in, w)                                                   \
  extern "C" __global__ void __launch_bounds__(256, 2) moefy_router_layer_##suffix(   \
      const __grid_constant__ moefy_router_layer_params p) {                          \
    if (p.in_width % 8 == 0) {                                                        \
      moefy::router_layer<true, in, w>(p);                                            \
    } else {                                                                          \
      moefy::router_layer<false, in, w>(p);                                           \
    }                                                                                 \
  }

ROUTER_SELECT(f32, float)
ROUTER_SELECT(f16, __half)
ROUTER_SELECT(bf16, __nv_bfloat16)

ROUTER_LAYER(f32, float, float)
ROUTER_LAYER(f16, __half, __half)
ROUTER_LAYER(bf16, __nv_bfloat16, __nv_bfloat16)
// The second layer: its input is what the first one wrote.
ROUTER_LAYER(hidden_f16, float, __half)
ROUTER_LAYER(hidden_bf16, float, __nv_bfloat16)
