// The op `ffn_few` in three launches, each of which begins while the one before it runs: moefy_ffn_few_router computes the
// first layer of the router; every block of moefy_ffn_few finishes it and selects by itself, which costs less than to wait
// for another launch, and runs its share of the executed neurons; moefy_add_shares adds the shares.
#include "ffn_few_stream.cuh"

namespace moefy {
namespace few {
namespace {

/// The second layer of the router on tensor cores: products [num_experts, columns] of its rows with the parts of the
/// first layer, whose sum is exact. A column is a part of a token; columns come in eights.
struct SecondLayer {
  const moefy_ffn_few_params& p;
  const Sized& shared;
  float* products;
  uint32_t columns;

  /// Adds the products of 16 rows of a matrix, from `row0` on, with 128 inputs from `k0` on.
  __device__ __forceinline__ void multiply(uint32_t row0, uint32_t w2, uint32_t k0) const {
    const moefy_router_select_params& r = p.router;
    const uint32_t g = lane_id() / 4, t = lane_id() % 4;
    const uint32_t row_bytes = 2 * r.hidden, part_stride = in_row_stride(row_bytes);
    const uint32_t num_parts = kParts * r.num_tokens;
    const uint32_t low = min(row0 + g, r.num_experts - 1), high = min(row0 + g + 8, r.num_experts - 1);
    const uint32_t rows = shared_address(shared.ring) + w2 * r.num_experts * row_bytes;
    uint32_t at[4];
    uint4 a[4], d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t k = k0 + i * 32 + t * 8;
      at[i] = k < r.hidden ? 2 * k : kNoExpert;
      const uint32_t offset = k < r.hidden ? 2 * k : 0;
      a[i] = load_shared_vector(rows + low * row_bytes + offset);
      d[i] = load_shared_vector(rows + high * row_bytes + offset);
    }
#pragma unroll 1
    for (uint32_t column0 = 0; column0 < columns; column0 += 8) {
      const bool exists = column0 + g < num_parts;
      const uint32_t part = shared_address(shared.router_inputs) + (exists ? column0 + g : 0) * part_stride;
      float c[4][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 b = load_shared_vector(part + (at[i] == kNoExpert ? 0 : at[i]));
        if (at[i] == kNoExpert || !exists) b = uint4{};
        const uint32_t first[4] = {a[i].x, d[i].x, a[i].y, d[i].y}, second[4] = {a[i].z, d[i].z, a[i].w, d[i].w};
        mma(c[i], first, b.x, b.y, __nv_bfloat16());
        mma(c[i], second, b.z, b.w, __nv_bfloat16());
      }
      float* to = products + (row0 + g) * columns + column0 + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half, to += 8 * columns) {
        float2 sum = w2 + k0 == 0 ? float2{} : *reinterpret_cast<float2*>(to);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum.x += c[i][2 * half];
          sum.y += c[i][2 * half + 1];
        }
        *reinterpret_cast<float2*>(to) = sum;
      }
    }
  }

  __device__ __forceinline__ void run() const {
#pragma unroll 1
    for (uint32_t row0 = threadIdx.x / 32 * 16; row0 < p.router.num_experts; row0 += kWarps * 16) {
#pragma unroll 1
      for (uint32_t w2 = 0; w2 < p.num_w2; ++w2) {
#pragma unroll 1
        for (uint32_t k0 = 0; k0 < p.router.hidden; k0 += 128) multiply(row0, w2, k0);
      }
    }
  }
};

