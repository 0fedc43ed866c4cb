// The op `router_select` for many tokens, on Hopper: tokens -> scores -> masks in one launch.
//
// A cluster takes 64 tokens, and each of its blocks a share of d_model: the weights are read once for all of them, and
// few tokens fill the chip too. Sums over a share stay in shared memory, where each block reads those of its own tokens from
// all blocks, in the order of the blocks. With these tokens alone it goes on: activation, second layer, selection.
//
// The second layer multiplies rows of W2, as they are, with hidden units that are split into numbers of the same type.
#include "bulk_copy.cuh"
#include "dependency.cuh"
#include "experts.cuh"
#include "parts.cuh"
#include "router_rows.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kThreads = MOEFY_ROUTER_MANY_THREADS, kWarps = kThreads / 32;
constexpr uint32_t kGroup = 128;  // threads of a warpgroup: the first one copies, two multiply
constexpr uint32_t kMultipliers = kThreads - kGroup;
constexpr uint32_t kTokens = MOEFY_ROUTER_MANY_TOKENS;  // of a cluster, and of a product of a warpgroup
constexpr uint32_t kDepth = 64;  // columns of a stage, and of a piece of W2
constexpr uint32_t kRowBytes = 128;
constexpr uint32_t kPieceExperts = 64;
constexpr uint32_t kPieceBytes = kPieceExperts * kRowBytes;

/// What has a fixed size in shared memory.
struct Fixed {
  uint64_t full[MOEFY_ROUTER_MANY_STAGES], empty[MOEFY_ROUTER_MANY_STAGES];
  uint64_t pieces[2][MOEFY_ROUTER_MANY_PIECES];
  float scales[64];  // of the scores of each token
};

/// What a block knows of its place. kOutputs: of the first layer, at most. kColumns: tokens of a block at most, as many as the
/// second layer multiplies.
template <uint32_t kOutputs, uint32_t kColumns>
struct Place {
  static constexpr uint32_t kStageBytes = (kTokens + kOutputs) * kRowBytes;
  /// Words of a row of sums: eight more, so that rows meet different banks. The first of those has the sum of squares.
  static constexpr uint32_t kSumWords = kOutputs + 8;

  const moefy_router_many_params& p;
  const uint32_t memory;
  const uint32_t rank, num_tokens;  // of the cluster; of this block
  const uint32_t cluster_token, first_token;
  const uint32_t begin, end;  // stages that this block takes of all

  __device__ Place(const moefy_router_many_params& params, uint32_t shared)
      : p(params),
        memory(shared),
        rank(blockIdx.x % p.num_blocks),
        num_tokens(kTokens / p.num_blocks),
        cluster_token(blockIdx.x / p.num_blocks * kTokens),
        first_token(cluster_token + rank * num_tokens),
        begin(rank * ceil_div(p.router.d_model, kDepth) / p.num_blocks),
        end((rank + 1) * ceil_div(p.router.d_model, kDepth) / p.num_blocks) {}

  __device__ uint32_t stage(uint32_t index) const { return memory + index * kStageBytes; }
  __device__ uint32_t sums(uint32_t token) const { return memory + token * (kSumWords * 4); }
  __device__ uint32_t hidden_depths() const { return ceil_div(p.router.hidden, kDepth); }
  __device__ uint32_t part(uint32_t which, uint32_t depth) const {
    return memory + p.parts_offset + (which * hidden_depths() + depth) * (kColumns * kRowBytes);
  }
  __device__ uint32_t piece(uint32_t group, uint32_t slot) const {
    return memory + p.pieces_offset + (group * p.num_pieces + slot) * kPieceBytes;
  }
  /// Pieces of W2 that a warpgroup multiplies: of 64 experts in turn all columns, 64 at a time.
  __device__ uint32_t num_pieces(uint32_t group) const {
    return (ceil_div(p.router.num_experts, kPieceExperts) + 1 - group) / 2 * hidden_depths();
  }
  /// Where a row of scores, then keys, is for each token: with one layer, where its sums are.
  __device__ uint32_t first_row() const {
    return p.router.w2 == nullptr ? rank * num_tokens * kSumWords : p.rows_offset / 4;
  }
  __device__ uint32_t row_words() const {
    return p.router.w2 == nullptr ? kSumWords : ceil_div(p.router.num_experts, kPieceExperts) * kPieceExperts + 4;
  }

  __device__ void copy_piece(const Fixed& fixed, uint32_t group, uint32_t index) const {
    const uint32_t slot = index % p.num_pieces, barrier = shared_address(&fixed.pieces[group][slot]);
    const uint32_t block = group + index / hidden_depths() * 2;
    barrier_expect(barrier, kPieceBytes);
    copy_box(piece(group, slot), p.w2, index % hidden_depths() * kDepth, block * kPieceExperts, barrier);
  }
};

