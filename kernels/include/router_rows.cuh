// Scores of many tokens in shared memory -> masks: what Hopper's routers of many tokens share.
#pragma once

#include "memory.cuh"
#include "router.cuh"

namespace moefy {

/// Whether the rows of scores are filled by scores to be read instead, since nobody wants the router's own.
__device__ __forceinline__ bool rows_are_imposed(const moefy_router_select_params& r) {
  return r.imposed != nullptr && r.scores == nullptr;
}

/// Brings scores to a row, by so many threads.
__device__ __forceinline__ void copy_imposed(const moefy_router_select_params& r, uint32_t token, uint32_t row,
                                             uint32_t thread, uint32_t num_threads) {
  const float* from = r.imposed + static_cast<uint64_t>(token) * r.num_experts;
  const bool is_aligned = (reinterpret_cast<uint64_t>(r.imposed) | r.num_experts * 4) % kChunkBytes == 0;
  const uint32_t step = is_aligned ? 4 : 1;
#pragma unroll 1
  for (uint32_t e = thread * step; e < r.num_experts; e += num_threads * step) {
    if (is_aligned) {
      copy_async(row + e * 4, from + e, true);
    } else {
      copy_async_word(row + e * 4, from + e);
    }
  }
}

/// Rows of scores in shared memory, later of keys, a row for each token of a block.
struct ScoreRows {
  float* rows;
  uint32_t words;        // from one row to the next
  const float* scales;   // of the scores of each token
  uint32_t first_token;  // of the block

