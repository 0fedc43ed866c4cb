// Routers: tokens -> scores -> masks. All arithmetic is f32, whatever the type of weights and tokens.
//
// Few tokens: the rows of the first layer are dealt out over the chip; then a block per token does the rest.
// Many tokens: one tiled product per layer, then moefy_select.

#include "dependency.cuh"
#include "router.cuh"
#include "select.cuh"

namespace moefy {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// ---- few tokens ----

constexpr uint32_t kFewWarps = 4;
constexpr uint32_t kSelectThreads = 512;

// first[t, n] = activation(<w1[n], x[t]> * scale), a warp for each output n and kTokens tokens; d_model % 8 == 0.
template <class T, int kTokens>
__device__ __forceinline__ void first_layer(const moefy_router_select_params& p) {
  constexpr int kBatch = kTokens == 1 ? 4 : 1;  // loads under way at a time
  const uint32_t width = first_width(p);
  const uint32_t n = blockIdx.x * kFewWarps + threadIdx.x / 32;
  const uint32_t token0 = blockIdx.y * kTokens;
  launch_dependents();
  if (n >= width) return;
  const T* __restrict__ w = static_cast<const T*>(p.w1) + static_cast<uint64_t>(n) * p.d_model;
#pragma unroll 1
  for (uint32_t k = lane_id() * (128 / sizeof(T)); k < p.d_model; k += 32 * (128 / sizeof(T))) prefetch(w + k);
  const float w_scale = p.w1_scale == nullptr ? 1.0f : p.w1_scale[n];
  wait_for_dependencies();

  const T* x[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    x[t] = static_cast<const T*>(p.x) + min(token0 + t, p.num_tokens - 1) * p.x_stride;
  }
  const bool unit_norm = has_unit_norm(p.kind);
  float sums[kTokens] = {}, squares[kTokens] = {};
#pragma unroll 1
  for (uint32_t first = lane_id() * 8; first < p.d_model; first += kBatch * 32 * 8) {
    Eight<T> weights[kBatch], in[kBatch][kTokens];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      weights[i].template load<true>(w, first + i * 256, p.d_model);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) in[i][t].load_fresh(x[t], first + i * 256, p.d_model);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float row[8];
      weights[i].to_floats(row);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float values[8];
        in[i][t].to_floats(values);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sums[t] = fmaf(row[j], values[j], sums[t]);
          if (unit_norm) squares[t] = fmaf(values[j], values[j], squares[t]);
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    sums[t] = warp_sum(sums[t]) * w_scale;
    if (unit_norm) sums[t] *= inverse_norm(warp_sum(squares[t]));
  }
  // Lane t has the sum of token t.
  float own = sums[0];
#pragma unroll
  for (int t = 1; t < kTokens; ++t) own = lane_id() == uint32_t(t) ? sums[t] : own;
  const uint32_t token = token0 + lane_id();
  if (lane_id() < kTokens && token < p.num_tokens) {
    p.first[static_cast<uint64_t>(token) * width + n] = activate(first_activation(p.kind), own);
  }
}