// ---- first layer ----

/// One thread asks for everything. Weights do not depend on what ran before.
template <class Place, uint32_t kOutputs>
__device__ __forceinline__ void copy(const Place& place, const Fixed& fixed) {
  constexpr uint32_t kBoxRows = kOutputs < 256 ? kOutputs : 256;
  const moefy_router_many_params& p = place.p;
  const uint32_t count = place.end - place.begin, ahead = min(count, p.num_stages);
  const auto copy_weights = [&](uint32_t index) {
    const uint32_t slot = index % p.num_stages, barrier = shared_address(&fixed.full[slot]);
    barrier_expect(barrier, Place::kStageBytes);
#pragma unroll
    for (uint32_t row = 0; row < kOutputs; row += kBoxRows) {
      copy_box(place.stage(slot) + (kTokens + row) * kRowBytes, p.w1, (place.begin + index) * kDepth, row, barrier);
    }
  };
  const auto copy_tokens = [&](uint32_t index) {
    const uint32_t slot = index % p.num_stages;
    copy_box(place.stage(slot), p.x, (place.begin + index) * kDepth, place.cluster_token,
             shared_address(&fixed.full[slot]));
  };
#pragma unroll 1
  for (uint32_t i = 0; i < ahead; ++i) copy_weights(i);
  wait_for_dependencies();
#pragma unroll 1
  for (uint32_t i = 0; i < ahead; ++i) copy_tokens(i);
  if (p.router.w2 != nullptr) {
#pragma unroll 1
    for (uint32_t i = 0; i < 2 * p.num_pieces; ++i) {
      if (i / 2 < place.num_pieces(i % 2)) place.copy_piece(fixed, i % 2, i / 2);
    }
  }
#pragma unroll 1
  for (uint32_t i = ahead; i < count; ++i) {
    barrier_wait(shared_address(&fixed.empty[i % p.num_stages]), (i / p.num_stages - 1) & 1);
    copy_weights(i);
    copy_tokens(i);
  }
}

/// Sums of one thread: products of this block's share of d_model, and squares of a part of a token's inputs.
template <uint32_t kOutputs>
struct FirstSums {
  static constexpr uint32_t kGroupOutputs = kOutputs / 2;                         // that a warpgroup takes
  static constexpr uint32_t kAcross = kGroupOutputs < 128 ? kGroupOutputs : 128;  // of one instruction
  static constexpr uint32_t kInstructions = kGroupOutputs / kAcross;
  static constexpr uint32_t kThreadsOfToken = kMultipliers / kTokens;

  float c[kInstructions][kAcross / 2];
  float square = 0.0f;
};

template <class T, class Place, uint32_t kOutputs>
__device__ __forceinline__ void multiply(const Place& place, const Fixed& fixed, FirstSums<kOutputs>& sums) {
  using Sums = FirstSums<kOutputs>;
  const moefy_router_many_params& p = place.p;
  const uint32_t thread = threadIdx.x - kGroup, out0 = thread / kGroup * Sums::kGroupOutputs;
  const uint32_t count = place.end - place.begin;
  const bool unit_norm = has_unit_norm(p.router.kind);
  const auto free = [&](uint32_t index) {
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(shared_address(&fixed.empty[index % p.num_stages]));
  };
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t slot = i % p.num_stages, from = place.stage(slot);
    barrier_wait(shared_address(&fixed.full[slot]), i / p.num_stages & 1);
    const uint64_t a = operand_of_rows(from);
    const uint64_t b = operand_of_rows(from + (kTokens + out0) * kRowBytes);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (uint32_t j = 0; j < Sums::kInstructions; ++j) {
        wgmma<T, false>(sums.c[j], a + 2 * step, b + 2 * step + j * (Sums::kAcross * kRowBytes / 16), i > 0 || step > 0);
      }
    }
    wgmma_commit();
    if (unit_norm) {
#pragma unroll
      for (uint32_t chunk = thread % Sums::kThreadsOfToken; chunk < kRowBytes / 16; chunk += Sums::kThreadsOfToken) {
        Eight<T> values;
        values.vectors[0] = load_shared_vector(from + swizzled<kRowBytes>(thread / Sums::kThreadsOfToken, chunk));
        float v[8];
        values.to_floats(v);
#pragma unroll
        for (int k = 0; k < 8; ++k) sums.square = fmaf(v[k], v[k], sums.square);
      }
    }
    wgmma_wait<1>();
    if (i > 0) free(i - 1);
  }
  wgmma_wait<0>();
  if (count > 0) return;
