// Hopper's router for few tokens: tokens -> scores -> masks in one launch, a cluster of blocks for eight tokens. A block
// has its rows of both layers in shared memory before the tokens are there; what the first layer gives goes to all blocks
// of the cluster, and the scores of a token to the one that selects for it.
#include "ffn_few.cuh"
#include "router.cuh"

namespace moefy {
namespace few {
namespace {

/// What has a fixed size in shared memory.
struct Fixed {
  uint64_t rows_barrier, first_barrier, scores_barrier;
  uint32_t max_key, count;
  alignas(16) Sums<1> sums;
  float squares[kWarps][kTile];
  alignas(16) float units[kTile][16];  // of the first layer, the block's own
};

__device__ __forceinline__ uint32_t block_of_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// Stores to another block of the cluster; the barrier there counts the bytes.
__device__ __forceinline__ void store_async(const float* to, float value, const uint64_t* barrier, uint32_t rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   address_in_block(shared_address(to), rank)),
               "r"(__float_as_uint(value)), "r"(address_in_block(shared_address(barrier), rank))
               : "memory");
}

__device__ __forceinline__ void store_async(const float* to, float4 values, const uint64_t* barrier, uint32_t rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in_block(shared_address(to), rank)),
               "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w),
               "r"(address_in_block(shared_address(barrier), rank))
               : "memory");
}

/// Adds a thread's part of <w, in>, eight products.
template <class T>
__device__ __forceinline__ void add_eight(float (&sums)[4], const T* w, const float* in) {
  Eight<T> loaded;
  loaded.load_anywhere(w);
  float weights[8];
  loaded.to_floats(weights);
  const float4 a = *reinterpret_cast<const float4*>(in), b = *reinterpret_cast<const float4*>(in + 4);
  sums[0] = fmaf(weights[4], b.x, fmaf(weights[0], a.x, sums[0]));
  sums[1] = fmaf(weights[5], b.y, fmaf(weights[1], a.y, sums[1]));
  sums[2] = fmaf(weights[6], b.z, fmaf(weights[2], a.z, sums[2]));
  sums[3] = fmaf(weights[7], b.w, fmaf(weights[3], a.w, sums[3]));
}

/// <w, in>, by four threads side by side, of a multiple of 8 numbers in shared memory.
template <class T>
__device__ __forceinline__ float quad_dot(const T* w, const float* in, uint32_t size) {
  float sums[4] = {};
  uint32_t k = threadIdx.x % 4 * 8;
#pragma unroll 1
  for (; k + 96 < size; k += 128) {
#pragma unroll
    for (int i = 0; i < 4; ++i) add_eight(sums, w + k + i * 32, in + k + i * 32);
  }
#pragma unroll 1
  for (; k < size; k += 32) add_eight(sums, w + k, in + k);
  const uint32_t quad = 0xfu << (threadIdx.x % 32 / 4 * 4);
  float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  sum += __shfl_xor_sync(quad, sum, 1);
  return sum + __shfl_xor_sync(quad, sum, 2);
}

