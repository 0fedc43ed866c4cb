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
#define MOEFY_STATUS_MASK_BEYOND_EXPERTS 2u /* ignored */
#define MOEFY_STATUS_TOO_MANY_PAIRS 4u      /* the lists end where token_ids does */

#define MOEFY_MAX_EXPERTS 4096u

/* moefy_route_index_direct: blocks of 32 tokens of a warp; words of a token's mask, at most. */
#define MOEFY_ROUTE_INDEX_WARP_BLOCKS 8u
#define MOEFY_ROUTE_INDEX_DIRECT_WORDS 16u

/* moefy_experts_one: rows that are under way in a block. */
#define MOEFY_EXPERTS_ONE_ROWS 24u

/* Columns of y whose pair outputs are in memory together: a multiple of it, unless they are all. */
#define MOEFY_EXPERTS_MANY_SLAB 256u

/* Columns that a warp of moefy_experts_many_sum takes at once. */
#define MOEFY_EXPERTS_MANY_SUM_COLUMNS 256u

/* moefy_experts_many_resident_hidden: the most slots for 64 token rows by 128 of d_model, and the most of those that a row
 * can have. */
#define MOEFY_EXPERTS_RESIDENT_SLOTS 6u
#define MOEFY_EXPERTS_RESIDENT_MAX_STAGES 16u

/* moefy_experts_many_sums: threads and columns of a block, slots for h and for weights, and those where there is room for more. */
#define MOEFY_EXPERTS_SUMS_THREADS 640u
#define MOEFY_EXPERTS_SUMS_COLUMNS 64u
#define MOEFY_EXPERTS_SUMS_HIDDEN_SLOTS 6u
#define MOEFY_EXPERTS_SUMS_WEIGHT_SLOTS 4u
#define MOEFY_EXPERTS_SUMS_MORE_HIDDEN_SLOTS 8u
#define MOEFY_EXPERTS_SUMS_MORE_WEIGHT_SLOTS 6u

/* ffn_few: experts and stages at most, tokens of a tile, threads of a block, outputs of a block of the first launch. */
#define MOEFY_FFN_FEW_EXPERTS 512u
#define MOEFY_FFN_FEW_STAGES 8u
#define MOEFY_FFN_FEW_TILE 8u
#define MOEFY_FFN_FEW_THREADS 256u
#define MOEFY_FFN_FEW_ROUTER_ROWS 8u

/* moefy_ffn_few_whole: stages of 16 neurons of a block at most. */
#define MOEFY_FFN_FEW_WHOLE_STAGES 4u

/* moefy_route_index_transpose: token blocks of 32 per chunk and round, and chunks * words of experts at most. */
#define MOEFY_ROUTE_INDEX_CHUNK 8u
#define MOEFY_ROUTE_INDEX_BLOCKS 128u

/* Blocks of a cluster of Hopper's moefy_router_select and moefy_ffn_few_cluster. */
#define MOEFY_ROUTER_SELECT_BLOCKS 16u
/* moefy_ffn_few_cluster: steps of 32 columns of d_model that a warp can own. */
#define MOEFY_FFN_FEW_CLUSTER_STEPS 4u

/* Tiles of tokens: tokens of a tile, tokens that are sorted by one block, most tokens. */
#define MOEFY_TILE_TOKENS 128u
#define MOEFY_TILE_CHUNK 256u
#define MOEFY_TILE_MAX_TOKENS 8192u

/* Tokens and outputs of a block of moefy_router_layer. */
#define MOEFY_ROUTER_TILE 64u

/* moefy_router_block: threads of a block; outputs of the first layer and stages of inputs at most. */
#define MOEFY_ROUTER_BLOCK_THREADS 384u
#define MOEFY_ROUTER_BLOCK_OUTPUTS 128u
#define MOEFY_ROUTER_BLOCK_STAGES 8u

/* moefy_router_many: tokens of a cluster; threads of a block; stages of inputs; pieces of the second layer that each of two
 * warpgroups has, at most. */
