// The op `attention`: softmax(Q K^T / sqrt(d_head)) V for every head of packed sequences, online over tiles of keys.
//
// f16 and bf16: a block takes 64 queries of one head, a warp 16 of them, on tensor cores; two tiles of keys and values lie
// in shared memory, one of which is under way. f32: a warp takes a query at a time, a lane one key of a tile.
#include "dependency.cuh"
#include "experts.cuh"
#include "mma.cuh"

namespace moefy {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 4;
constexpr uint32_t kThreads = kWarps * 32;

/// What a block works on.
struct Place {
  uint32_t begin;   // first token of the sequence
  uint32_t length;  // of the sequence
  uint32_t query0;  // first query, within the sequence
  uint32_t head;

  __device__ Place(const moefy_attention_params& p, uint32_t queries) {
    begin = p.sequence_offsets[blockIdx.z];
    length = p.sequence_offsets[blockIdx.z + 1] - begin;
    query0 = blockIdx.x * queries;
    head = blockIdx.y;
  }
};

template <class T>
__device__ __forceinline__ uint32_t pack(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// ---- f16, bf16 ----

constexpr uint32_t kQueries = 64, kKeys = 64;

template <class T, int kHead>
struct Tiles {
  static constexpr uint32_t kRow = 2 * kHead + 16;  // bytes; an odd number of chunks, so that eight rows meet all banks
  static constexpr uint32_t kBytes = kKeys * kRow;

  /// Copies rows of one matrix; rows beyond the sequence become zeros.
  __device__ static void load(uint32_t to, const T* from, uint64_t stride, uint32_t first, uint32_t length) {
    constexpr uint32_t kChunks = kHead / 8;
    for (uint32_t i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const uint32_t row = i / kChunks, chunk = i % kChunks;
      const bool valid = first + row < length;
      copy_async(to + row * kRow + chunk * 16, from + (valid ? first + row : 0) * stride + chunk * 8, valid);
    }
  }
};

template <class T, int kHead>
__device__ __forceinline__ void attention(const moefy_attention_params& p) {
  using Tile = Tiles<T, kHead>;
  constexpr int kSteps = kHead / 16;
  extern __shared__ __align__(128) unsigned char memory[];
  const uint32_t queries = shared_address(memory), keys = queries + Tile::kBytes, values = keys + 2 * Tile::kBytes;
  launch_dependents();
  wait_for_dependencies();
  const Place place(p, kQueries);
  if (place.query0 >= place.length) return;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t kv_head = place.head / (p.num_heads / p.num_kv_heads);
  const T* q = static_cast<const T*>(p.q) + place.begin * p.stride + place.head * kHead;
  const T* k = static_cast<const T*>(p.k) + place.begin * p.stride + kv_head * kHead;
  const T* v = static_cast<const T*>(p.v) + place.begin * p.stride + kv_head * kHead;
  const uint32_t end = p.is_causal ? min(place.length, place.query0 + kQueries) : place.length;
  const uint32_t num_tiles = ceil_div(end, kKeys);

  Tile::load(queries, q, p.stride, place.query0, place.length);
  Tile::load(keys, k, p.stride, 0, place.length);
  Tile::load(values, v, p.stride, 0, place.length);
  copy_async_commit();

  uint32_t a[kSteps][4];
  float out[kHead / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY}, sums[2] = {};
  const float scale = p.scale * 1.4426950408889634f;  // exp2 instead of exp
  // Rows of a matrix of 8 x 8 that this lane gives the address of.
  const uint32_t in_matrix = lane % 8, matrix = lane / 8;
#pragma unroll 1
  for (uint32_t tile = 0; tile < num_tiles; ++tile) {
    if (tile + 1 < num_tiles) {
      const uint32_t at = (tile + 1) % 2 * Tile::kBytes;
      Tile::load(keys + at, k, p.stride, (tile + 1) * kKeys, place.length);
      Tile::load(values + at, v, p.stride, (tile + 1) * kKeys, place.length);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t row = warp * 16 + matrix % 2 * 8 + in_matrix, column = step * 16 + matrix / 2 * 8;
        load_matrices(a[step], queries + row * Tile::kRow + column * 2);
      }
    }
    const uint32_t keys_at = keys + tile % 2 * Tile::kBytes, values_at = values + tile % 2 * Tile::kBytes;
    float scores[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < int(kKeys / 8); n += 2) {
      float c[2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        const uint32_t row = n * 8 + matrix / 2 * 8 + in_matrix, column = step * 16 + matrix % 2 * 8;
        load_matrices(b, keys_at + row * Tile::kRow + column * 2);
        mma(c[0], a[step], b[0], b[1], T());
        mma(c[1], a[step], b[2], b[3], T());
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = c[0][i];
        scores[n + 1][i] = c[1][i];
      }
    }
    // What a query must not see.
    float tile_largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < int(kKeys / 8); ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t key = tile * kKeys + n * 8 + 2 * t + i % 2;
        const uint32_t query = place.query0 + warp * 16 + g + i / 2 * 8;
        const bool sees = key < place.length && (!p.is_causal || key <= query);
        scores[n][i] = sees ? scores[n][i] * scale : -INFINITY;
        tile_largest[i / 2] = fmaxf(tile_largest[i / 2], scores[n][i]);
      }
    }
    float kept[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = tile_largest[half];
      m = fmaxf(m, __shfl_xor_sync(kAll, m, 1));
      m = fmaxf(largest[half], fmaxf(m, __shfl_xor_sync(kAll, m, 2)));
      // The first tile has key 0, which every query sees, so m is a number.
      kept[half] = exp2f(largest[half] - m);
      largest[half] = m;
      sums[half] *= kept[half];
    }
#pragma unroll
    for (int d = 0; d < kHead / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] *= kept[i / 2];
    }
