// The op `router_select` for many tokens on Hopper, where a block takes some of them through a whole router of two layers:
// tokens -> scores -> masks in one launch, and nothing goes from block to block.
//
// Rows of a product are hidden units, then experts, and columns are tokens, so that few tokens cost little. The second layer
// multiplies rows of W2, as they are, with hidden units that are split into numbers of the same type.
#include "bulk_copy.cuh"
#include "dependency.cuh"
#include "experts.cuh"
#include "parts.cuh"
#include "router_rows.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = MOEFY_ROUTER_BLOCK_THREADS, kWarps = kThreads / 32;
constexpr uint32_t kGroup = 128;  // threads of a warpgroup: the first one copies, two multiply
constexpr uint32_t kGroups = kThreads / kGroup - 1;
constexpr uint32_t kOutputs = MOEFY_ROUTER_BLOCK_OUTPUTS, kMaxStages = MOEFY_ROUTER_BLOCK_STAGES;
constexpr uint32_t kDepth = 64;   // columns of a stage, and hidden units of a warpgroup
constexpr uint32_t kRowBytes = 128;
constexpr uint32_t kPiece = 64, kPieceBytes = kPiece * kRowBytes;  // experts of a piece of W2
static_assert(kOutputs == kGroups * kDepth, "each of the warpgroups has a depth of the second layer");

/// What has a fixed size in shared memory.
template <uint32_t kTokens>
struct Fixed {
  uint64_t full[kMaxStages], empty[kMaxStages], w2;
  uint32_t largest[kTokens];  // bits of the largest hidden unit of each token
  float scales[kTokens];      // of its scores
};

/// Where things are. kTokens: of a block.
template <uint32_t kTokens>
struct Place {
  static constexpr uint32_t kStageBytes = (kOutputs + kTokens) * kRowBytes;

  const moefy_router_block_params& p;
  const uint32_t memory;

  __device__ uint32_t num_stages() const { return ceil_div(p.router.d_model, kDepth); }
  __device__ uint32_t stage(uint32_t index) const { return memory + index % p.num_stages * kStageBytes; }
  __device__ uint32_t depths() const { return ceil_div(p.router.hidden, kDepth); }
  __device__ uint32_t pieces() const { return ceil_div(p.router.num_experts, kPiece); }
  __device__ uint32_t piece(uint32_t index, uint32_t depth) const {
    return memory + p.w2_offset + (index * depths() + depth) * kPieceBytes;
  }
  __device__ uint32_t part(uint32_t which, uint32_t depth) const {
    return memory + p.parts_offset + (which * kGroups + depth) * (kTokens * kRowBytes);
  }
  __device__ uint32_t row_words() const { return pieces() * kPiece + 4; }
};

/// One thread asks for everything. Weights do not depend on what ran before.
template <uint32_t kTokens>
__device__ __forceinline__ void copy(const Place<kTokens>& place, const Fixed<kTokens>& fixed) {
  const moefy_router_block_params& p = place.p;
  const uint32_t count = place.num_stages(), ahead = min(count, p.num_stages);
  const auto full = [&](uint32_t index) { return shared_address(&fixed.full[index % p.num_stages]); };
  const auto copy_weights = [&](uint32_t index) {
    barrier_expect(full(index), Place<kTokens>::kStageBytes);
    copy_box(place.stage(index), p.w1, index * kDepth, 0, full(index));
  };
  const auto copy_tokens = [&](uint32_t index) {
    copy_box(place.stage(index) + kOutputs * kRowBytes, p.x, index * kDepth, blockIdx.x * kTokens, full(index));
  };
#pragma unroll 1
  for (uint32_t i = 0; i < ahead; ++i) copy_weights(i);
  const uint32_t of_w2 = shared_address(&fixed.w2);
  barrier_expect(of_w2, place.pieces() * place.depths() * kPieceBytes);
#pragma unroll 1
  for (uint32_t i = 0; i < place.pieces(); ++i) {
#pragma unroll 1
    for (uint32_t depth = 0; depth < place.depths(); ++depth) {
      copy_box(place.piece(i, depth), p.w2, depth * kDepth, i * kPiece, of_w2);
    }
  }
  wait_for_dependencies();
  // Not earlier: what comes next may rely on the tokens being there (moefy_experts_masked_hidden_early and _halves).
  launch_dependents();
#pragma unroll 1
  for (uint32_t i = 0; i < ahead; ++i) copy_tokens(i);
#pragma unroll 1
  for (uint32_t i = ahead; i < count; ++i) {
    barrier_wait(shared_address(&fixed.empty[i % p.num_stages]), (i / p.num_stages - 1) & 1);
    copy_weights(i);
    copy_tokens(i);
  }
}