#define MOEFY_ROUTER_MANY_TOKENS 64u
#define MOEFY_ROUTER_MANY_THREADS 384u
#define MOEFY_ROUTER_MANY_STAGES 8u
#define MOEFY_ROUTER_MANY_PIECES 4u

/* Threads of a block of moefy_dense_activate, and of moefy_dense_mask. */
#define MOEFY_ACTIVATE_THREADS 128u

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
  uint32_t words_per_warp; /* of shared memory */
  uint32_t reserved;
} moefy_select_params;

typedef enum moefy_router_kind {
  MOEFY_ROUTER_LINEAR = 0,      /* |W1 x| */
  MOEFY_ROUTER_D2DMOE = 1,      /* |W2 relu(W1 x)| */
  MOEFY_ROUTER_MOEFICATION = 2, /* sigmoid(W2 tanh(W1 x/|x|)) */
  MOEFY_ROUTER_CENTROID = 3     /* max(0, W1 x * w1_scale / |x|) */
} moefy_router_kind;

/* Tokens -> scores -> masks, for few tokens: what the first layer of the router gives, then the rest. */
typedef struct moefy_router_select_params {
  MOEFY_PTR(const void) x;                    /* [num_tokens, x_stride] */
  MOEFY_PTR(const void) w1;                   /* [hidden, d_model]; [num_experts, d_model] where there is no w2 */
  MOEFY_PTR(const void) w2;                   /* [num_experts, hidden] or null */
  MOEFY_PTR(const float) w1_scale;            /* [num_experts] of CENTROID, else null */
  MOEFY_PTR(float) first;                     /* [num_tokens, hidden]; [num_tokens, num_experts] where there is no w2 */
  MOEFY_PTR(float) scores;                    /* [num_tokens, num_experts] or null */
  MOEFY_PTR(const float) imposed;             /* [num_tokens, num_experts] or null: selected by instead of the scores */
  MOEFY_PTR(uint32_t) mask;                   /* [num_tokens, ceil(num_experts/32)] or null */
  MOEFY_PTR(uint32_t) counts;                 /* [num_tokens] or null */
  MOEFY_PTR(uint32_t) status;                 /* [1] or null */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  uint64_t x_stride;                          /* in elements */
  moefy_selection selection;
  moefy_router_kind kind;
  uint32_t d_model;
  uint32_t hidden; /* 0 where there is no w2 */
  uint32_t num_experts;
  uint32_t num_tokens;
  uint32_t w2_in_shared; /* 1: there is room for w2 in shared memory */
} moefy_router_select_params;

typedef enum moefy_router_activation {
  MOEFY_ROUTER_ACTIVATION_ABS = 0,
  MOEFY_ROUTER_ACTIVATION_RELU = 1,
  MOEFY_ROUTER_ACTIVATION_TANH = 2,
  MOEFY_ROUTER_ACTIVATION_SIGMOID = 3
} moefy_router_activation;

/* One layer of a router for many tokens: out = activation(in W^T * w_scale / |in|). */
typedef struct moefy_router_layer_params {
  MOEFY_PTR(const void) in;                   /* [num_tokens, in_stride] */
  MOEFY_PTR(const void) w;                    /* [out_width, in_width] */
  MOEFY_PTR(const float) w_scale;             /* [out_width] or null: 1 */
  MOEFY_PTR(float) out;                       /* [num_tokens, out_width] */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  uint64_t in_stride;                         /* in elements */
  moefy_router_activation activation;
  uint32_t unit_norm; /* 1: divide by |in|, 0: do not */
  uint32_t num_tokens;
  uint32_t in_width;
  uint32_t out_width;
  uint32_t reserved;
} moefy_router_layer_params;

/* What the driver makes of a matrix for the copy engine. */
typedef struct __attribute__((aligned(64))) moefy_tensor_map {
  uint64_t opaque[16];
} moefy_tensor_map;

/* Tokens -> scores -> masks in one launch, for many tokens. A cluster of `num_blocks` blocks takes 64 tokens and shares
 * d_model. Of `router`, `first` is not written. A box is 64 columns: of x all tokens of a cluster, of w1 all
 * outputs, or 256, of w2 64 experts. */