/// From what the first launch left to this block's share of y.
template <class T, int kTiles, int kSteps, int kNeurons>
__device__ __forceinline__ void run(const moefy_ffn_few_params& p, unsigned char* memory) {
  __shared__ Fixed<kTiles> fixed;
  __shared__ uint64_t w2_barrier, parts_barrier;
  const moefy_router_select_params& r = p.router;
  const uint32_t part_bytes = r.hidden == 0 ? 0 : kParts * r.num_tokens * in_row_stride(2 * r.hidden);
  Stream<T, kTiles, kSteps, kNeurons> stream(p, r.num_tokens, fixed, memory, part_bytes);
  const Sized& shared = stream.shared;
  const uint32_t w2_bytes = p.num_w2 * r.num_experts * r.hidden * 2;
  stream.begin();
  if (threadIdx.x == 0 && p.w2 != nullptr) {
    barrier_init(shared_address(&w2_barrier));
    barrier_init(shared_address(&parts_barrier));
    fence_barriers();
    barrier_expect(shared_address(&w2_barrier), w2_bytes);
    copy_bulk(shared_address(shared.ring), p.w2, w2_bytes, shared_address(&w2_barrier));
  }
  touch(p);
  launch_dependents();
  if (r.imposed != nullptr) {
    const uint32_t all = r.num_tokens * r.num_experts;
    for (uint32_t i = threadIdx.x * 32; i < all; i += kThreads * 32) prefetch(r.imposed + i);
  }
  __syncthreads();
  wait_for_dependencies();
  if (threadIdx.x == 0 && p.w2 != nullptr) {
    barrier_expect(shared_address(&parts_barrier), part_bytes);
    copy_bulk(shared_address(shared.router_inputs), r.first, part_bytes, shared_address(&parts_barrier));
  }
  ask_for_scores(r, r.num_tokens, shared.keys);
  typename Slice<T, kTiles, kSteps>::X x;
  stream.slice.load(r.x, r.num_tokens, x);

  const uint32_t columns = (kParts * r.num_tokens + 7) / 8 * 8;
  float* products = reinterpret_cast<float*>(shared.ring + round_up_128(w2_bytes));
  if (p.w2 != nullptr) {
    barrier_wait(shared_address(&w2_barrier), 0);
    barrier_wait(shared_address(&parts_barrier), 0);
    SecondLayer{p, shared, products, columns}.run();
    __syncthreads();
  }
  wait_for_imposed(r);
  make_keys(r, r.num_tokens, valid_tokens(r), fixed, shared.keys, [&](uint32_t token, uint32_t e) {
    if (r.imposed != nullptr) return __uint_as_float(shared.keys[token * round_up_32(r.num_experts) + e]);
    if (p.w2 == nullptr) return __ldcg(r.first + token * r.num_experts + e);
    const float* of_parts = products + e * columns + token * kParts;
    return activate(second_activation(r.kind), (of_parts[2] + of_parts[1]) + of_parts[0]);
  });
  fence_for_copies();
  stream.run(x);
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: Sized.
#define MOEFY_FFN_FEW(name, type, tiles, steps, neurons, per_sm)                                              \
  extern "C" __global__ void __launch_bounds__(MOEFY_FFN_FEW_THREADS, per_sm)                                 \
      moefy_ffn_few_##name##_##tiles##_##steps##_##neurons(const __grid_constant__ moefy_ffn_few_params p) { \
    extern __shared__ __align__(128) unsigned char memory[];                                                  \
    moefy::few::run<type, tiles, steps, neurons>(p, memory);                                                  \
  }
#define MOEFY_FFN_FEW_OF(name, type)      \
  MOEFY_FFN_FEW(name, type, 1, 4, 8, 2)   \
  MOEFY_FFN_FEW(name, type, 1, 4, 16, 2)  \
  MOEFY_FFN_FEW(name, type, 1, 16, 8, 1)  \
  MOEFY_FFN_FEW(name, type, 1, 16, 16, 1) \
  MOEFY_FFN_FEW(name, type, 2, 8, 8, 1)   \
  MOEFY_FFN_FEW(name, type, 2, 8, 16, 1)  \
  MOEFY_FFN_FEW(name, type, 4, 4, 8, 1)   \
  MOEFY_FFN_FEW(name, type, 4, 4, 16, 1)

MOEFY_FFN_FEW_OF(f16, __half)
MOEFY_FFN_FEW_OF(bf16, __nv_bfloat16)
