// The op `attention`: softmax(Q K^T / sqrt(d_head)) V for every head of packed sequences, online over tiles of keys.
//
// f16 and bf16: on tensor cores. A warp takes 32 queries of one head, or 16 of a wide one, a block four times as many; two
// tiles of keys and values lie in shared memory, one of which is under way. f32: a warp takes a query at a time, a lane one
// key of a tile.
#include "attention.cuh"
#include "dependency.cuh"

namespace moefy {
namespace {

constexpr int kWarps = 4;
constexpr uint32_t kThreads = kWarps * 32;

// ---- f16, bf16 ----

constexpr uint32_t kKeys = 64;
/// Fragments of 16 queries of a warp: each reads every key and value, and registers hold no more.
template <int kHead>
constexpr int kDown = kHead <= 64 ? 2 : 1;
template <int kHead>
constexpr uint32_t kQueries = kWarps * 16 * kDown<kHead>;

template <class T, int kHead>
struct Tiles {
  static constexpr uint32_t kRow = 2 * kHead + 16;  // bytes; an odd number of chunks, so that eight rows meet all banks
  static constexpr uint32_t kBytes = kKeys * kRow;

  /// Copies rows of one matrix; rows beyond the sequence become zeros.
  template <uint32_t kRows>
  __device__ static void load(uint32_t to, const T* from, uint64_t stride, uint32_t first, uint32_t length) {
    constexpr uint32_t kChunks = kHead / 8;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const uint32_t row = i / kChunks, chunk = i % kChunks;
      const bool valid = first + row < length;
      copy_async(to + row * kRow + chunk * 16, from + (valid ? first + row : 0) * stride + chunk * 8, valid);
    }
  }
};

template <class T, int kHead>
__device__ __forceinline__ void attention(const moefy_attention_params& p) {
  using Tile = Tiles<T, kHead>;
  constexpr int kM = kDown<kHead>, kSteps = kHead / 16, kAcross = kKeys / 8;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t queries = shared_address(memory), keys = queries + kQueries<kHead> * Tile::kRow;
  const uint32_t values = keys + 2 * Tile::kBytes;
  begin();
  const Place place(p, kQueries<kHead>);
  if (place.query0 >= place.length) return;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t kv_head = place.head / (p.num_heads / p.num_kv_heads);
  const T* q = static_cast<const T*>(p.q) + place.begin * p.stride + place.head * kHead;
  const T* k = static_cast<const T*>(p.k) + place.begin * p.stride + kv_head * kHead;
  const T* v = static_cast<const T*>(p.v) + place.begin * p.stride + kv_head * kHead;
  const uint32_t end = p.is_causal ? min(place.length, place.query0 + kQueries<kHead>) : place.length;
  const uint32_t num_tiles = ceil_div(end, kKeys);
  const uint32_t own_query0 = place.query0 + warp * 16 * kM;
  const uint32_t own_end = p.is_causal ? min(place.length, own_query0 + 16 * kM) : place.length;

  Tile::template load<kQueries<kHead>>(queries, q, p.stride, place.query0, place.length);
  Tile::template load<kKeys>(keys, k, p.stride, 0, place.length);
  Tile::template load<kKeys>(values, v, p.stride, 0, place.length);
  copy_async_commit();

  uint32_t a[kM][kSteps][4];
  float out[kM][kHead / 8][4] = {};
  float largest[kM][2], sums[kM][2] = {};
#pragma unroll
  for (int m = 0; m < kM; ++m) largest[m][0] = largest[m][1] = -INFINITY;
  const float scale = p.scale * 1.4426950408889634f;  // exp2 instead of exp
  // Rows of a matrix of 8 x 8 that this lane gives the address of.
  const uint32_t in_matrix = lane % 8, matrix = lane / 8;
#pragma unroll 1
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) {
      const uint32_t at = (tile + 1) % 2 * Tile::kBytes;
      Tile::template load<kKeys>(keys + at, k, p.stride, (tile + 1) * kKeys, place.length);
      Tile::template load<kKeys>(values + at, v, p.stride, (tile + 1) * kKeys, place.length);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint32_t row = (warp * kM + m) * 16 + matrix % 2 * 8 + in_matrix, column = step * 16 + matrix / 2 * 8;
          load_matrices(a[m][step], queries + row * Tile::kRow + column * 2);
        }
      }
    }
    if (own_query0 < place.length && tile * kKeys < own_end) {
      const uint32_t keys_at = keys + tile % 2 * Tile::kBytes, values_at = values + tile % 2 * Tile::kBytes;
      float scores[kM][kAcross][4] = {};
#pragma unroll
      for (int n = 0; n < kAcross; n += 2) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t b[4];
          const uint32_t row = n * 8 + matrix / 2 * 8 + in_matrix, column = step * 16 + matrix % 2 * 8;
          load_matrices(b, keys_at + row * Tile::kRow + column * 2);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma(scores[m][n], a[m][step], b[0], b[1], T());
            mma(scores[m][n + 1], a[m][step], b[2], b[3], T());
          }
        }
      }
      if (hides_keys(p, place, (tile + 1) * kKeys, own_query0)) {
#pragma unroll
        for (int m = 0; m < kM; ++m) hide_keys(p, place, tile * kKeys, own_query0 + m * 16, scores[m]);
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) soften(scores[m], out[m], largest[m], sums[m], scale);
#pragma unroll
      for (int n = 0; n < kAcross; n += 2) {
        uint32_t weights[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            weights[m][i] = pack<T>(scores[m][n + i / 2][i % 2 * 2], scores[m][n + i / 2][i % 2 * 2 + 1]);
          }
        }
