// Selection: which experts run, given the f32 scores of one token. Exact: the bits are those of the reference.
//
// One warp does a row, from its keys in shared memory (router.cuh has a block do plain ones). The loops stay loops: this runs inside kernels whose code must
// fit the instruction cache.
#pragma once

#include "moefy_abi.h"
#include "team.cuh"

namespace moefy {

// Scores as integers of the same order. 0: never selected (NaN and -inf).
constexpr uint32_t kZeroKey = 0x80000000u, kInfinityKey = 0xff800000u, kNoKey = 0xffffffffu;  // the last: more than any score's

__device__ __forceinline__ uint32_t score_key(float score) {
  if (!(score > -__int_as_float(0x7f800000))) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_score(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__host__ __device__ constexpr uint32_t round_up_32(uint32_t v) { return (v + 31) / 32 * 32; }

__host__ __device__ constexpr uint32_t next_power_of_two(uint32_t v) {
  uint32_t power = 1;
  while (power < v) power *= 2;
  return power;
}

// The least key that is selected, where that follows from the largest one alone: dynamic-k without a cap, on a row without
// special values. Otherwise 0.
__device__ __forceinline__ uint32_t plain_threshold(const moefy_selection& rule, uint32_t num_experts, uint32_t max_key) {
  const bool plain = rule.rule == MOEFY_RULE_DYNAMIC_K && rule.threshold > 0 && rule.max_experts >= num_experts &&
                     max_key > kZeroKey && max_key < kInfinityKey;
  // Numbers that are not negative become keys by their sign alone.
  return plain ? __float_as_uint(rule.threshold * __uint_as_float(max_key ^ kZeroKey)) | kZeroKey : 0;
}

struct RowSelection {
  uint32_t* keys;        // [round_up_32(num_experts)], 0 beyond the last expert
  uint32_t* scratch;     // where the rule is CUMULATIVE_SHARE: the next power of two of num_experts words
  uint32_t num_experts;
  uint32_t* mask;        // [ceil(num_experts/32)]: what is selected

  __device__ __forceinline__ uint32_t count_at_least(uint32_t key) const {
    uint32_t count = 0;
#pragma unroll 1
    for (uint32_t e = lane_id(); e < round_up_32(num_experts); e += 32) count += keys[e] >= key;
    return __reduce_add_sync(kFullWarp, count);
  }

  // All experts whose key is at least `key` > 0.
  __device__ __forceinline__ void take_at_least(uint32_t key) const {
#pragma unroll 1
    for (uint32_t first = 0; first < num_experts; first += 32) {
      const uint32_t word = __ballot_sync(kFullWarp, keys[first + lane_id()] >= key);
      if (lane_id() == 0) mask[first / 32] = word;
    }
  }

  // All experts whose key is at least `key` > 0, and of those whose key is just `equal` the first `ties`.
  __device__ __forceinline__ void take(uint32_t key, uint32_t equal, uint32_t ties) const {
#pragma unroll 1
    for (uint32_t first = 0; first < num_experts; first += 32) {
      const uint32_t own = keys[first + lane_id()];
      uint32_t word = __ballot_sync(kFullWarp, own >= key);
      const uint32_t tied = __ballot_sync(kFullWarp, own == equal && own < key);
      const uint32_t before = __popc(tied & ((1u << lane_id()) - 1));
      word |= __ballot_sync(kFullWarp, (tied >> lane_id() & 1) != 0 && before < ties);
      ties -= min(ties, uint32_t(__popc(tied)));
      if (lane_id() == 0) mask[first / 32] = word;
    }
  }

  // The `count` largest keys, 1 <= count <= number of keys > 0; of equal ones the lower expert ids.
  __device__ __forceinline__ void take_largest(uint32_t count) const {
    // The count-th largest key, bit by bit: the largest key that at least `count` keys reach.
    uint32_t key = 0;
#pragma unroll 1
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      if (count_at_least(key | bit) >= count) key |= bit;
    }
    const uint32_t larger = key == 0xffffffffu ? 0 : count_at_least(key + 1);
    take(key + 1, key, count - larger);
  }

  // Size of the smallest prefix in descending order whose sum reaches `share` of the row's sum. Both sums are taken one
  // by one in that order.
  __device__ __forceinline__ uint32_t count_of_share(float share, uint32_t num_keys) const {
    const uint32_t size = next_power_of_two(num_experts);
    __syncwarp();  // other lanes may still read what the row before left
    for (uint32_t i = lane_id(); i < size; i += 32) scratch[i] = i < num_experts ? keys[i] : 0;
    __syncwarp();
    sort_descending(scratch, size);
    // Every lane adds all of them: each needs the count, and no one would gain from waiting.
    float total = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < num_keys; ++i) total += key_score(scratch[i]);
    // Not 0 times infinity.
    const float target = share > 0.0f ? share * total : 0.0f;
    float sum = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < num_keys; ++i) {
      sum += key_score(scratch[i]);
      if (sum >= target) return i + 1;
    }
    return num_keys;
  }

