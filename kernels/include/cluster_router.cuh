// Hopper's router for up to eight tokens, by a cluster of blocks. A block has its rows of both layers in shared memory before
// the tokens are there; what the first layer gives goes to all blocks of the cluster.
#pragma once

#include "ffn_few.cuh"
#include "router.cuh"

namespace moefy {
namespace few {

constexpr uint32_t kClusterBlocks = MOEFY_ROUTER_SELECT_BLOCKS;

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

/// Not in line: code that is rarely run would lie between what always is.
__device__ __noinline__ float other_activation(moefy_router_activation activation, float z) { return activate(activation, z); }

/// The activations of a D2DMoE router in line, ReLU and then abs.
template <int kSize>
__device__ __forceinline__ void activate_all(moefy_router_activation activation, float (&z)[kSize]) {
  const bool is_relu = activation == MOEFY_ROUTER_ACTIVATION_RELU;
  if (is_relu || activation == MOEFY_ROUTER_ACTIVATION_ABS) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) z[i] = is_relu ? fmaxf(z[i], 0.0f) : fabsf(z[i]);
  } else {
#pragma unroll 1
    for (int i = 0; i < kSize; ++i) z[i] = other_activation(activation, z[i]);
  }
}

/// Waits for the end of the first phase, and for what other blocks of the cluster have stored in it.
__device__ __forceinline__ void wait_for_stores(const uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra WAIT_%=;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

/// What has a fixed size in shared memory.
struct RouterFixed {
  uint64_t rows_barrier, first_barrier, scores_barrier;
  float squares[kWarps][kTile];
};

/// A block's part in the router, of one layer or of two. Blocks own rows of w1 and experts by fours, the last ones less.
template <class T, int kSteps, bool kTwoLayers>
struct ClusterRouter {
  const moefy_router_select_params& p;
  RouterFixed& fixed;
  Sums<1>& sums;
  const Slice<T, 1, kSteps>& slice;
  const uint32_t num_tokens;
  const uint32_t width;  // of the first layer
  const uint32_t rank, rows_each, row0, num_rows, expert0, num_experts, row_stride, first_stride;
  // Shared memory, each part at a multiple of 16 bytes: the host adds up the same sizes.
  unsigned char* const rows;  // of w1, in_row_stride apart
  unsigned char* const w2;
  float* const first;  // [tokens, width by fours and 4, so that tokens meet different banks]
  float* const end;

  /// `tokens`: a constant where the compiler is to know it.
  __device__ ClusterRouter(const moefy_router_select_params& params, uint32_t tokens, RouterFixed& fixed_memory,
                           Sums<1>& sums_memory, const Slice<T, 1, kSteps>& slice_of_warp, unsigned char* memory)
      : p(params),
        fixed(fixed_memory),
        sums(sums_memory),
        slice(slice_of_warp),
        num_tokens(tokens),
        width(kTwoLayers ? p.hidden : p.num_experts),
        rank(block_of_cluster()),
        rows_each(of_block(width)),
        row0(min(rank * rows_each, width)),
        num_rows(min(rows_each, width - row0)),
        expert0(min(rank * of_block(p.num_experts), p.num_experts)),
        num_experts(min(of_block(p.num_experts), p.num_experts - expert0)),
        row_stride(in_row_stride(slice.row_bytes)),
        first_stride(ceil_div(width, 4) * 4 + 4),
        rows(memory),
        w2(rows + ceil_div(rows_each, 8) * 8 * row_stride),
        first(reinterpret_cast<float*>(w2 + of_block(p.num_experts) * p.hidden * sizeof(T))),
        end(first + num_tokens * first_stride) {}

  static __device__ uint32_t of_block(uint32_t all) { return ceil_div(all, 4 * kClusterBlocks) * 4; }

  /// While the kernel before this one runs: asks for the weights. When the cluster has been waited for, the barriers of all
  /// blocks are ready and stores can come.
  /// `score_bytes`: that other blocks send to this one.
  /// `arrives`: at the cluster's barrier before the rows are asked for; otherwise the caller does, after that.
  __device__ void begin(uint32_t score_bytes, bool arrives) const {
    const uint32_t w2_row_bytes = p.hidden * sizeof(T);
    if (threadIdx.x == 0) {
      for (uint64_t* barrier : {&fixed.rows_barrier, &fixed.first_barrier, &fixed.scores_barrier}) {
        barrier_init(shared_address(barrier));
      }
      fence_barriers();
      barrier_expect(shared_address(&fixed.rows_barrier), num_rows * slice.row_bytes + num_experts * w2_row_bytes);
      barrier_expect(shared_address(&fixed.first_barrier), num_tokens * (first_stride - 4) * sizeof(float));
      barrier_expect(shared_address(&fixed.scores_barrier), score_bytes);
    }
    if (threadIdx.x < num_rows) slice.clear_row_end(rows + threadIdx.x * row_stride);
    __syncthreads();
    if (arrives) arrive_in_cluster();
    if (threadIdx.x < num_rows) {
      const char* from = static_cast<const char*>(p.w1) + static_cast<uint64_t>(row0 + threadIdx.x) * slice.row_bytes;
      copy_bulk(shared_address(rows) + threadIdx.x * row_stride, from, slice.row_bytes,
                shared_address(&fixed.rows_barrier));
    }
    if (kTwoLayers && threadIdx.x == 32 && num_experts > 0) {
      copy_bulk(shared_address(w2), static_cast<const char*>(p.w2) + expert0 * w2_row_bytes, num_experts * w2_row_bytes,
                shared_address(&fixed.rows_barrier));
    }
  }

  /// Sends the outputs of the first layer of all tokens to every block.
  __device__ void first_layer(const typename Slice<T, 1, kSteps>::X& x) const {
    const uint32_t token = threadIdx.x / 32, unit = lane_id() % 16;
    const bool has_scale = !kTwoLayers && p.w1_scale != nullptr && unit < num_rows;
    const float scale = has_scale ? p.w1_scale[row0 + unit] : 1.0f;
    barrier_wait(shared_address(&fixed.rows_barrier), 0);
    const uint32_t from = shared_address(rows);
    if (rows_each > 8) {
      slice.multiply(from, from + 8 * row_stride, 8, x, sums);
    } else {
      slice.template multiply<false>(from, 0, 8, x, sums);
    }
    if (has_unit_norm(p.kind)) slice.square(x, fixed.squares);
    __syncthreads();
    // A warp for each token, a lane for each unit, and then for each four of them and each block that gets them.
    static_assert(kWarps >= kTile && kClusterBlocks == 16, "tokens have a warp each, blocks half of its lanes");
    if (token < num_tokens) {
      float sums_of_unit[1] = {scale * sum_of_warps<1>(sums, 0, unit, token)};
      float& sum = sums_of_unit[0];
      if (has_unit_norm(p.kind)) {
        float square = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) square += fixed.squares[w][token];
        sum *= inverse_norm(square);
      }
      activate_all(first_activation(p.kind), sums_of_unit);
      const float* to = first + token * first_stride + row0;
#pragma unroll
      for (uint32_t pass = 0; pass < 2; ++pass) {
        const uint32_t four = (lane_id() / 16 + pass * 2) * 4;
        const float4 values = make_float4(__shfl_sync(kFullWarp, sum, four), __shfl_sync(kFullWarp, sum, four + 1),
                                          __shfl_sync(kFullWarp, sum, four + 2), __shfl_sync(kFullWarp, sum, four + 3));
        if (four < num_rows) store_async(to + four, values, &fixed.first_barrier, unit);
      }
    }
  }

  /// Until those of all blocks are here.
  __device__ void wait_for_first() const { wait_for_stores(&fixed.first_barrier); }

  /// Threads that share the scores of an expert for some tokens: as many as there are blocks, or half of them.
  template <int kTokens>
  static constexpr uint32_t kTeam = kTokens == 1 ? kClusterBlocks : kClusterBlocks / 2;

  /// Calls `use` with each of the block's experts, counted from `expert0` on, the first of kTokens tokens and their scores
  /// (those of tokens that do not exist are some token's). All threads of a team do.
  template <int kTokens, class Use>
  __device__ void second_layer(Use use) const {
    static_assert(kTokens == 1 || kTokens * 2 == kTile, "one or two groups of tokens");
    constexpr uint32_t kSize = kTeam<kTokens>;
    const uint32_t shift = num_tokens > kTokens, team = threadIdx.x / kSize;
    const uint32_t token0 = shift * (team % 2) * kTokens;
    const uint32_t lanes = ((1u << kSize) - 1) << (threadIdx.x % 32 / kSize * kSize);
#pragma unroll 1
    for (uint32_t e = team >> shift; e < num_experts; e += kThreads / kSize >> shift) {
      float scores[kTokens] = {};
#pragma unroll 1
      for (uint32_t k = threadIdx.x % kSize * 8; k < p.hidden; k += kSize * 8) {
        Eight<T> row;
        row.load_anywhere(reinterpret_cast<const T*>(w2) + e * p.hidden + k);
        float w[8];
        row.to_floats(w);
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const float4* in =
              reinterpret_cast<const float4*>(first + min(token0 + i, num_tokens - 1) * first_stride + k);
          const float4 a = in[0], b = in[1];
          const float even = fmaf(w[6], b.z, fmaf(w[4], b.x, fmaf(w[2], a.z, w[0] * a.x)));
          const float odd = fmaf(w[7], b.w, fmaf(w[5], b.y, fmaf(w[3], a.w, w[1] * a.y)));
          scores[i] += even + odd;
        }
      }
#pragma unroll
      for (uint32_t step = kSize / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) scores[i] += __shfl_xor_sync(lanes, scores[i], step);
      }
      activate_all(second_activation(p.kind), scores);
      use(e, token0, scores);
    }
  }
};

}  // namespace few
}  // namespace moefy