/// Waits for the end of the first phase, and for what other blocks of the cluster have stored in it.
__device__ __forceinline__ void wait_for_stores(const uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra WAIT_%=;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

/// The rest of shared memory, each part at a multiple of 16 bytes: the host adds up the same sizes.
struct Sized {
  unsigned char* rows;  // of w1, in_row_stride apart
  unsigned char* w2;
  float* first;    // [tokens, hidden and 4, so that tokens meet different banks]
  float* of_token;  // [round_up_32(num_experts)] scores, then keys, then what selection sorts

  __device__ Sized(unsigned char* memory, uint32_t row_bytes, uint32_t num_rows, uint32_t w2_bytes,
                   uint32_t first_stride)
      : rows(memory),
        w2(rows + ceil_div(num_rows, 8) * 8 * in_row_stride(row_bytes)),
        first(reinterpret_cast<float*>(w2 + w2_bytes)),
        of_token(first + kTile * first_stride) {}
};

/// kSteps: as of Slice. kBlocks: of a cluster, at least as many as tokens of a tile.
template <class T, int kSteps, uint32_t kBlocks>
__device__ __forceinline__ void route(const moefy_router_select_params& p, unsigned char* memory) {
  __shared__ Fixed fixed;
  const uint32_t rank = block_of_cluster();
  static_assert(kBlocks >= kTile && kWarps >= kTile && kBlocks <= 16, "tokens have a block and a warp each");
  const uint32_t token0 = blockIdx.y * kTile, num_tokens = min(uint32_t(kTile), p.num_tokens - token0);
  // What the blocks of a cluster own, the last ones less.
  const uint32_t rows_each = ceil_div(p.hidden, 4 * kBlocks) * 4, experts_each = ceil_div(p.num_experts, kBlocks);
  const uint32_t row0 = min(rank * rows_each, p.hidden), expert0 = min(rank * experts_each, p.num_experts);
  const uint32_t num_rows = min(rows_each, p.hidden - row0), num_experts = min(experts_each, p.num_experts - expert0);
  const Slice<T, 1, kSteps> slice(p.d_model);
  const uint32_t row_stride = in_row_stride(slice.row_bytes), first_stride = p.hidden + 4;
  const uint32_t w2_row_bytes = p.hidden * sizeof(T);
  const Sized shared(memory, slice.row_bytes, rows_each, experts_each * w2_row_bytes, first_stride);
  const bool selects = rank < num_tokens;  // for this token of the tile
  if (threadIdx.x == 0) {
    for (uint64_t* barrier : {&fixed.rows_barrier, &fixed.first_barrier, &fixed.scores_barrier}) {
      barrier_init(shared_address(barrier));
    }
    fence_barriers();
    fixed.max_key = fixed.count = 0;
    barrier_expect(shared_address(&fixed.rows_barrier), num_rows * slice.row_bytes + num_experts * w2_row_bytes);
    barrier_expect(shared_address(&fixed.first_barrier), num_tokens * p.hidden * sizeof(float));
    barrier_expect(shared_address(&fixed.scores_barrier), selects ? p.num_experts * sizeof(float) : 0);
  }
  __syncthreads();
  if (threadIdx.x < num_rows) {
    const char* from = static_cast<const char*>(p.w1) + static_cast<uint64_t>(row0 + threadIdx.x) * slice.row_bytes;
    copy_bulk(shared_address(shared.rows) + threadIdx.x * row_stride, from, slice.row_bytes,
              shared_address(&fixed.rows_barrier));
  }
  if (threadIdx.x == 32 && num_experts > 0) {
    copy_bulk(shared_address(shared.w2), static_cast<const char*>(p.w2) + expert0 * w2_row_bytes,
              num_experts * w2_row_bytes, shared_address(&fixed.rows_barrier));
  }
  touch(p);
  launch_dependents();
  if (threadIdx.x < num_rows) slice.clear_row_end(shared.rows + threadIdx.x * row_stride);
  // The barriers of all blocks are ready.
  sync_cluster();
  wait_for_dependencies();

  typename Slice<T, 1, kSteps>::X x;
  slice.load(static_cast<const T*>(p.x) + static_cast<uint64_t>(token0) * p.d_model, num_tokens, x);
  // Scores to be read instead, of at most kExperts experts.
  constexpr int kOfThread = MOEFY_FFN_FEW_EXPERTS / kThreads;
  float imposed[kOfThread] = {};
  if (selects && p.imposed != nullptr) {
    const float* from = p.imposed + static_cast<uint64_t>(token0 + rank) * p.num_experts;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t e = threadIdx.x + i * kThreads;
      if (e < p.num_experts) imposed[i] = __ldcg(from + e);
    }
  }
  const bool valid = token0 + rank < valid_tokens(p);
  barrier_wait(shared_address(&fixed.rows_barrier), 0);
  const uint32_t rows = shared_address(shared.rows);
  if (rows_each > 8) {
    slice.multiply(rows, rows + 8 * row_stride, 8, x, fixed.sums);
  } else {
    slice.template multiply<false>(rows, 0, 8, x, fixed.sums);
  }
  if (has_unit_norm(p.kind)) slice.square(x, fixed.squares);
  __syncthreads();

  // A warp for each token, a lane for each unit, and then for each four of them and each block that gets them.
  const uint32_t warp = threadIdx.x / 32;
  if (warp < num_tokens) {
    float (&units)[16] = fixed.units[warp];
    if (lane_id() < num_rows) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += fixed.sums[w][0][lane_id()][warp];
      if (has_unit_norm(p.kind)) {
        float square = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) square += fixed.squares[w][warp];
        sum *= inverse_norm(square);
      }
      units[lane_id()] = activate(first_activation(p.kind), sum);
    }
    __syncwarp();
    const float* to = shared.first + warp * first_stride + row0;
    for (uint32_t four = lane_id() / kBlocks * 4; four < num_rows; four += 32 / kBlocks * 4) {
      const float4 values = *reinterpret_cast<const float4*>(&units[four]);
      store_async(to + four, values, &fixed.first_barrier, lane_id() % kBlocks);
    }
  }
  wait_for_stores(&fixed.first_barrier);

  // Four threads for each expert of each token. Tokens come in powers of two: a division would take long.
  const T* const w2 = reinterpret_cast<const T*>(shared.w2);
  const uint32_t shift = 32 - __clz(num_tokens - 1), of_token = threadIdx.x / 4 & ((1u << shift) - 1);