  // Bitonic; the values alone matter, since equal keys are equal scores.
  static __device__ __forceinline__ void sort_descending(uint32_t* values, uint32_t size) {
#pragma unroll 1
    for (uint32_t run = 2; run <= size; run *= 2) {
#pragma unroll 1
      for (uint32_t step = run / 2; step > 0; step /= 2) {
#pragma unroll 1
        for (uint32_t i = lane_id(); i < size / 2; i += 32) {
          const uint32_t low = i / step * 2 * step + i % step;
          const uint32_t a = values[low], b = values[low + step];
          const bool descending = (low & run) == 0;
          if (descending ? a < b : a > b) {
            values[low] = b;
            values[low + step] = a;
          }
        }
        __syncwarp();
      }
    }
  }

  // Returns false when no score is finite; then nothing is selected.
  __device__ __forceinline__ bool run(const moefy_selection& rule) const {
    uint32_t largest = 0, num_keys = 0;
    bool finite = false;
#pragma unroll 1
    for (uint32_t e = lane_id(); e < round_up_32(num_experts); e += 32) {
      const uint32_t key = keys[e];
      largest = ::max(largest, key);
      num_keys += key != 0;
      finite |= key != 0 && key < kInfinityKey;
    }
    if (!__any_sync(kFullWarp, finite)) {
      take_at_least(0xffffffffu);
      return false;
    }
    const uint32_t max_key = __reduce_max_sync(kFullWarp, largest);
    if (const uint32_t least = plain_threshold(rule, num_experts, max_key)) {
      take_at_least(least);
      return true;
    }
    num_keys = __reduce_add_sync(kFullWarp, num_keys);
    uint32_t count = rule.k;
    if (rule.rule == MOEFY_RULE_DYNAMIC_K) {
      const float max = key_score(max_key);
      uint32_t least = score_key(rule.threshold * max);
      if (rule.threshold == 0 || least == 0) least = 1;
      // The arg-max is in even where the threshold exceeds it, as for a negative maximum.
      count = max == 0 && rule.threshold != 0 ? 1 : ::max(count_at_least(least), 1u);
      if (count > 1 && count <= rule.max_experts) {
        take_at_least(least);
        return true;
      }
    } else if (rule.rule == MOEFY_RULE_CUMULATIVE_SHARE) {
      count = count_of_share(rule.threshold, num_keys);
    }
    take_largest(::min(::min(count, rule.max_experts), num_keys));
    return true;
  }
};

// Where the selection of a row goes; counts and status may be null.
struct SelectOutputs {
  uint32_t* mask;
  uint32_t* counts;
  uint32_t* status;
};

// Tells how many were selected for a token, and whether none could be.
__device__ __forceinline__ void report(const SelectOutputs& outputs, const RowSelection& row, uint32_t token,
                                       bool has_score, bool valid) {
  if (outputs.counts != nullptr) {
    __syncwarp();
    uint32_t count = 0;
    for (uint32_t w = lane_id(); w < (row.num_experts + 31) / 32; w += 32) count += __popc(row.mask[w]);
    count = __reduce_add_sync(kFullWarp, count);
    if (lane_id() == 0) outputs.counts[token] = count;
  }
  if (!has_score && valid && outputs.status != nullptr && lane_id() == 0) {
    atomicOr(outputs.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
  }
}

// Selects for one token from its row of scores. A row that is not valid is not read and selects nothing. `memory` holds
// round_up_32(num_experts) words, and where the rule is CUMULATIVE_SHARE as many again as the next power of two.
__device__ __forceinline__ void select_row(const float* row, uint32_t token, bool valid, uint32_t num_experts,
                                           const moefy_selection& rule, const SelectOutputs& outputs,
                                           uint32_t* memory) {
#pragma unroll 4
  for (uint32_t e = lane_id(); e < round_up_32(num_experts); e += 32) {
    memory[e] = valid && e < num_experts ? score_key(row[e]) : 0;
  }
  __syncwarp();
  uint32_t* mask = outputs.mask + static_cast<uint64_t>(token) * ((num_experts + 31) / 32);
  const RowSelection selection{memory, memory + round_up_32(num_experts), num_experts, mask};
  report(outputs, selection, token, selection.run(rule), valid);
}

}  // namespace moefy