#pragma unroll
        for (int d = 0; d < kHead / 8; d += 2) {
          uint32_t b[4];
          const uint32_t row = n * 8 + matrix % 2 * 8 + in_matrix, column = d * 8 + matrix / 2 * 8;
          load_matrices_transposed(b, values_at + row * Tile::kRow + column * 2);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            mma(out[m][d], weights[m], b[0], b[1], T());
            mma(out[m][d + 1], weights[m], b[2], b[3], T());
          }
        }
      }
    }
    __syncthreads();  // the next copies write over this tile
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) store_queries<T, kHead>(p, place, own_query0 + m * 16, out[m], sums[m]);
}

// ---- f32 ----

constexpr uint32_t kQueriesF32 = 16, kKeysF32 = 32;

template <int kHead>
__device__ __forceinline__ void attention_f32(const moefy_attention_params& p) {
  constexpr int kOwn = kHead / 32;  // columns of a lane
  __shared__ float keys[kKeysF32][kHead + 1], values[kKeysF32][kHead], own_queries[kWarps][kHead];
  begin();
  const Place place(p, kQueriesF32);
  if (place.query0 >= place.length) return;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t kv_head = place.head / (p.num_heads / p.num_kv_heads);
  const float* q = static_cast<const float*>(p.q) + place.begin * p.stride + place.head * kHead;
  const float* k = static_cast<const float*>(p.k) + place.begin * p.stride + kv_head * kHead;
  const float* v = static_cast<const float*>(p.v) + place.begin * p.stride + kv_head * kHead;
  constexpr int kTurns = kQueriesF32 / kWarps;
  float out[kTurns][kOwn] = {}, largest[kTurns], sums[kTurns] = {};
  for (int turn = 0; turn < kTurns; ++turn) largest[turn] = -INFINITY;
  const uint32_t end = p.is_causal ? min(place.length, place.query0 + kQueriesF32) : place.length;
  for (uint32_t first = 0; first < end; first += kKeysF32) {
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < kKeysF32 * kHead; i += kThreads) {
      const uint32_t row = i / kHead, column = i % kHead;
      const bool valid = first + row < place.length;
      const uint64_t at = (valid ? first + row : 0) * p.stride + column;
      keys[row][column] = valid ? __ldcg(k + at) : 0.0f;
      values[row][column] = valid ? __ldcg(v + at) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t query = place.query0 + turn * kWarps + warp;
      const bool exists = query < place.length;
      for (uint32_t i = lane; i < kHead; i += 32) {
        own_queries[warp][i] = exists ? __ldcg(q + static_cast<uint64_t>(query) * p.stride + i) : 0.0f;
      }
      __syncwarp();
      float score = 0.0f;
#pragma unroll 8
      for (int i = 0; i < kHead; ++i) score = fmaf(own_queries[warp][i], keys[lane][i], score);
      __syncwarp();
      const uint32_t key = first + lane;
      const bool sees = key < place.length && (!p.is_causal || key <= query);
      score = sees ? score * p.scale : -INFINITY;
      float m = score;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) m = fmaxf(m, __shfl_xor_sync(kAll, m, step));
      m = fmaxf(m, largest[turn]);
      const float kept = expf(largest[turn] - m), weight = expf(score - m);
      largest[turn] = m;
      float sum = weight;
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
      sums[turn] = sums[turn] * kept + sum;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) out[turn][c] *= kept;
#pragma unroll 8
      for (int other = 0; other < int(kKeysF32); ++other) {
        const float w = __shfl_sync(kAll, weight, other);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) out[turn][c] = fmaf(w, values[other][c * 32 + lane], out[turn][c]);
      }
    }
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint32_t query = place.query0 + turn * kWarps + warp;
    if (query >= place.length) continue;
    float* y = static_cast<float*>(p.y) + (static_cast<uint64_t>(place.begin + query) * p.num_heads + place.head) * kHead;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) y[c * 32 + lane] = out[turn][c] / sums[turn];
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory of f16 and bf16: rows of 2 d_head + 16 bytes, one for each query of a block, 128 for keys and as
// many for values.
#define MOEFY_ATTENTION(d_head)                                                                \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                             \
      moefy_attention_f32_##d_head(const __grid_constant__ moefy_attention_params p) {         \
    moefy::attention_f32<d_head>(p);                                                           \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                             \
      moefy_attention_f16_##d_head(const __grid_constant__ moefy_attention_params p) {         \
    moefy::attention<__half, d_head>(p);                                                       \
  }                                                                                            \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                             \
      moefy_attention_bf16_##d_head(const __grid_constant__ moefy_attention_params p) {        \
    moefy::attention<__nv_bfloat16, d_head>(p);                                                \
  }

MOEFY_ATTENTION(32)
MOEFY_ATTENTION(64)
MOEFY_ATTENTION(96)
MOEFY_ATTENTION(128)
