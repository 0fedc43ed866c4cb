// Selection: which experts run, given the f32 scores of one token. Exact: the bits are those of the reference.
#pragma once

#include "moefy_abi.h"
#include "team.cuh"

namespace moefy {

// A warp holds the scores of this many words of experts, one expert per lane: expert e of the row is bit e % 32 of
// word e / 32, so a ballot over one register is a word of the mask.
constexpr int kWordsPerWarp = 16;

// Scores as integers of the same order. 0: never selected (NaN and -inf).
constexpr uint32_t kInfinityKey = 0xff800000u;

__device__ __forceinline__ uint32_t score_key(float score) {
  if (!(score > -__int_as_float(0x7f800000))) return 0;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float key_score(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The first `count` set bits of a word, ascending.
__device__ __forceinline__ uint32_t lowest_bits(uint32_t word, uint32_t count) {
  const uint32_t before = __popc(word & ((1u << lane_id()) - 1));
  return __ballot_sync(kFullWarp, (word >> lane_id() & 1) != 0 && before < count);
}

template <class Team>
struct RowSelection {
  Team team;
  const uint32_t (&keys)[kWordsPerWarp];  // 0 beyond the last expert
  uint32_t num_experts;

  // Words of this warp that hold experts; the same for all its lanes.
  __device__ __forceinline__ bool has_word(int j) const {
    return (team.warp() * kWordsPerWarp + j) * 32 < num_experts;
  }

  __device__ __forceinline__ uint32_t count_at_least(uint32_t key) const {
    uint32_t count = 0;
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) count += keys[j] >= key;
    return team.sum(count);
  }

  // All experts whose key is at least `key` > 0.
  __device__ __forceinline__ void take_at_least(uint32_t key, uint32_t (&mask)[kWordsPerWarp]) const {
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      mask[j] = has_word(j) ? __ballot_sync(kFullWarp, keys[j] >= key) : 0;
    }
  }

  // The `count` largest keys, 1 <= count <= number of keys > 0; of equal ones the lower expert ids.
  __device__ __forceinline__ void take_largest(uint32_t count, uint32_t (&mask)[kWordsPerWarp]) const {
    // The count-th largest key, bit by bit: the largest key that at least `count` keys reach.
    uint32_t key = 0;
#pragma unroll 1
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      const uint32_t reached = count_at_least(key | bit);
      if (reached == count) return take_at_least(key | bit, mask);
      if (reached > count) key |= bit;
    }
    uint32_t larger = 0, equal = 0;
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      larger += keys[j] > key;
      equal += has_word(j) ? __popc(__ballot_sync(kFullWarp, keys[j] == key)) : 0;
    }
    const uint32_t wanted = count - team.sum(larger);
    const uint32_t before = team.sum_of_warps_before(equal);
    uint32_t left = wanted > before ? wanted - before : 0;
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      mask[j] = 0;
      if (!has_word(j)) continue;
      const uint32_t ties = lowest_bits(__ballot_sync(kFullWarp, keys[j] == key), left);
      left -= __popc(ties);
      mask[j] = __ballot_sync(kFullWarp, keys[j] > key) | ties;
    }
  }

  // Size of the smallest prefix in descending order whose sum reaches `share` of the row's sum. Both sums are taken one
  // by one in that order. `scratch` holds the next power of two of num_experts words.
  __device__ __forceinline__ uint32_t count_of_share(float share, uint32_t num_keys, uint32_t* scratch) const {
    const uint32_t size = num_experts <= 1 ? 1 : 1u << (32 - __clz(num_experts - 1));
    for (uint32_t i = team.thread(); i < size; i += Team::kThreads) scratch[i] = 0;
    team.sync();
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      const uint32_t expert = (team.warp() * kWordsPerWarp + j) * 32 + lane_id();
      if (expert < num_experts) scratch[expert] = keys[j];
    }
    team.sync();
    sort_descending(scratch, size);
    // Every thread adds all of them: each needs the count, and no one would gain from waiting.
    float total = 0;
    for (uint32_t i = 0; i < num_keys; ++i) total += key_score(scratch[i]);
    const float target = share * total;
    float sum = 0;
    for (uint32_t i = 0; i < num_keys; ++i) {
      sum += key_score(scratch[i]);
      if (sum >= target) return i + 1;
    }
    return num_keys;
  }

  // Bitonic; the values alone matter, since equal keys are equal scores.
  __device__ __forceinline__ void sort_descending(uint32_t* values, uint32_t size) const {
#pragma unroll 1
    for (uint32_t run = 2; run <= size; run *= 2) {
#pragma unroll 1
      for (uint32_t step = run / 2; step > 0; step /= 2) {
        for (uint32_t i = team.thread(); i < size / 2; i += Team::kThreads) {
          const uint32_t low = i / step * 2 * step + i % step;
          const uint32_t a = values[low], b = values[low + step];
          const bool descending = (low & run) == 0;
          if (descending ? a < b : a > b) {
            values[low] = b;
            values[low + step] = a;
          }
        }
        team.sync();
      }
    }
  }

  // Fills the words of this warp. Returns false when no score is finite; then nothing is selected.
  __device__ __forceinline__ bool run(const moefy_selection& rule, uint32_t* scratch,
                                      uint32_t (&mask)[kWordsPerWarp]) const {
    uint32_t largest = 0, finite = 0;
#pragma unroll
    for (int j = 0; j < kWordsPerWarp; ++j) {
      mask[j] = 0;
      largest = ::max(largest, keys[j]);
      finite |= keys[j] != 0 && keys[j] < kInfinityKey;
    }
    if (team.max(finite) == 0) return false;
    const uint32_t num_keys = count_at_least(1);
    uint32_t count = rule.k;
    if (rule.rule == MOEFY_RULE_DYNAMIC_K) {
      const float max = key_score(team.max(largest));
      uint32_t least = score_key(rule.threshold * max);
      if (rule.threshold == 0 || least == 0) least = 1;
      // The arg-max is in even where the threshold exceeds it, as for a negative maximum.
      count = max == 0 && rule.threshold != 0 ? 1 : ::max(count_at_least(least), 1u);
      if (count > 1 && count <= rule.max_experts) {
        take_at_least(least, mask);
        return true;
      }
    } else if (rule.rule == MOEFY_RULE_CUMULATIVE_SHARE) {
      count = count_of_share(rule.threshold, num_keys, scratch);
    }
    take_largest(::min(::min(count, rule.max_experts), num_keys), mask);
    return true;
  }
};

