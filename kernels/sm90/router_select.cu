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
  float* first;    // [tokens, padded_first(hidden)]
  float* scores;   // [tokens, own experts]
  float* of_token;  // [round_up_32(num_experts)] scores, then keys, then what selection sorts

  __device__ Sized(unsigned char* memory, uint32_t row_bytes, uint32_t num_rows, uint32_t w2_bytes, uint32_t first_stride,
                   uint32_t num_experts)
      : rows(memory),
        w2(rows + ceil_div(num_rows, 8) * 8 * in_row_stride(row_bytes)),
        first(reinterpret_cast<float*>(w2 + w2_bytes)),
        scores(first + kTile * first_stride),
        of_token(scores + kTile * ceil_div(num_experts, 4) * 4) {}
};

/// kSteps: as of Slice. kBlocks: of a cluster, at least as many as tokens of a tile.
template <class T, int kSteps, uint32_t kBlocks>
__device__ __forceinline__ void route(const moefy_router_select_params& p, unsigned char* memory) {
  __shared__ Fixed fixed;
  const uint32_t rank = block_of_cluster();
  const uint32_t token0 = blockIdx.y * kTile, num_tokens = min(uint32_t(kTile), p.num_tokens - token0);
  // What the blocks of a cluster own, the last ones less.
  const uint32_t rows_each = ceil_div(p.hidden, kBlocks), experts_each = ceil_div(p.num_experts, kBlocks);
  const uint32_t row0 = min(rank * rows_each, p.hidden), expert0 = min(rank * experts_each, p.num_experts);
  const uint32_t num_rows = min(rows_each, p.hidden - row0), num_experts = min(experts_each, p.num_experts - expert0);
  const Slice<T, 1, kSteps> slice(p.d_model);
  const uint32_t row_stride = in_row_stride(slice.row_bytes), first_stride = padded_first(p.hidden);
  const uint32_t w2_row_bytes = p.hidden * sizeof(T);
  const Sized shared(memory, slice.row_bytes, rows_each, experts_each * w2_row_bytes, first_stride, experts_each);
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
  for (uint32_t i = threadIdx.x; i < num_tokens * first_stride; i += kThreads) {
    if (i % first_stride >= p.hidden) shared.first[i] = 0.0f;
  }
  // The barriers of all blocks are ready.
  sync_cluster();
  wait_for_dependencies();

  if (p.turns != nullptr && rank == 0 && token0 == 0 && threadIdx.x < 2) p.turns[threadIdx.x] = 0;
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
  slice.multiply(rows, rows_each > 8 ? rows + 8 * row_stride : rows, 8, x, fixed.sums);
  if (has_unit_norm(p.kind)) slice.square(x, fixed.squares);
  __syncthreads();

  // Of each pair of a unit and a token, a thread for each block that gets it.
  const uint32_t num_values = num_rows * num_tokens;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < num_values * kBlocks; i += kThreads) {
    const uint32_t block = i / num_values, value = i % num_values;
    const uint32_t token = value / num_rows, row = value % num_rows;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += fixed.sums[w][0][row][token];
    if (has_unit_norm(p.kind)) {
      float square = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) square += fixed.squares[w][token];
      sum *= inverse_norm(square);
    }
    store_async(shared.first + token * first_stride + row0 + row, activate(first_activation(p.kind), sum),
                &fixed.first_barrier, block);
  }
  wait_for_stores(&fixed.first_barrier);
  second_layer(p, reinterpret_cast<const T*>(shared.w2), num_experts, shared.first, num_tokens, shared.scores);
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < num_experts * num_tokens; i += kThreads) {
    store_async(shared.of_token + expert0 + i % num_experts, shared.scores[i], &fixed.scores_barrier, i / num_experts);
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
#define MOEFY_ROUTER_SELECT(name, type, steps, blocks)                                             \
  extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(MOEFY_FFN_FEW_THREADS) \
      moefy_router_select_##name##_##steps##_##blocks(                                               \
          const __grid_constant__ moefy_router_select_params p) {                                    \
    extern __shared__ __align__(128) unsigned char memory[];                                         \
    moefy::few::route<type, steps, blocks>(p, memory);                                               \
  }

MOEFY_ROUTER_SELECT(f16, __half, 4, 8)
MOEFY_ROUTER_SELECT(f16, __half, 16, 8)
MOEFY_ROUTER_SELECT(f16, __half, 4, 16)
MOEFY_ROUTER_SELECT(f16, __half, 16, 16)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 4, 8)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 16, 8)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 4, 16)
MOEFY_ROUTER_SELECT(bf16, __nv_bfloat16, 16, 16)