#pragma unroll
  for (uint32_t j = 0; j < Sums::kInstructions; ++j) {
#pragma unroll
    for (uint32_t i = 0; i < Sums::kAcross / 2; ++i) sums.c[j][i] = 0.0f;
  }
}

/// Leaves the sums where the blocks of the cluster look for them.
template <class Place, uint32_t kOutputs>
__device__ __forceinline__ void leave(const Place& place, FirstSums<kOutputs>& sums) {
  using Sums = FirstSums<kOutputs>;
  const uint32_t thread = threadIdx.x - kGroup, token0 = thread % kGroup / 32 * 16 + lane_id() / 4;
  const uint32_t out0 = thread / kGroup * Sums::kGroupOutputs + lane_id() % 4 * 2;
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t row = place.sums(token0 + half * 8) + out0 * 4;
#pragma unroll
    for (uint32_t j = 0; j < Sums::kInstructions; ++j) {
#pragma unroll
      for (uint32_t i = 0; i < Sums::kAcross / 8; ++i) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(row + (j * Sums::kAcross + i * 8) * 4),
                     "f"(sums.c[j][i * 4 + half * 2]), "f"(sums.c[j][i * 4 + half * 2 + 1])
                     : "memory");
      }
    }
  }
#pragma unroll
  for (uint32_t distance = 1; distance < Sums::kThreadsOfToken; distance *= 2) {
    sums.square += __shfl_xor_sync(kFullWarp, sums.square, distance);
  }
  if (thread % Sums::kThreadsOfToken == 0) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(place.sums(thread / Sums::kThreadsOfToken) + kOutputs * 4), "f"(sums.square)
                 : "memory");
  }
}

// ---- tokens of a block ----

/// Splits hidden units, of which a lane has 128 i + 4 lane + k as value 4 i + k.
template <class T, class Place, uint32_t kValues>
__device__ __forceinline__ void split(const Place& place, Fixed& fixed, uint32_t token, float (&v)[kValues]) {
  if (place.p.router.kind == MOEFY_ROUTER_MOEFICATION) {
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) v[i] = activate(MOEFY_ROUTER_ACTIVATION_TANH, v[i]);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) v[i] = activate(MOEFY_ROUTER_ACTIVATION_RELU, v[i]);
  }
  if constexpr (Parts<T>::kIsScaled) {
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) largest = max(largest, __float_as_uint(fabsf(v[i])));
    const float scale = Parts<T>::scale(__reduce_max_sync(kFullWarp, largest));
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) v[i] *= scale;
    if (lane_id() == 0) fixed.scales[token] = 1.0f / scale;
  } else {
    if (lane_id() == 0) fixed.scales[token] = 1.0f;
  }
#pragma unroll
  for (uint32_t i = 0; i < kValues; i += 4) {
    const uint32_t column = i * 32 + lane_id() * 4, depth = column / kDepth;
    if (depth >= place.hidden_depths()) continue;
    const uint32_t at = swizzled<kRowBytes>(token, column % kDepth / 8) + column % 8 * 2;
#pragma unroll
    for (int part = 0; part < Parts<T>::kCount; ++part) {
      const uint32_t low = Parts<T>::take(v[i], v[i + 1]), high = Parts<T>::take(v[i + 2], v[i + 3]);
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(place.part(part, depth) + at), "r"(low), "r"(high) : "memory");
    }
  }
}