typedef struct moefy_router_many_params {
  moefy_tensor_map x;
  moefy_tensor_map w1;
  moefy_tensor_map w2; /* of w1 where there is no second layer */
  moefy_router_select_params router;
  uint32_t num_blocks;
  uint32_t num_stages;
  uint32_t num_pieces;    /* of w2 that each of two warpgroups has in shared memory */
  uint32_t parts_offset;  /* in shared memory: parts of the hidden units, later what selection sorts */
  uint32_t pieces_offset; /* there: pieces of w2 */
  uint32_t rows_offset;   /* there: scores of the second layer; 0: where the sums of the first one were */
  uint32_t reserved[8];   /* to a multiple of the alignment */
} moefy_router_many_params;

/* The same of two layers, for a block's tokens at a time, as many as the kernel's name says. A box is 64 columns: of x those
 * tokens, of w1 all outputs, of w2 64 experts. */
typedef struct moefy_router_block_params {
  moefy_tensor_map x;
  moefy_tensor_map w1;
  moefy_tensor_map w2;
  moefy_router_select_params router;
  uint32_t num_stages;
  uint32_t w2_offset;    /* in shared memory, after the stages: all of w2, in pieces of 64 experts by 64 hidden units */
  uint32_t parts_offset; /* there: parts of the hidden units */
  uint32_t rows_offset;  /* there: scores */
  uint32_t reserved[10]; /* to a multiple of the alignment */
} moefy_router_block_params;

/* Masks -> lists. */
typedef struct moefy_route_index_params {
  MOEFY_PTR(const uint32_t) mask;             /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(uint32_t) counts;                 /* [num_experts]: tokens of each expert */
  MOEFY_PTR(uint32_t) offsets;                /* [num_experts + 1] into token_ids */
  MOEFY_PTR(uint32_t) token_ids;              /* [capacity]: ascending within an expert */
  MOEFY_PTR(uint32_t) expert_masks;           /* [num_experts, ceil(num_tokens/32)]: the transpose of mask */
  MOEFY_PTR(uint32_t) word_offsets;           /* the same: where the tokens of each such word begin in token_ids */
  MOEFY_PTR(uint32_t) union_ids;              /* [num_experts]: experts with a token, ascending */
  MOEFY_PTR(uint32_t) num_union;              /* [1] */
  MOEFY_PTR(uint32_t) status;                 /* [1] or null */
  MOEFY_PTR(uint32_t) chunk_counts;           /* [num_chunks, num_experts]; moefy_route_index_direct does not read it */
  uint64_t capacity;
  uint32_t num_chunks;
  uint32_t num_tokens;
  uint32_t num_experts;
  uint32_t reserved;
} moefy_route_index_params;

typedef enum moefy_activation {
  MOEFY_RELU = 0,
  MOEFY_GELU = 1,
  MOEFY_GELU_TANH = 2,
  MOEFY_SILU = 3,
  MOEFY_IDENTITY = 4
} moefy_activation;

/* The neurons of one layer in expert order: num_experts * expert_width routed ones, then `shared` ones that every
 * token runs (together d_ff), then `rank` linear ones, which stand for a compensation U (V x): their input rows come
 * after all others in w_in, their output rows after all others in w_out. */
typedef struct moefy_neurons {
  MOEFY_PTR(const void) w_in;   /* [G * d_ff + rank, d_model], G = 2 for a GLU: gate rows, then up rows */
  MOEFY_PTR(const void) w_out;  /* [d_ff + rank, d_model] */
  MOEFY_PTR(const float) b_in;  /* [G * d_ff] or null */
  MOEFY_PTR(const float) b_out; /* [d_model] or null: b2 with the constants of a compensation */
  MOEFY_PTR(const float) mean;  /* [d_ff] or null: subtracted from every activation */
  uint64_t d_model;             /* a multiple of 8 */
  uint32_t d_ff;
  uint32_t num_experts;
  uint32_t expert_width;
  uint32_t shared;
  uint32_t rank;
  uint32_t glu; /* 0 or 1 */
  moefy_activation activation;
  uint32_t reserved;
} moefy_neurons;