#pragma unroll
    for (int n = 0; n < int(kKeys / 8); n += 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[n + j][i] = exp2f(scores[n + j][i] - largest[i / 2]);
          sums[i / 2] += scores[n + j][i];
        }
      }
      const uint32_t weights[4] = {pack<T>(scores[n][0], scores[n][1]), pack<T>(scores[n][2], scores[n][3]),
                                   pack<T>(scores[n + 1][0], scores[n + 1][1]),
                                   pack<T>(scores[n + 1][2], scores[n + 1][3])};
#pragma unroll
      for (int d = 0; d < kHead / 8; d += 2) {
        uint32_t b[4];
        const uint32_t row = n * 8 + matrix % 2 * 8 + in_matrix, column = d * 8 + matrix / 2 * 8;
        load_matrices_transposed(b, values_at + row * Tile::kRow + column * 2);
        mma(out[d], weights, b[0], b[1], T());
        mma(out[d + 1], weights, b[2], b[3], T());
      }
    }
    __syncthreads();  // the next copies write over this tile
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(sums[half]);
    const uint32_t query = place.query0 + warp * 16 + g + half * 8;
    if (query >= place.length) continue;
    T* y = static_cast<T*>(p.y) + (static_cast<uint64_t>(place.begin + query) * p.num_heads + place.head) * kHead + 2 * t;
#pragma unroll
    for (int d = 0; d < kHead / 8; ++d) {
      *reinterpret_cast<uint32_t*>(y + d * 8) = pack<T>(out[d][2 * half] / sum, out[d][2 * half + 1] / sum);
    }
  }
}

// ---- f32 ----

constexpr uint32_t kQueriesF32 = 16, kKeysF32 = 32;

template <int kHead>
__device__ __forceinline__ void attention_f32(const moefy_attention_params& p) {
  constexpr int kOwn = kHead / 32;  // columns of a lane
  __shared__ float keys[kKeysF32][kHead + 1], values[kKeysF32][kHead], own_queries[kWarps][kHead];
  launch_dependents();
  wait_for_dependencies();
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

// Dynamic shared memory of f16 and bf16: one tile of queries, two of keys, two of values, each 64 rows of 2 d_head + 16
// bytes.
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
