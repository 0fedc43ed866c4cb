// The op `attention` on Hopper, for heads of 64 and 128 and 16 bits: a warpgroup takes 64 queries of one head. Both products
// read keys and values straight from shared memory; the weights stay in registers between them. Two tiles of keys and
// values lie in shared memory, one of which is under way, and other blocks multiply while this one takes exponentials.
#include "attention.cuh"
#include "dependency.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = 128, kQueries = 64;
constexpr int kRowBytes = 128;
constexpr uint32_t kColumns = 64;  // of a block: rows of 128 bytes

/// Tiles of rows of one head, in blocks of 64 columns.
template <class T, int kHead, uint32_t kRows>
struct Rows {
  static constexpr uint32_t kBlockBytes = kRows * kRowBytes;
  static constexpr uint32_t kBytes = kHead / kColumns * kBlockBytes;

  /// Rows beyond the sequence become zeros.
  __device__ static void load(uint32_t to, const T* from, uint64_t stride, uint32_t first, uint32_t length) {
    constexpr uint32_t kChunks = kHead / 8;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const uint32_t row = i / kChunks, chunk = i % kChunks;
      const bool valid = first + row < length;
      copy_async(to + chunk / 8 * kBlockBytes + swizzled<kRowBytes>(row, chunk % 8),
                 from + (valid ? first + row : 0) * stride + chunk * 8, valid);
    }
  }
};

template <class T, int kHead, uint32_t kKeys>
__device__ __forceinline__ void attention(const moefy_attention_params& p) {
  using Queries = Rows<T, kHead, kQueries>;
  using Keys = Rows<T, kHead, kKeys>;
  constexpr int kAcross = kKeys / 8, kOut = kHead / 8;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t queries = shared_address(memory), keys = queries + Queries::kBytes, values = keys + 2 * Keys::kBytes;
  begin();
  const Place place(p, kQueries);
  if (place.query0 >= place.length) return;
  const uint32_t kv_head = place.head / (p.num_heads / p.num_kv_heads);
  const T* q = static_cast<const T*>(p.q) + place.begin * p.stride + place.head * kHead;
  const T* k = static_cast<const T*>(p.k) + place.begin * p.stride + kv_head * kHead;
  const T* v = static_cast<const T*>(p.v) + place.begin * p.stride + kv_head * kHead;
  const uint32_t end = p.is_causal ? min(place.length, place.query0 + kQueries) : place.length;
  const uint32_t num_tiles = ceil_div(end, kKeys);
  const uint32_t own_query0 = place.query0 + threadIdx.x / 32 * 16;
  Queries::load(queries, q, p.stride, place.query0, place.length);
  Keys::load(keys, k, p.stride, 0, place.length);
  Keys::load(values, v, p.stride, 0, place.length);
  copy_async_commit();

  float out[kOut][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sums[2] = {};
  const float scale = p.scale * 1.4426950408889634f;  // exp2 instead of exp
#pragma unroll 1
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) {
      const uint32_t at = (tile + 1) % 2 * Keys::kBytes;
      Keys::load(keys + at, k, p.stride, (tile + 1) * kKeys, place.length);
      Keys::load(values + at, v, p.stride, (tile + 1) * kKeys, place.length);
    }
    copy_async_commit();
    copy_async_wait<1>();
    fence_for_copies();
    __syncthreads();
    const uint32_t keys_at = keys + tile % 2 * Keys::kBytes, values_at = values + tile % 2 * Keys::kBytes;
    float scores[kAcross][4];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHead / 16; ++step) {
      const uint32_t block = step / 4, in_block = step % 4 * 32;
      wgmma<T, false>(reinterpret_cast<float(&)[kAcross * 4]>(scores),
                      operand_of_rows(queries + block * Queries::kBlockBytes + in_block),
                      operand_of_rows(keys_at + block * Keys::kBlockBytes + in_block), step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (hides_keys(p, place, (tile + 1) * kKeys, own_query0)) hide_keys(p, place, tile * kKeys, own_query0, scores);
    soften(scores, out, largest, sums, scale);
    uint32_t weights[kKeys / 16][4];
#pragma unroll
    for (int n = 0; n < kAcross; n += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[n / 2][i] = pack<T>(scores[n + i / 2][i % 2 * 2], scores[n + i / 2][i % 2 * 2 + 1]);
      }
    }
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < int(kKeys / 16); ++step) {
      wgmma<T, true>(reinterpret_cast<float(&)[kOut * 4]>(out), weights[step],
                     operand_of_columns(values_at + step * 16 * kRowBytes, Keys::kBlockBytes), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the next copies write over this tile
  }
  store_queries<T, kHead>(p, place, own_query0, out, sums);
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: rows of 2 d_head bytes, 64 for queries, and two tiles of keys and two of values, of 128 rows for heads
// of 64 and of 64 for heads of 128.
#define MOEFY_ATTENTION(name, type, d_head, keys, blocks)                                    \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, blocks)                      \
      moefy_attention_wide_##name##_##d_head(const __grid_constant__ moefy_attention_params p) { \
    moefy::attention<type, d_head, keys>(p);                                                 \
  }

MOEFY_ATTENTION(f16, __half, 64, 128, 3)
MOEFY_ATTENTION(bf16, __nv_bfloat16, 64, 128, 3)
MOEFY_ATTENTION(f16, __half, 128, 64, 2)
MOEFY_ATTENTION(bf16, __nv_bfloat16, 128, 64, 2)