/* y[t] = b2 + shared(x[t]) + sum over the selected experts e of gate[t, e] * expert_e(x[t]). */
typedef struct moefy_experts_params {
  moefy_neurons neurons;
  MOEFY_PTR(const void) x;                    /* [num_tokens, d_model] */
  MOEFY_PTR(void) y;                          /* [num_tokens, d_model] */
  MOEFY_PTR(const uint32_t) mask;             /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(const float) gates;               /* [num_tokens, num_experts] or null: all 1 */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(const uint32_t) expert_offsets;   /* many tokens: [num_experts + 1] */
  MOEFY_PTR(const uint32_t) token_ids;        /* many tokens: of each expert, ascending */
  MOEFY_PTR(const uint32_t) word_offsets;     /* many tokens: [num_experts, ceil(num_tokens/32)], where those of each 32 begin */
  /* Few tokens: [padded tokens, hidden_stride], one column for each executed neuron.
   * Many tokens: one row for each (expert, token) pair, expert by expert, of padded width hidden_stride; at
   * hidden_shared the rows of all tokens for the shared neurons, at hidden_linear those for the linear ones, each as
   * wide as its neurons, rounded up to 8. */
  MOEFY_PTR(void) hidden;
  uint64_t hidden_stride;
  uint64_t hidden_shared;
  uint64_t hidden_linear;
  MOEFY_PTR(float) partials; /* few tokens: [num_splits, num_tokens, d_model] */
  /* Many tokens, pair by pair: outputs of a slab of columns: one row for each pair, then one for each token for the shared
   * neurons if there are any, then those for the linear ones. As many columns as the rows that there are leave room for. */
  MOEFY_PTR(void) rows;
  uint64_t rows_bytes; /* where outputs are kept: room for MOEFY_EXPERTS_MANY_SLAB columns of every row that can be, at least */
  MOEFY_PTR(uint32_t) pair_rows; /* many tokens: [num_tokens, num_experts], the row of each pair that exists */
  uint32_t num_tokens;
  uint32_t max_pairs;  /* many tokens: entries of token_ids */
  uint32_t num_splits; /* few tokens: shares of the neurons */
  uint32_t slab;       /* many tokens: which */
  /* From so many pairs on, the second product, or both of all experts, go by tiles of tokens. */
  uint32_t min_token_pairs;
  uint32_t fused; /* many tokens: 1 where moefy_experts_many_fused does both products of those fewer */
} moefy_experts_params;

/* Products for many tokens where the copy engine brings the weights, as an array of four dimensions. First product, of w_in:
 * d_model; 8 neurons that follow each other; gate and up rows of a GLU; groups of 8 neurons. A box is a block's rows by 64 of
 * d_model. Second product, of w_out: d_model; neurons; 1; 1. A box is 64 neurons by 64 of d_model. */
typedef struct moefy_experts_engine_params {
  moefy_tensor_map weights;
  moefy_experts_params experts;
  uint64_t reserved[3]; /* to a multiple of the alignment */
} moefy_experts_engine_params;

/* Both products of narrow experts in one launch. Each of w_in and w_out is an array of d_model; neurons; 1; 1. A box is as
 * many neurons as the kernel's name says by 64 of d_model. */
typedef struct moefy_experts_fused_params {
  moefy_tensor_map w_in;
  moefy_tensor_map w_out;
  moefy_experts_params experts;
  uint64_t reserved[3]; /* to a multiple of the alignment */
} moefy_experts_fused_params;

/* The second product for many tokens, summed where it is multiplied. `hidden` is h of the pairs, hidden_stride by pairs; the
 * other two that of all tokens, if there are such neurons; a box is 64 columns by 64 rows, as of w_out, d_model by neurons. Of
 * pairs there are maps for boxes of 8 rows, 16 and so on. Nothing is done where min_token_pairs exist. */
typedef struct moefy_experts_sums_params {
  moefy_tensor_map hidden[8];
  moefy_tensor_map hidden_shared;
  moefy_tensor_map hidden_linear;
  moefy_tensor_map w_out;
  moefy_experts_params experts;
  uint32_t block_tokens; /* tokens of a block */
  uint32_t num_across;   /* blocks that share the columns of these tokens */
  uint64_t reserved[2];  /* to a multiple of the alignment */
} moefy_experts_sums_params;