/// Adds up what the blocks of the cluster have, for the block's tokens in turn, a warp for each. Hidden units are split;
/// what becomes scores goes where this block left its own sums, which nobody else reads.
template <class T, class Place, uint32_t kOutputs>
__device__ __forceinline__ void add_up(const Place& place, Fixed& fixed) {
  constexpr uint32_t kBatch = kOutputs == 128 ? 2 : 1;  // tokens whose sums are under way together
  constexpr uint32_t kValues = kOutputs / 32;
  const moefy_router_select_params& r = place.p.router;
  const bool unit_norm = has_unit_norm(r.kind);
#pragma unroll 1
  for (uint32_t token0 = threadIdx.x / 32; token0 < place.num_tokens; token0 += kWarps * kBatch) {
    float v[kBatch][kValues] = {}, square[kBatch] = {};
    uint32_t row[kBatch];
    const uint32_t count = token0 + kWarps < place.num_tokens ? kBatch : 1;
#pragma unroll
    for (uint32_t b = 0; b < kBatch; ++b) {
      row[b] = place.sums(place.rank * place.num_tokens + token0 + b * kWarps) + lane_id() * 16;
    }
    // The way to another block is long: two of them at a time, and nothing twice.
#pragma unroll 1
    for (uint32_t block0 = 0; block0 < place.p.num_blocks; block0 += 2) {
      float4 sums[2][kBatch][kValues / 4] = {};
      float squares[2][kBatch] = {};
#pragma unroll
      for (uint32_t i = 0; i < 2 * kBatch; ++i) {
        const uint32_t block = block0 + i / kBatch, b = i % kBatch;
        if (block >= place.p.num_blocks || b >= count) continue;
        const uint32_t from = address_in_block(row[b], block);
#pragma unroll
        for (uint32_t j = 0; j < kValues / 4; ++j) sums[i / kBatch][b][j] = load_in_cluster(from + j * 512);
        if (unit_norm) squares[i / kBatch][b] = load_float_in_cluster(from - lane_id() * 16 + kOutputs * 4);
      }
#pragma unroll
      for (uint32_t i = 0; i < 2 * kBatch; ++i) {
        const uint32_t b = i % kBatch;
        square[b] += squares[i / kBatch][b];
#pragma unroll
        for (uint32_t j = 0; j < kValues / 4; ++j) {
          const float4& of_block = sums[i / kBatch][b][j];
          v[b][4 * j] += of_block.x;
          v[b][4 * j + 1] += of_block.y;
          v[b][4 * j + 2] += of_block.z;
          v[b][4 * j + 3] += of_block.w;
        }
      }
    }
#pragma unroll
    for (uint32_t b = 0; b < kBatch; ++b) {
      const uint32_t token = token0 + b * kWarps;
      if (b >= count) break;
      const float scale = unit_norm ? inverse_norm(square[b]) : 1.0f;
      if (r.w2 != nullptr) {
#pragma unroll
        for (uint32_t i = 0; i < kValues; ++i) v[b][i] *= scale;
        split<T>(place, fixed, token, v[b]);
        continue;
      }
      if (lane_id() == 0) fixed.scales[token] = scale;
      if (rows_are_imposed(r)) {
        __syncwarp();  // other lanes have read this row
        copy_imposed(r, min(place.first_token + token, r.num_tokens - 1), row[b] - lane_id() * 16, lane_id(), 32);
        continue;
      }
#pragma unroll
      for (uint32_t i = 0; i < kValues; i += 4) {
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(row[b] + i * 128), "f"(v[b][i]),
                     "f"(v[b][i + 1]), "f"(v[b][i + 2]), "f"(v[b][i + 3])
                     : "memory");
      }
    }
  }
}

/// Products of hidden units with W2, for 64 experts and all tokens of the block at a time.
template <class T, class Place, uint32_t kColumns>
__device__ __forceinline__ void second_layer(const Place& place, const Fixed& fixed, float* rows) {
  const uint32_t group = threadIdx.x / kGroup - 1, num_pieces = place.num_pieces(group);
  const uint32_t depths = place.hidden_depths(), warp = threadIdx.x % kGroup / 32;
  const bool leaves = !rows_are_imposed(place.p.router);
#pragma unroll 1
  for (uint32_t piece = 0; piece < num_pieces;) {
    // Products with the first parts, and with the others: small sums lose nothing to large ones.
    float c[2][kColumns / 2];
#pragma unroll 1
    for (uint32_t depth = 0; depth < depths; ++depth, ++piece) {
      const uint32_t slot = piece % place.p.num_pieces;
      barrier_wait(shared_address(&fixed.pieces[group][slot]), piece / place.p.num_pieces & 1);
      const uint64_t a = operand_of_rows(place.piece(group, slot));
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int part = Parts<T>::kCount - 1; part >= 0; --part) {
          const bool is_first = step == 0 && (part == 0 || part == Parts<T>::kCount - 1);
          const uint64_t b = operand_of_rows(place.part(part, depth));
          wgmma<T, false>(c[part > 0], a + 2 * step, b + 2 * step, depth > 0 || !is_first);
        }
      }
      wgmma_commit();
      if (piece + place.p.num_pieces < num_pieces) {
        wgmma_wait<0>();
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        if (threadIdx.x % kGroup == 0) place.copy_piece(fixed, group, piece + place.p.num_pieces);
      }
    }
    wgmma_wait<0>();
    if (!leaves) continue;
    const uint32_t expert = (group + (piece / depths - 1) * 2) * kPieceExperts + warp * 16 + lane_id() / 4;
    float* const to = rows + expert + lane_id() % 4 * 2 * place.row_words();
#pragma unroll
    for (uint32_t j = 0; j < kColumns / 8; ++j) {
      if (j * 8 >= place.num_tokens) break;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        to[(j * 8 + i % 2) * place.row_words() + i / 2 * 8] = c[0][4 * j + i] + c[1][4 * j + i];
      }
    }
  }
}

