// One layer of a router on tensor cores, for many tokens: activation(<w[n], in[t]> * scales), with sums in f32 of products
// that are exact. A block takes 64 tokens by kOut outputs and goes through the inputs in stages of 64.
#include "dependency.cuh"
#include "experts.cuh"
#include "mma.cuh"
#include "router.cuh"

namespace moefy {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kTokens = MOEFY_ROUTER_TILE;
constexpr uint32_t kDepth = 64;  // inputs of a stage: rows of 128 bytes
constexpr int kRowBytes = 128;
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr int kStages = 4;

/// How eight warps share a tile.
template <int kOut>
struct Share {
  static constexpr int kAcross = kOut / (kOut == 128 ? 4 : 2) / 8;  // fragments of eight outputs
  static constexpr int kWarpsAcross = kOut / 8 / kAcross;
  static constexpr int kDown = kTokens / (8 / kWarpsAcross) / 16;  // fragments of sixteen tokens
};

template <class T, int kOut>
__device__ __forceinline__ void router_product(const moefy_router_layer_params& p) {
  using Share = Share<kOut>;
  constexpr uint32_t kStageBytes = (kTokens + kOut) * kRowBytes;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float norms[kTokens];
  const uint32_t stages = shared_address(memory);
  const uint32_t first_token = blockIdx.x * kTokens, first_out = blockIdx.y * kOut;
  begin();

  const T* in = static_cast<const T*>(p.in);
  const T* w = static_cast<const T*>(p.w);
  const auto load = [&](uint32_t stage) {
    const uint32_t to = stages + stage % kStages * kStageBytes, k0 = stage * kDepth;
#pragma unroll
    for (uint32_t i = threadIdx.x; i < (kTokens + kOut) * kChunks; i += kThreads) {
      const uint32_t row = i / kChunks, chunk = i % kChunks, k = k0 + chunk * 8;
      const bool is_token = row < kTokens;
      const uint32_t at = is_token ? first_token + row : first_out + row - kTokens;
      const bool valid = k < p.in_width && at < (is_token ? p.num_tokens : p.out_width);
      const T* from = is_token ? in + static_cast<uint64_t>(valid ? at : 0) * p.in_stride
                               : w + static_cast<uint64_t>(valid ? at : 0) * p.in_width;
      copy_async(to + swizzled<kRowBytes>(row, chunk), from + (valid ? k : 0), valid);
    }
  };
  const uint32_t num_stages = ceil_div(p.in_width, kDepth);
#pragma unroll
  for (uint32_t stage = 0; stage < kStages - 1; ++stage) {
    if (stage < num_stages) load(stage);
    copy_async_commit();
  }
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t token0 = warp / Share::kWarpsAcross * Share::kDown * 16;
  const uint32_t out0 = warp % Share::kWarpsAcross * Share::kAcross * 8;
  float c[Share::kDown][Share::kAcross][4] = {};
  float square = 0.0f;  // of a quarter of the inputs of token threadIdx.x / 4
#pragma unroll 1
  for (uint32_t stage = 0; stage < num_stages; ++stage) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (stage + kStages - 1 < num_stages) load(stage + kStages - 1);
    copy_async_commit();
    const uint32_t from = stages + stage % kStages * kStageBytes;
    if (p.unit_norm) {
#pragma unroll
      for (uint32_t chunk = threadIdx.x % 4; chunk < kChunks; chunk += 4) {
        Eight<T> values;
        values.vectors[0] = load_shared_vector(from + swizzled<kRowBytes>(threadIdx.x / 4, chunk));
        float v[8];
        values.to_floats(v);
#pragma unroll
        for (int i = 0; i < 8; ++i) square = fmaf(v[i], v[i], square);
      }
    }
#pragma unroll
    for (uint32_t step = 0; step < kDepth / 16; ++step) {
      uint32_t a[Share::kDown][4];
#pragma unroll
      for (int i = 0; i < Share::kDown; ++i) {
        load_matrices(a[i], from + swizzled<kRowBytes>(token0 + i * 16 + lane % 16, step * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < Share::kAcross; j += 2) {
        uint32_t b[4];
        const uint32_t row = kTokens + out0 + j * 8 + lane % 8 + lane / 16 * 8;
        load_matrices(b, from + swizzled<kRowBytes>(row, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < Share::kDown; ++i) {
          mma(c[i][j], a[i], b[0], b[1], T());
          mma(c[i][j + 1], a[i], b[2], b[3], T());
        }
      }
    }
  }
  if (p.unit_norm) {
    square = quad_sum(square);
    if (threadIdx.x % 4 == 0) norms[threadIdx.x / 4] = inverse_norm(square);
    __syncthreads();
  }

  const uint32_t num_valid = valid_tokens(p);
#pragma unroll
  for (int i = 0; i < Share::kDown * 2; ++i) {
    const uint32_t row = token0 + i * 8 + g, token = first_token + row;
    if (token >= p.num_tokens) continue;
    const float scale = p.unit_norm ? norms[row] : 1.0f;
#pragma unroll
    for (int j = 0; j < Share::kAcross; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t n = first_out + out0 + j * 8 + 2 * t + r;
        if (n >= p.out_width) continue;
        const float w_scale = p.w_scale == nullptr ? 1.0f : p.w_scale[n];
        const float value = activate(p.activation, c[i / 2][j][i % 2 * 2 + r] * scale * w_scale);
        p.out[static_cast<uint64_t>(token) * p.out_width + n] = token < num_valid ? value : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: four stages of 64 tokens and the block's outputs, 128 bytes each. The inputs' width is a multiple
// of 8, and rows begin at multiples of 16 bytes.
#define MOEFY_ROUTER_PRODUCT(name, type, outputs)                                                      \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads)                                        \
      moefy_router_product_##name##_##outputs(const __grid_constant__ moefy_router_layer_params p) {   \
    moefy::router_product<type, outputs>(p);                                                           \
  }

MOEFY_ROUTER_PRODUCT(f16, __half, 32)
MOEFY_ROUTER_PRODUCT(f16, __half, 128)
MOEFY_ROUTER_PRODUCT(bf16, __nv_bfloat16, 32)
MOEFY_ROUTER_PRODUCT(bf16, __nv_bfloat16, 128)