/* Products of all experts under masks. First product: `rows` is x, d_model by tokens, and `weights` w_in, d_model by neurons; a
 * box is 64 by 128. Second product: `rows` is h, d_ff by tokens, and `weights` w_out, d_model by neurons, of which a box is 64 by
 * 64. Where there are lists, nothing is done unless min_token_pairs exist. */
typedef struct moefy_experts_masked_params {
  moefy_tensor_map rows;
  moefy_tensor_map weights;
  moefy_experts_params experts;
  uint64_t reserved[3]; /* to a multiple of the alignment */
} moefy_experts_masked_params;

/* Masks -> tiles of tokens whose masks are alike: the tokens in the order of their rarest experts, and of each tile what
 * its tokens select. */
typedef struct moefy_token_tiles_params {
  MOEFY_PTR(const uint32_t) mask;             /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(const uint32_t) chunk_counts;     /* [num_chunks, num_experts] of moefy_route_index_transpose */
  MOEFY_PTR(uint32_t) sorted;       /* [ceil(num_tokens/MOEFY_TILE_CHUNK), MOEFY_TILE_CHUNK]: keys, ascending in each */
  MOEFY_PTR(uint32_t) token_ids;    /* [num_tokens]: in their order; padding comes last */
  MOEFY_PTR(uint32_t) tile_counts;  /* [num_tiles]: experts that any token of the tile selects */
  MOEFY_PTR(uint32_t) tile_expert_ids; /* [num_tiles, num_experts]: those, ascending */
  MOEFY_PTR(uint32_t) tile_masks;   /* [num_tiles, num_experts, MOEFY_TILE_TOKENS/32]: of each of those its tokens */
  uint32_t num_chunks;
  uint32_t num_tokens;
  uint32_t num_experts; /* fewer than MOEFY_MAX_EXPERTS */
  uint32_t reserved;
} moefy_token_tiles_params;

/* The experts of a layer, tile by tile: every tile runs the union of its tokens' experts. */
typedef struct moefy_experts_tiled_params {
  moefy_neurons neurons;
  MOEFY_PTR(const void) x;                    /* [num_tokens, d_model] */
  MOEFY_PTR(void) y;                          /* [num_tokens, d_model] */
  MOEFY_PTR(const float) gates;               /* [num_tokens, num_experts] or null: all 1 */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(const uint32_t) token_ids;        /* these four: of moefy_token_tiles_params */
  MOEFY_PTR(const uint32_t) tile_counts;
  MOEFY_PTR(const uint32_t) tile_expert_ids;
  MOEFY_PTR(const uint32_t) tile_masks;
  /* [num_tiles * MOEFY_TILE_TOKENS, hidden_stride], in the order of token_ids: what a tile runs comes first, its experts in
   * their order, then the shared neurons, then the linear ones; zeros up to the next multiple of 64. */
  MOEFY_PTR(void) hidden;
  uint64_t hidden_stride; /* a multiple of 64 */
  uint32_t num_tokens;
  float inverse_width; /* 1 / expert_width */
} moefy_experts_tiled_params;

/* The same where the copy engine brings the weights, as arrays of four dimensions. First product, of w_in: as of
 * moefy_experts_engine_params, a box is box_neurons of them by 64 of d_model. Second product, of w_out: d_model; neurons; 1; 1,
 * and so is `hidden`: a box is a tile's rows by 64 neurons. */
typedef struct moefy_experts_tiled_engine_params {
  moefy_tensor_map weights;
  moefy_tensor_map hidden;
  moefy_experts_tiled_params experts;
  uint32_t box_neurons; /* a divisor of expert_width and of 64, a multiple of 8 */
  uint32_t reserved[5]; /* to a multiple of the alignment */
} moefy_experts_tiled_engine_params;