// The rest, a block for each token, or for several where there are more than multiprocessors; hidden % 8 == 0.
template <class T>
__device__ __forceinline__ void select_from_first(const moefy_router_select_params& p) {
  extern __shared__ __align__(16) float shared[];
  __shared__ uint32_t max_key, count;
  const uint32_t width = first_width(p), row = round_up_32(p.num_experts);
  const uint32_t tokens_each = (p.num_tokens + gridDim.x - 1) / gridDim.x, token0 = blockIdx.x * tokens_each;
  const uint32_t num_tokens = min(tokens_each, p.num_tokens - min(token0, p.num_tokens));
  float* const in = shared;
  float* const after_in = in + tokens_each * padded_first(width);
  float* const scores = p.w2 == nullptr ? in : after_in;
  const uint32_t score_stride = p.w2 == nullptr ? padded_first(width) : p.num_experts;
  uint32_t* const keys = reinterpret_cast<uint32_t*>(after_in + tokens_each * row);

  launch_dependents();
  const T* w2 = static_cast<const T*>(p.w2);
  // Before the tokens are there: w2 nearer, and best of all here.
  uint32_t* const scratch = keys + row;
  const uint32_t sorted = p.selection.rule == MOEFY_RULE_CUMULATIVE_SHARE ? next_power_of_two(p.num_experts) : 0;
  if (p.w2_in_shared) {
    T* const copy = reinterpret_cast<T*>(scratch + round_up_32(sorted));
    for (uint32_t i = threadIdx.x * 16; i < p.num_experts * p.hidden * sizeof(T); i += kSelectThreads * 16) {
      copy_async(shared_address(copy) + i, reinterpret_cast<const char*>(w2) + i, true);
    }
    copy_async_commit();
    w2 = copy;
  } else {
    constexpr uint32_t kLine = 128 / sizeof(T);
    for (uint32_t k = threadIdx.x * kLine; k < p.num_experts * p.hidden; k += kSelectThreads * kLine) prefetch(w2 + k);
  }
  // A thread has one expert at most.
  const auto imposed_of = [&](uint32_t token) {
    if (p.imposed == nullptr || threadIdx.x >= p.num_experts || token >= p.num_tokens) return 0.0f;
    return __ldcg(p.imposed + static_cast<uint64_t>(token) * p.num_experts + threadIdx.x);
  };
  wait_for_dependencies();
  float next_imposed = imposed_of(token0);
  load_first(p, token0, num_tokens, in);
  copy_async_wait<0>();
  __syncthreads();
  if (p.w2 != nullptr) second_layer(p, w2, p.num_experts, in, num_tokens, scores);
  const uint32_t num_valid = p.num_valid_tokens == nullptr ? p.num_tokens : __ldcg(p.num_valid_tokens);
#pragma unroll 1
  for (uint32_t token = token0; token < token0 + num_tokens; ++token) {
    if (threadIdx.x == 0) max_key = count = 0;
    __syncthreads();
    const bool valid = token < num_valid;
    const float imposed = next_imposed;
    next_imposed = imposed_of(token + 1);
    const uint32_t e = threadIdx.x;
    if (e < row) {
      const bool exists = e < p.num_experts && valid;
      const float score = exists ? scores[(token - token0) * score_stride + e] : 0.0f;
      if (e < p.num_experts && p.scores != nullptr) p.scores[static_cast<uint64_t>(token) * p.num_experts + e] = score;
      keys[e] = exists ? score_key(p.imposed == nullptr ? score : imposed) : 0;
      const uint32_t largest = __reduce_max_sync(kFullWarp, keys[e]);
      if (lane_id() == 0) atomicMax(&max_key, largest);
    }
    __syncthreads();
    uint32_t* const mask = p.mask + static_cast<uint64_t>(token) * (row / 32);
    select_by_block(p, token, valid, RowSelection{keys, scratch, p.num_experts, mask}, max_key, &count);
    __syncthreads();
  }
}

// ---- many tokens ----

constexpr uint32_t kTile = MOEFY_ROUTER_TILE;  // tokens, and outputs, of a block
constexpr uint32_t kDepth = 32;                // inputs per step
constexpr uint32_t kStride = kTile + 4;        // a row of a tile, aligned to 16 bytes

// A block of 256 threads, 4 tokens x 4 outputs each.
template <bool kAligned, class In, class W>
__device__ __forceinline__ void router_layer(const moefy_router_layer_params& p) {
  __shared__ __align__(16) float in_tile[kDepth][kStride], w_tile[kDepth][kStride];
  begin();
  const uint32_t num_valid = valid_tokens(p);
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

#define ROUTER_FIRST(suffix, type, tokens)                                                  \
  extern "C" __global__ void __launch_bounds__(128) moefy_router_first_##suffix##_##tokens( \
      const __grid_constant__ moefy_router_select_params p) {                               \
    moefy::first_layer<type, tokens>(p);                                                    \
  }
// Dynamic shared memory: for each token of a block the outputs of the first layer up to a multiple of 128 and num_experts up to
// a multiple of 32; that once more, the next power of two where the rule sorts, and w2 where there is room.
#define ROUTER_SELECT(suffix, type)                                                  \
  extern "C" __global__ void __launch_bounds__(512, 1) moefy_router_select_##suffix( \
      const __grid_constant__ moefy_router_select_params p) {                        \
    moefy::select_from_first<type>(p);                                               \
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

ROUTER_FIRST(f32, float, 1)
ROUTER_FIRST(f32, float, 8)
ROUTER_FIRST(f16, __half, 1)
ROUTER_FIRST(f16, __half, 8)
ROUTER_FIRST(bf16, __nv_bfloat16, 1)
ROUTER_FIRST(bf16, __nv_bfloat16, 8)
ROUTER_SELECT(f32, float)
ROUTER_SELECT(f16, __half)
ROUTER_SELECT(bf16, __nv_bfloat16)

ROUTER_LAYER(f32, float, float)
ROUTER_LAYER(f16, __half, __half)
ROUTER_LAYER(bf16, __nv_bfloat16, __nv_bfloat16)
// The second layer: its input is what the first one wrote.
ROUTER_LAYER(hidden_f16, float, __half)
ROUTER_LAYER(hidden_bf16, float, __nv_bfloat16)
