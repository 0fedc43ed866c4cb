// The op `ffn_few`, first launch: the first layer of the router. A block takes eight outputs, whose rows it asks for
// before the tokens are there, and as many tokens as fit its tiles (blockIdx.y).
#include "ffn_few.cuh"
#include "router.cuh"

namespace moefy {
namespace few {
namespace {

constexpr uint32_t kRows = MOEFY_FFN_FEW_ROUTER_ROWS;

template <class T, int kTiles, int kSteps>
__device__ __forceinline__ void first_layer(const moefy_ffn_few_params& p, unsigned char* rows) {
  __shared__ uint64_t barrier;
  __shared__ __align__(16) Sums<kTiles> sums;
  __shared__ float squares[kWarps][kTiles * kTile];
  const moefy_router_select_params& r = p.router;
  const uint32_t width = first_width(r);
  const uint32_t row0 = blockIdx.x * kRows;
  const uint32_t count = min(kRows, width - row0);
  const Slice<T, kTiles, kSteps> slice(r.d_model);
  const uint32_t row_stride = in_row_stride(slice.row_bytes);
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&barrier));
    fence_barriers();
  }
  __syncthreads();
  // It does not matter which copies end before: the barrier waits for this arrival too.
  if (threadIdx.x == 0) barrier_expect(shared_address(&barrier), count * slice.row_bytes);
  if (threadIdx.x < count) {
    const uint64_t row = row0 + threadIdx.x;
    copy_bulk(shared_address(rows) + threadIdx.x * row_stride,
              static_cast<const char*>(r.w1) + row * slice.row_bytes, slice.row_bytes, shared_address(&barrier));
  }
  touch(p);
  launch_dependents();
  if (threadIdx.x < kRows) slice.clear_row_end(rows + threadIdx.x * row_stride);
  // One thread for each output and token.
  const uint32_t n = row0 + threadIdx.x / kTile % kRows;
  const uint32_t tile = threadIdx.x / (kTile * kRows);
  const uint32_t token = tile * kTile + threadIdx.x % kTile;
  const uint32_t token0 = blockIdx.y * kTiles * kTile;
  const uint32_t num_tokens = r.num_tokens - token0;
  const bool writes = tile < kTiles && n < width && token < num_tokens;
  const float scale = writes && r.w1_scale != nullptr ? r.w1_scale[n] : 1.0f;
  __syncthreads();
  wait_for_dependencies();

  typename Slice<T, kTiles, kSteps>::X x;
  slice.load(static_cast<const T*>(r.x) + static_cast<uint64_t>(token0) * r.d_model, num_tokens, x);
  barrier_wait(shared_address(&barrier), 0);
  slice.template multiply<false>(shared_address(rows), 0, kRows, x, sums);
  if (has_unit_norm(r.kind)) slice.square(x, squares);
  __syncthreads();
  if (!writes) return;
  float sum = sum_of_warps<kTiles>(sums, tile, n - row0, threadIdx.x % kTile) * scale, square = 0.0f;
  if (has_unit_norm(r.kind)) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) square += squares[w][token];
    sum *= inverse_norm(square);
  }
  float value = activate(first_activation(r.kind), sum);
  if (p.w2 == nullptr) {
    r.first[static_cast<uint64_t>(token0 + token) * width + n] = value;
    return;
  }
  const uint32_t part_stride = in_row_stride(2 * width) / 2;
  __nv_bfloat16* parts = reinterpret_cast<__nv_bfloat16*>(r.first) + (token0 + token) * kParts * part_stride + n;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
    parts[part * part_stride] = rounded;
    value -= __bfloat162float(rounded);
  }
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: MOEFY_FFN_FEW_ROUTER_ROWS rows, each of in_row_stride.
#define MOEFY_FFN_FEW_ROUTER(name, type, tiles, steps)                                                      \
  extern "C" __global__ void __launch_bounds__(MOEFY_FFN_FEW_THREADS)                                       \
      moefy_ffn_few_router_##name##_##tiles##_##steps(const __grid_constant__ moefy_ffn_few_params p) {     \
    extern __shared__ __align__(128) unsigned char memory[];                                                \
    moefy::few::first_layer<type, tiles, steps>(p, memory);                                                 \
  }

MOEFY_FFN_FEW_ROUTER(f16, __half, 1, 4)
MOEFY_FFN_FEW_ROUTER(f16, __half, 1, 16)
MOEFY_FFN_FEW_ROUTER(f16, __half, 2, 8)
MOEFY_FFN_FEW_ROUTER(f16, __half, 4, 4)
MOEFY_FFN_FEW_ROUTER(bf16, __nv_bfloat16, 1, 4)
MOEFY_FFN_FEW_ROUTER(bf16, __nv_bfloat16, 1, 16)
MOEFY_FFN_FEW_ROUTER(bf16, __nv_bfloat16, 2, 8)
MOEFY_FFN_FEW_ROUTER(bf16, __nv_bfloat16, 4, 4)