/* Partial outputs -> y: b_out and all shares, or zeros for a token at or beyond num_valid_tokens. */
typedef struct moefy_add_shares_params {
  MOEFY_PTR(const float) shares;              /* [num_shares, num_tokens, d_model] */
  MOEFY_PTR(const float) b_out;               /* [d_model] or null */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(void) y;                          /* [num_tokens, d_model] */
  uint64_t d_model;
  uint32_t num_shares;
  uint32_t num_tokens;
} moefy_add_shares_params;

typedef enum moefy_gate {
  MOEFY_GATE_ONE = 0,
  MOEFY_GATE_SCORE = 1,
  MOEFY_GATE_SOFTMAX = 2,
  MOEFY_GATE_RENORMALISED = 3
} moefy_gate;

/* A whole layer for few tokens. Of `router`, counts and scores are not written. Where clusters route, `first` and w2 below are
 * not used. Elsewhere router.w2 is not read; with a second layer, `first` is bf16 [num_tokens, 3, hidden]: three numbers
 * whose sum is the f32 that the first layer gave. Its rows are as far apart as in shared memory, see in_row_stride. */
typedef struct moefy_ffn_few_params {
  moefy_neurons neurons;
  moefy_router_select_params router;
  MOEFY_PTR(const void) w2;      /* bf16 [num_w2, num_experts, hidden], whose sum is w2, or null */
  MOEFY_PTR(void) y;             /* [num_tokens, d_model] */
  MOEFY_PTR(float) partials;     /* [num_blocks, num_tokens, d_model] */
  moefy_gate gate;
  uint32_t num_w2;
  uint32_t num_stages; /* of the ring of rows in shared memory */
  float inverse_width;     /* 1 / expert_width */
  float inverse_blocks;    /* 1 / the blocks that share the neurons */
  uint32_t log_stage_neurons; /* of base two; a stage has at most what the kernel multiplies at once */
  /* moefy_ffn_few_whole: neurons of a block at most; what routing needs in shared memory beside their rows. */
  uint32_t block_neurons;
  uint32_t routing_bytes;
} moefy_ffn_few_params;

/* Scores -> gates of moefy_experts_params. */
typedef struct moefy_gates_params {
  MOEFY_PTR(const float) scores;  /* [num_tokens, num_experts] */
  MOEFY_PTR(const uint32_t) mask; /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(float) gates;         /* [num_tokens, num_experts] */
  uint32_t num_tokens;
  uint32_t num_experts;
  uint32_t renormalise; /* divide by the sum over the selected experts instead of all */
  uint32_t reserved;
} moefy_gates_params;

/* y[t] = words[token_ids[t]] + positions[position_ids[t]] + token_type. */
typedef struct moefy_embed_tokens_params {
  MOEFY_PTR(const uint32_t) token_ids;    /* [num_tokens] */
  MOEFY_PTR(const uint32_t) position_ids; /* [num_tokens] or null */
  MOEFY_PTR(const void) words;            /* [vocab, d_model] */
  MOEFY_PTR(const void) positions;        /* [max_positions, d_model] or null */
  MOEFY_PTR(const void) token_type;       /* [d_model] or null */
  MOEFY_PTR(void) y;                      /* [num_tokens, d_model] */
  uint32_t num_tokens;
  uint32_t d_model; /* a multiple of 8 */
} moefy_embed_tokens_params;

/* residual = x + branch; x = norm(residual), by mean and variance or by the mean square alone, * weight + bias. */
typedef struct moefy_norm_params {
  MOEFY_PTR(void) x;            /* [num_tokens, d_model] */
  MOEFY_PTR(const void) branch; /* [num_tokens, d_model] or null */
  MOEFY_PTR(void) residual;     /* [num_tokens, d_model] or null */
  MOEFY_PTR(const void) weight; /* [d_model] */
  MOEFY_PTR(const void) bias;   /* [d_model] or null */
  uint32_t num_tokens;
  uint32_t d_model; /* a multiple of 8, at most 8192 */
  float epsilon;
  uint32_t is_rms;
} moefy_norm_params;