/// Of the warpgroup's 64 hidden units and all tokens.
template <class T, uint32_t kTokens>
__device__ __forceinline__ void first_layer(const Place<kTokens>& place, const Fixed<kTokens>& fixed, uint32_t group,
                                            float (&c)[kTokens / 2]) {
  const uint32_t num_stages = place.p.num_stages;
  const auto free = [&](uint32_t index) {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(shared_address(&fixed.empty[index % num_stages]));
  };
#pragma unroll 1
  for (uint32_t i = 0; i < place.num_stages(); ++i) {
    barrier_wait(shared_address(&fixed.full[i % num_stages]), i / num_stages & 1);
    const uint64_t a = operand_of_rows(place.stage(i) + group * (kDepth * kRowBytes));
    const uint64_t b = operand_of_rows(place.stage(i) + kOutputs * kRowBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma<T, false>(c, operand_after(a, 32 * step), operand_after(b, 32 * step), i > 0 || step > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (i > 0) free(i - 1);
  }
  wgmma_wait<0>();
}

__device__ __forceinline__ void wait_for_groups() { asm volatile("bar.sync 1, %0;" ::"n"(kGroups * kGroup) : "memory"); }

/// Activates and splits hidden units, in the order in which the second layer takes them as its second factor.
template <class T, uint32_t kTokens>
__device__ __forceinline__ void split(const Place<kTokens>& place, Fixed<kTokens>& fixed, uint32_t group,
                                      float (&c)[kTokens / 2]) {
#pragma unroll
  for (uint32_t i = 0; i < kTokens / 2; ++i) c[i] = fmaxf(c[i], 0.0f);
  const uint32_t thread = threadIdx.x - kGroup;
  if constexpr (Parts<T>::kIsScaled) {
    // Columns 2 t and 2 t + 1 of each eight tokens.
#pragma unroll
    for (uint32_t i = 0; i < kTokens / 4; ++i) {
      // Of numbers that are not negative words are in the same order; a zero may have a sign.
      uint32_t largest = __float_as_uint(fabsf(fmaxf(c[i / 2 * 4 + i % 2], c[i / 2 * 4 + i % 2 + 2])));
#pragma unroll
      for (uint32_t step = 4; step < 32; step *= 2) largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
      if (lane_id() < 4) atomicMax(&fixed.largest[i / 2 * 8 + lane_id() * 2 + i % 2], largest);
    }
    wait_for_groups();
#pragma unroll
    for (uint32_t i = 0; i < kTokens / 4; ++i) {
      const float scale = Parts<T>::scale(fixed.largest[i / 2 * 8 + lane_id() % 4 * 2 + i % 2]);
      c[i / 2 * 4 + i % 2] *= scale;
      c[i / 2 * 4 + i % 2 + 2] *= scale;
    }
    if (thread < kTokens) fixed.scales[thread] = 1.0f / Parts<T>::scale(fixed.largest[thread]);
  } else {
    if (thread < kTokens) fixed.scales[thread] = 1.0f;
  }
  // A matrix of 8 x 8: the tokens of one of two eights, and hidden units 0 to 7 of the warp's or those from 8 on.
  const uint32_t matrix = lane_id() / 8, chunk = thread % kGroup / 32 * 2 + matrix % 2;
#pragma unroll
  for (uint32_t eight = 0; eight < kTokens / 8; eight += 2) {
    const uint32_t at = swizzled<kRowBytes>((eight + matrix / 2) * 8 + lane_id() % 8, chunk);
#pragma unroll
    for (int part = 0; part < Parts<T>::kCount; ++part) {
      uint32_t words[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) words[i] = Parts<T>::take(c[eight * 4 + 2 * i], c[eight * 4 + 2 * i + 1]);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place.part(part, group) + at),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
  fence_for_copies();
  wait_for_groups();
}

/// Scores of all tokens, of 64 experts at a time, to their rows.
template <class T, uint32_t kTokens>
__device__ __forceinline__ void second_layer(const Place<kTokens>& place, const Fixed<kTokens>& fixed, uint32_t group, float* rows) {
  const uint32_t warp = threadIdx.x % kGroup / 32, words = place.row_words();
  barrier_wait(shared_address(&fixed.w2), 0);
#pragma unroll 1
  for (uint32_t piece = group; piece < place.pieces(); piece += kGroups) {
    // Products with the first parts, and with the others: small sums lose nothing to large ones.
    float c[2][kTokens / 2];
#pragma unroll 1
    for (uint32_t depth = 0; depth < place.depths(); ++depth) {
      const uint64_t a = operand_of_rows(place.piece(piece, depth));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int part = Parts<T>::kCount - 1; part >= 0; --part) {
          const bool is_first = step == 0 && (part == 0 || part == Parts<T>::kCount - 1);
          const uint64_t b = operand_of_rows(place.part(part, depth));
          wgmma<T, false>(c[part > 0], operand_after(a, 32 * step), operand_after(b, 32 * step), depth > 0 || !is_first);
        }
      }
      wgmma_commit();
    }
    wgmma_wait<0>();
    if (rows_are_imposed(place.p.router)) continue;
    float* const to = rows + lane_id() % 4 * 2 * words + piece * kPiece + warp * 16 + lane_id() / 4;
#pragma unroll
    for (uint32_t j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) to[(j * 8 + i % 2) * words + i / 2 * 8] = c[0][4 * j + i] + c[1][4 * j + i];
    }
  }
}