  __device__ float* of(uint32_t token) const { return rows + token * words; }
};

constexpr uint32_t kRowLanes = 8;  // that take a token, each four keys of every 32

/// How many keys of a token reach each of three bounds, ten bits for each.
__device__ __forceinline__ uint32_t count_at_least(const uint32_t* keys, uint32_t end, uint32_t low, uint32_t middle,
                                                   uint32_t high) {
  const auto reached = [&](uint32_t key) { return (key >= low) + ((key >= middle) << 10) + ((key >= high) << 20); };
  uint32_t counts = 0;
#pragma unroll 1
  for (uint32_t e = lane_id() % kRowLanes * 4; e < end; e += 32) {
    const uint4 key = *reinterpret_cast<const uint4*>(keys + e);
    counts += reached(key.x) + reached(key.y) + reached(key.z) + reached(key.w);
  }
#pragma unroll
  for (uint32_t step = 1; step < kRowLanes; step *= 2) counts += __shfl_xor_sync(kFullWarp, counts, step);
  return counts;
}

/// A key that just as many keys reach as top-k selects, or 0 where RowSelection has to find out: where equal keys compete, or no
/// score is finite. Four tokens of a warp side by side; all lanes call it.
__device__ __forceinline__ uint32_t least_of_largest(const uint32_t* keys, uint32_t end, const moefy_selection& rule) {
  constexpr uint32_t kBits = 10, kOne = (1u << kBits) - 1;
  const uint32_t known = count_at_least(keys, end, 1, kInfinityKey, kNoKey), num_keys = known & kOne;
  const uint32_t count = min(min(rule.k, rule.max_experts), num_keys);
  uint32_t least = num_keys == count ? 1 : 0, reach = num_keys;
  // Two bits of the count-th largest key at once, until what is known of it tells it from the next one.
#pragma unroll 1
  for (uint32_t bit = 1u << 30; bit != 0 && __any_sync(kFullWarp, reach != count); bit >>= 2) {
    const uint32_t counts = count_at_least(keys, end, least + bit, least + 2 * bit, least + 3 * bit);
    const uint32_t low = counts & kOne, middle = counts >> kBits & kOne, high = counts >> 2 * kBits;
    if (reach == count || low < count) continue;
    reach = high >= count ? high : middle >= count ? middle : low;
    least += high >= count ? 3 * bit : middle >= count ? 2 * bit : bit;
  }
  const bool is_finite = num_keys > (known >> kBits & kOne);
  return count > 0 && is_finite && reach == count ? least : 0;
}

/// The same as `select_tokens`, with so many words of a mask side by side.
template <uint32_t kWords>
__device__ __forceinline__ void select_tokens_by(const moefy_router_select_params& r, const ScoreRows& rows,
                                                 uint32_t token0, uint32_t num_valid, uint32_t* scratch) {
  constexpr uint32_t kLanes = kRowLanes;
  const uint32_t end = round_up_32(r.num_experts), row_words = end / 32;
  const bool is_imposed = rows_are_imposed(r), is_sigmoid = r.kind == MOEFY_ROUTER_MOEFICATION;
  const bool is_absolute = r.kind != MOEFY_ROUTER_CENTROID;
  const uint32_t lane = lane_id() % kLanes, token = token0 + lane_id() / kLanes, index = rows.first_token + token;
  const bool exists = index < r.num_tokens, valid = index < num_valid;
  float* const row = rows.of(token);
  uint32_t* const mask = r.mask + uint64_t(index) * row_words;
  const float scale = rows.scales[token];
  uint32_t largest = 0;
#pragma unroll 1
  for (uint32_t first = lane * 4; first < end; first += kWords * 32) {
    float score[kWords][4];
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t e = first + i * 32;
      const float4 four = *reinterpret_cast<const float4*>(row + (e < end ? e : first));
      score[i][0] = four.x, score[i][1] = four.y, score[i][2] = four.z, score[i][3] = four.w;
    }
    if (!is_imposed) {
      if (r.w1_scale != nullptr) {
#pragma unroll
        for (uint32_t i = 0; i < kWords * 4; ++i) {
          score[i / 4][i % 4] *= r.w1_scale[min(first + i / 4 * 32 + i % 4, r.num_experts - 1)];
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kWords * 4; ++i) {
        const float s = score[i / 4][i % 4] * scale;
        score[i / 4][i % 4] = is_sigmoid ? s : is_absolute ? fabsf(s) : fmaxf(s, 0.0f);
      }
      if (is_sigmoid) {
#pragma unroll
        for (uint32_t i = 0; i < kWords * 4; ++i) {
          float& s = score[i / 4][i % 4];
          s = activate(MOEFY_ROUTER_ACTIVATION_SIGMOID, s);
        }
      }
      if (r.scores != nullptr) {
#pragma unroll
        for (uint32_t i = 0; i < kWords * 4; ++i) {
          const uint32_t e = first + i / 4 * 32 + i % 4;
          const uint64_t at = static_cast<uint64_t>(index) * r.num_experts + e;
          if (!exists || e >= r.num_experts) continue;
          r.scores[at] = valid ? score[i / 4][i % 4] : 0.0f;
          if (r.imposed != nullptr) score[i / 4][i % 4] = __ldcg(r.imposed + at);
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t e = first + i * 32;
      uint32_t key[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        key[k] = valid && e + k < r.num_experts ? score_key(score[i][k]) : 0;
        largest = max(largest, key[k]);
      }
      if (e < end) *reinterpret_cast<uint4*>(row + e) = make_uint4(key[0], key[1], key[2], key[3]);
    }
  }
#pragma unroll
  for (uint32_t step = 1; step < kLanes; step *= 2) largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
  uint32_t least = plain_threshold(r.selection, r.num_experts, largest);
  if (r.selection.rule == MOEFY_RULE_TOP_K) least = least_of_largest(reinterpret_cast<const uint32_t*>(row), end, r.selection);
  const uint32_t is_plain = __ballot_sync(kFullWarp, least > 0);
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t first = 0; is_plain != 0 && first < end; first += kWords * 32) {
    uint32_t words[kWords];
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t e = first + i * 32 + lane * 4;
      const uint4 key = *reinterpret_cast<const uint4*>(row + (e < end ? e : lane * 4));
      words[i] = (key.x >= least ? 1u : 0) | (key.y >= least ? 2u : 0) | (key.z >= least ? 4u : 0) | (key.w >= least ? 8u : 0);
      words[i] <<= lane * 4;
#pragma unroll
      for (uint32_t step = 1; step < kLanes; step *= 2) words[i] |= __shfl_xor_sync(kFullWarp, words[i], step);
    }
#pragma unroll
    for (uint32_t i = 0; i < kWords; ++i) {
      if (first + i * 32 >= end) break;
      count += __popc(words[i]);
      if (lane == i && exists && least > 0) mask[first / 32 + i] = words[i];
    }
  }
  if (r.counts != nullptr && lane == 0 && exists && least > 0) r.counts[index] = count;
  // The others one by one.
  __syncwarp();
#pragma unroll 1
  for (uint32_t others = __ballot_sync(kFullWarp, exists && lane == 0 && least == 0); others != 0; others &= others - 1) {
    const uint32_t from = __ffs(others) - 1, its_token = token0 + from / kLanes, its_index = rows.first_token + its_token;
    uint32_t* const keys = reinterpret_cast<uint32_t*>(rows.of(its_token));
    const RowSelection selection{keys, scratch, r.num_experts, r.mask + uint64_t(its_index) * row_words};
    const bool has_score = selection.run(r.selection);
    report({r.mask, r.counts, r.status}, selection, its_index, has_score, its_index < num_valid);
  }
}

/// Rows become scores, which go to memory if anyone wants them, then keys, by which experts are selected. Eight lanes take a
/// token, so that a warp has four of them side by side.
__device__ __forceinline__ void select_tokens(const moefy_router_select_params& r, const ScoreRows& rows, uint32_t token0,
                                              uint32_t num_valid, uint32_t* scratch) {
  if (r.num_experts <= 32) {
    select_tokens_by<1>(r, rows, token0, num_valid, scratch);
  } else if (r.num_experts <= 64) {
    select_tokens_by<2>(r, rows, token0, num_valid, scratch);
  } else {
    select_tokens_by<4>(r, rows, token0, num_valid, scratch);
  }
}

/// Words that a warp sorts in.
__device__ __forceinline__ uint32_t scratch_words(const moefy_router_select_params& r) {
  return r.selection.rule == MOEFY_RULE_CUMULATIVE_SHARE ? next_power_of_two(round_up_32(r.num_experts)) : 0;
}

}  // namespace moefy