/* softmax(scale Q K^T) V within each sequence. A key and value head serves num_heads / num_kv_heads heads. */
typedef struct moefy_attention_params {
  MOEFY_PTR(const void) q; /* [num_tokens, num_heads, d_head], tokens `stride` elements apart */
  MOEFY_PTR(const void) k; /* [num_tokens, num_kv_heads, d_head], the same stride */
  MOEFY_PTR(const void) v;
  MOEFY_PTR(void) y;                          /* [num_tokens, num_heads, d_head] */
  MOEFY_PTR(const uint32_t) sequence_offsets; /* [num_sequences + 1] */
  uint64_t stride;                            /* a multiple of 8 */
  uint32_t num_heads;
  uint32_t num_kv_heads;
  float scale;
  uint32_t is_causal;
} moefy_attention_params;

/* Elements i and i + d_head/2 of every head turn by position * base^(-2 i / d_head). */
typedef struct moefy_rotary_params {
  MOEFY_PTR(void) x;                      /* [num_tokens, num_heads, d_head], tokens `stride` elements apart */
  MOEFY_PTR(const uint32_t) position_ids; /* [num_tokens] */
  uint64_t stride;
  double log2_base;
  uint32_t num_tokens;
  uint32_t num_heads;
  uint32_t d_head;
  uint32_t reserved;
} moefy_rotary_params;

/* y[s] = the mean of the sequence's rows of x, scaled to unit length. */
typedef struct moefy_pool_params {
  MOEFY_PTR(const void) x;                    /* [num_tokens, d_model] */
  MOEFY_PTR(const uint32_t) sequence_offsets; /* [num_sequences + 1] */
  MOEFY_PTR(void) y;                          /* [num_sequences, d_model] */
  uint32_t num_sequences;
  uint32_t d_model; /* a multiple of 8 */
} moefy_pool_params;

/* Dense products: pre-activations -> h. moefy_dense_mask has h already, and reads neither pre nor gates. */
typedef struct moefy_activate_params {
  moefy_neurons neurons;
  MOEFY_PTR(const void) pre;      /* [num_tokens, G * d_ff + rank] */
  MOEFY_PTR(void) hidden;         /* [num_tokens, d_ff + rank] */
  MOEFY_PTR(const uint32_t) mask; /* [num_tokens, ceil(num_experts/32)] or null: all experts */
  MOEFY_PTR(const float) gates;   /* [num_tokens, num_experts] or null: all 1 */
  uint32_t num_tokens;
  uint32_t element_bytes; /* of h */
} moefy_activate_params;

/* Writes zeros to the rows of y at and beyond num_valid_tokens. */
typedef struct moefy_clear_invalid_params {
  MOEFY_PTR(void) y; /* [num_tokens, row_bytes] */
  MOEFY_PTR(const uint32_t) num_valid_tokens;
  uint64_t row_bytes; /* a multiple of 16 */
  uint64_t num_tokens;
} moefy_clear_invalid_params;

/* How many of num_valid_tokens each chunk of a batch gets. */
typedef struct moefy_split_valid_params {
  MOEFY_PTR(const uint32_t) num_valid_tokens;
  MOEFY_PTR(uint32_t) of_chunk; /* [num_chunks] */
  uint32_t chunk_tokens;
  uint32_t num_chunks;
} moefy_split_valid_params;

/* Adds up what selection did. */
typedef struct moefy_statistics_params {
  MOEFY_PTR(const uint32_t) mask;             /* [num_tokens, ceil(num_experts/32)] */
  MOEFY_PTR(const uint32_t) num_valid_tokens; /* [1] or null: all are valid */
  MOEFY_PTR(uint64_t) k_histogram;            /* [num_experts + 1] */
  MOEFY_PTR(uint64_t) expert_counts;          /* [num_experts] */
  uint32_t num_tokens;
  uint32_t num_experts;
} moefy_statistics_params;

/* Reads `data` once. */
typedef struct moefy_read_bandwidth_params {
  MOEFY_PTR(const void) data; /* a multiple of 16 bytes */
  MOEFY_PTR(uint32_t) folded; /* [threads of the grid]: exclusive or of what each thread read */
  uint64_t data_bytes;
} moefy_read_bandwidth_params;

#endif
