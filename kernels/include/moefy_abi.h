/* The one contract between host and device: every kernel takes one of these structs by value.
 *
 * Pure C. src/abi.rs is generated from this file, and a kernel reports the sizes and offsets that the device compiler
 * gave it (abi_probe.cu). No struct has padding: it would be bytes that nobody wrote.
 */
#ifndef MOEFY_ABI_H
#define MOEFY_ABI_H

#include <stdint.h>

/* A device address: a pointer on the device, 64 bits on the host. */
#ifdef __CUDACC__
#define MOEFY_PTR(type) type*
#else
#define MOEFY_PTR(type) uint64_t
#endif

/* Bits of the status word. Kernels only ever set them; the caller clears the word. */
#define MOEFY_STATUS_ROW_WITHOUT_SCORE 1u
#define MOEFY_STATUS_MASK_BEYOND_EXPERTS 2u

#define MOEFY_MAX_EXPERTS 4096u

typedef enum moefy_rule {
  MOEFY_RULE_TOP_K = 0,
  MOEFY_RULE_DYNAMIC_K = 1,
  MOEFY_RULE_CUMULATIVE_SHARE = 2
} moefy_rule;

typedef struct moefy_selection {
  moefy_rule rule;
  uint32_t k;           /* of TOP_K */
  float threshold;      /* rel_threshold of DYNAMIC_K, share of CUMULATIVE_SHARE */
  uint32_t max_experts; /* no cap: num_experts or more */
} moefy_selection;

/* What abi_probe.cu writes, in this order: sizeof, then offsetof of the last field, of each struct below. */
typedef struct moefy_abi_probe_params {
  MOEFY_PTR(uint32_t) words;
  uint64_t num_words;
} moefy_abi_probe_params;

/* Scores -> masks. */
typedef struct moefy_select_params {
  MOEFY_PTR(const float) scores;               /* [num_tokens, score_stride] */
  MOEFY_PTR(uint32_t) mask;                    /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(uint32_t) counts;                  /* [num_tokens] or null */
  MOEFY_PTR(uint32_t) status;                  /* [1] or null */
  MOEFY_PTR(const uint32_t) num_valid_tokens;  /* [1] or null: all are valid */
  uint64_t score_stride;                       /* in elements */
  moefy_selection selection;
  uint32_t num_tokens;
  uint32_t num_experts;
} moefy_select_params;

#endif