#pragma unroll 1
  for (uint32_t e = threadIdx.x / 4 >> shift; e < num_experts && of_token < num_tokens; e += kThreads / 4 >> shift) {
    const float score = quad_dot(w2 + e * p.hidden, shared.first + of_token * first_stride, p.hidden);
    if (threadIdx.x % 4 == 0) {
      store_async(shared.of_token + expert0 + e, activate(second_activation(p.kind), score), &fixed.scores_barrier,
                  of_token);
    }
  }
  if (!selects) return;

  wait_for_stores(&fixed.scores_barrier);
  const uint32_t token = token0 + rank, row = round_up_32(p.num_experts);
  uint32_t* const keys = reinterpret_cast<uint32_t*>(shared.of_token);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const uint32_t e = threadIdx.x + i * kThreads;
    if (e >= row) break;
    const bool exists = e < p.num_experts && valid;
    const float score = exists ? shared.of_token[e] : 0.0f;
    if (e < p.num_experts && p.scores != nullptr) p.scores[static_cast<uint64_t>(token) * p.num_experts + e] = score;
    const uint32_t key = exists ? score_key(p.imposed != nullptr ? imposed[i] : score) : 0;
    keys[e] = key;
    const uint32_t largest = __reduce_max_sync(kFullWarp, key);
    if (lane_id() == 0) atomicMax(&fixed.max_key, largest);
  }
  __syncthreads();
  uint32_t* const mask = p.mask + static_cast<uint64_t>(token) * (row / 32);
  select_by_block(p, token, valid, RowSelection{keys, keys + row, p.num_experts, mask}, fixed.max_key, &fixed.count);
}

}  // namespace
}  // namespace few
}  // namespace moefy

// Dynamic shared memory: Sized.
#define MOEFY_ROUTER_SELECT(name, type, steps)                                                             \
  extern "C" __global__ void __cluster_dims__(MOEFY_ROUTER_SELECT_BLOCKS, 1, 1)                            \
      __launch_bounds__(MOEFY_FFN_FEW_THREADS, 1)                                                          \
          moefy_router_select_##name##_##steps(const __grid_constant__ moefy_router_select_params p) {     \
    extern __shared__ __align__(128) unsigned char memory[];                                               \
    moefy::few::route<type, steps, MOEFY_ROUTER_SELECT_BLOCKS>(p, memory);                                 \
  }

MOEFY_ROUTER_SELECT(f16, __half, 4)
MOEFY_ROUTER_SELECT(f16, __half, 16)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 4)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 16)