// Where the selection of a row goes; counts and status may be null.
struct SelectOutputs {
  uint32_t* mask;
  uint32_t* counts;
  uint32_t* status;
};

// Selects for one token from its row of scores. A row that is not valid is not read and selects nothing. `scratch`
// holds the next power of two of num_experts words where the rule is CUMULATIVE_SHARE.
template <class Team>
__device__ __forceinline__ void select_row(const Team& team, const float* row, uint32_t token, bool valid,
                                           uint32_t num_experts, const moefy_selection& rule,
                                           const SelectOutputs& outputs, uint32_t* scratch) {
  const uint32_t row_words = (num_experts + 31) / 32;
  const uint32_t first_word = team.warp() * kWordsPerWarp;
  uint32_t keys[kWordsPerWarp];
#pragma unroll
  for (int j = 0; j < kWordsPerWarp; ++j) {
    const uint32_t expert = (first_word + j) * 32 + lane_id();
    keys[j] = valid && expert < num_experts ? score_key(row[expert]) : 0;
  }
  uint32_t mask[kWordsPerWarp];
  const bool selected = RowSelection<Team>{team, keys, num_experts}.run(rule, scratch, mask);

  uint32_t word = 0;  // of this lane
#pragma unroll
  for (int j = 0; j < kWordsPerWarp; ++j) word = lane_id() == uint32_t(j) ? mask[j] : word;
  const uint32_t index = first_word + lane_id();
  if (lane_id() < kWordsPerWarp && index < row_words) outputs.mask[uint64_t(token) * row_words + index] = word;
  if (outputs.counts != nullptr) {
    const uint32_t count = team.sum(__popc(word));
    if (team.thread() == 0) outputs.counts[token] = count;
  }
  if (!selected && valid && outputs.status != nullptr && team.thread() == 0) {
    atomicOr(outputs.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
  }
}

}  // namespace moefy