template <class T, uint32_t kOutputs, uint32_t kColumns>
__device__ __forceinline__ void router_many(const moefy_router_many_params& p) {
  using Place = Place<kOutputs, kColumns>;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ Fixed fixed;
  const moefy_router_select_params& r = p.router;
  const Place place(p, shared_address(memory));
  const uint32_t warp = threadIdx.x / 32;
  const bool multiplies = threadIdx.x >= kGroup;
  launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_map(p.w1);
    prefetch_map(p.x);
    prefetch_map(p.w2);
#pragma unroll
    for (uint32_t i = 0; i < MOEFY_ROUTER_MANY_STAGES; ++i) {
      barrier_init(shared_address(&fixed.full[i]));
      barrier_init(shared_address(&fixed.empty[i]), kMultipliers / 32);
    }
#pragma unroll
    for (uint32_t i = 0; i < 2 * MOEFY_ROUTER_MANY_PIECES; ++i) {
      barrier_init(shared_address(&fixed.pieces[i % 2][i / 2]));
    }
    fence_barriers();
  }
  __syncthreads();

  if (multiplies) {
    FirstSums<kOutputs> sums;
    multiply<T>(place, fixed, sums);
    // The other warpgroup is done with the stages too.
    asm volatile("bar.sync 1, 256;" ::: "memory");
    leave(place, sums);
  } else if (threadIdx.x == 0) {
    copy<Place, kOutputs>(place, fixed);
  } else if (threadIdx.x >= 32 && r.imposed != nullptr) {
    wait_for_dependencies();
    const uint64_t first = static_cast<uint64_t>(place.first_token) * r.num_experts;
    const uint32_t count = min(place.num_tokens, r.num_tokens - min(place.first_token, r.num_tokens)) * r.num_experts;
#pragma unroll 1
    for (uint32_t i = (threadIdx.x - 32) * 32; i < count; i += (kGroup - 32) * 32) prefetch(r.imposed + first + i);
  }
  __syncwarp();
  wait_for_dependencies();
  const uint32_t num_valid = valid_tokens(r);
  sync_cluster();

  add_up<T, Place, kOutputs>(place, fixed);
  fence_for_copies();
  if (r.w2 != nullptr && p.rows_offset == 0) {
    // Rows will lie where other blocks read sums.
    __syncthreads();
    arrive_in_cluster();
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  float* const rows = reinterpret_cast<float*>(memory) + place.first_row();
  if (r.w2 != nullptr && multiplies) {
    second_layer<T, Place, kColumns>(place, fixed, rows);
  } else if (r.w2 != nullptr && rows_are_imposed(r)) {
#pragma unroll 1
    for (uint32_t token = warp; token < place.num_tokens; token += kGroup / 32) {
      copy_imposed(r, min(place.first_token + token, r.num_tokens - 1),
                   shared_address(rows + token * place.row_words()), lane_id(), 32);
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  // Others may still read this block's sums, and racecheck sees no barrier in a cluster but its own.
  __syncthreads();
  arrive_in_cluster();
  wait_for_cluster();
  uint32_t* const scratch = reinterpret_cast<uint32_t*>(memory + p.parts_offset) + warp * scratch_words(r);
#pragma unroll 1
  for (uint32_t token = warp * 4; token < place.num_tokens; token += 4 * kWarps) {
    select_tokens(r, {rows, place.row_words(), fixed.scales, place.first_token}, token, num_valid, scratch);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the stages, and in their place later the sums, in whose place keys are where there is no room for them
// beyond the parts, then the parts; then pieces of w2.
#define MOEFY_ROUTER_MANY(name, type, outputs, columns, blocks)                              \
  extern "C" __global__ void __launch_bounds__(MOEFY_ROUTER_MANY_THREADS, blocks)            \
      moefy_router_many_##name##_##outputs(const __grid_constant__ moefy_router_many_params p) { \
    moefy::router_many<type, outputs, columns>(p);                                           \
  }

MOEFY_ROUTER_MANY(f16, __half, 128, 32, 2)
MOEFY_ROUTER_MANY(f16, __half, 256, 64, 1)
MOEFY_ROUTER_MANY(f16, __half, 512, 64, 1)
MOEFY_ROUTER_MANY(bf16, __nv_bfloat16, 128, 32, 2)
MOEFY_ROUTER_MANY(bf16, __nv_bfloat16, 256, 64, 1)
MOEFY_ROUTER_MANY(bf16, __nv_bfloat16, 512, 64, 1)