template <class T, uint32_t kTokens>
__device__ __forceinline__ void router_block(const moefy_router_block_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Fixed<kTokens> fixed;
  const moefy_router_select_params& r = p.router;
  const Place<kTokens> place{p, shared_address(memory)};
  const uint32_t thread = threadIdx.x, warp = thread / 32, first_token = blockIdx.x * kTokens;
  if (thread == 0) {
    prefetch_map(p.w1);
    prefetch_map(p.x);
    prefetch_map(p.w2);
#pragma unroll
    for (uint32_t i = 0; i < kMaxStages; ++i) {
      barrier_init(shared_address(&fixed.full[i]));
      barrier_init(shared_address(&fixed.empty[i]), kGroups * 4);
    }
    barrier_init(shared_address(&fixed.w2));
    fence_barriers();
  }
  if (thread < kTokens) fixed.largest[thread] = 0;
  __syncthreads();

  float* const rows = reinterpret_cast<float*>(memory + p.rows_offset);
  if (thread >= kGroup) {
    const uint32_t group = warp / 4 - 1;
    float c[kTokens / 2];
    first_layer<T>(place, fixed, group, c);
    split<T>(place, fixed, group, c);
    second_layer<T>(place, fixed, group, rows);
  } else if (thread == 0) {
    copy(place, fixed);
  } else if (warp > 0 && rows_are_imposed(r)) {
    wait_for_dependencies();
#pragma unroll 1
    for (uint32_t token = warp - 1; token < kTokens; token += kGroup / 32 - 1) {
      copy_imposed(r, min(first_token + token, r.num_tokens - 1), shared_address(rows + token * place.row_words()), lane_id(), 32);
    }
    copy_async_commit();
    copy_async_wait<0>();
  }
  __syncwarp();
  wait_for_dependencies();
  const uint32_t num_valid = valid_tokens(r);
  // racecheck sees no barrier here but the cluster's, of one block.
  __syncthreads();
  arrive_in_cluster();
  wait_for_cluster();
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(memory) + warp * scratch_words(r);
#pragma unroll 1
  for (uint32_t token = warp * 4; token < kTokens; token += 4 * kWarps) {
    select_tokens(r, {rows, place.row_words(), fixed.scales, first_token}, token, num_valid, scratch);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the stages, in whose place selection sorts; then w2, parts and rows.
#define MOEFY_ROUTER_BLOCK(name, type, tokens)                                                    \
  extern "C" __global__ void __launch_bounds__(MOEFY_ROUTER_BLOCK_THREADS, 1)                      \
      moefy_router_block_##name##_##tokens(const __grid_constant__ moefy_router_block_params p) { \
    moefy::router_block<type, tokens>(p);                                                         \
  }

MOEFY_ROUTER_BLOCK(f16, __half, 16)
MOEFY_ROUTER_BLOCK(f16, __half, 32)
MOEFY_ROUTER_BLOCK(f16, __half, 64)
MOEFY_ROUTER_BLOCK(bf16, __nv_bfloat16, 16)
MOEFY_ROUTER_BLOCK(bf16, __nv_bfloat16, 32)
MOEFY_ROUTER_BLOCK(bf16, __nv_bfloat16, 64)
