// The op `experts` for many tokens, first product of narrow experts on Hopper: h of every (expert, token) pair.
//
// What limits narrow experts is what a multiprocessor takes in. So a block keeps an expert's rows of w_in while it has pairs of
// it, and takes nothing but token rows in. It has a stretch of all pairs, expert by expert, as long as every other block's, where
// the weights of an expert count as the rows that are as many bytes. One warpgroup copies, with rows gathered straight from x.
// The others take tiles of 64 tokens by turns, so that products of one run while another activates.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kTokens = 64;
/// Of d_model in one stage: two parts of 64. What a stage costs beside its copies is half of what two would (kernels/NOTES.md).
constexpr uint32_t kParts = 2, kDepth = 64 * kParts;
constexpr int kRowBytes = 128;
constexpr int kChunks = kRowBytes / kChunkBytes;
constexpr uint32_t kRowsPerPass = kCopiers / kChunks;
constexpr int kPasses = kTokens / kRowsPerPass;
constexpr uint32_t kPartBytes = kTokens * kRowBytes, kSlotBytes = kParts * kPartBytes;
constexpr uint32_t kGroups = 3;  // that multiply
constexpr uint32_t kThreads = kCopiers + kGroups * 128;

/// Of a tile.
__device__ __forceinline__ uint32_t stages_of(const moefy_neurons& n) { return ceil_div(n.d_model, kDepth); }

/// What tells when a slot of the ring is empty, and when a stage is there: stages of each warpgroup's tiles have barriers of their
/// own, since who waits for a phase of a barrier takes the last but one for it. A tile has as many stages as there are slots at
/// least: when a slot is empty again, this stage of the tile before has been multiplied, and its weights can be replaced.
class Ring {
 public:
  /// By all threads of a block.
  __device__ explicit Ring(uint32_t num_stages)
      : num_slots(min(MOEFY_EXPERTS_RESIDENT_SLOTS, num_stages)), num_full(kGroups * num_stages) {
    __shared__ uint64_t memory[MOEFY_EXPERTS_RESIDENT_SLOTS + kGroups * MOEFY_EXPERTS_RESIDENT_MAX_STAGES];
    barriers_ = shared_address(memory);
    const uint32_t i = threadIdx.x;
    if (i < num_slots) barrier_init(empty(i), 128 / 32);
    if (i < num_full) barrier_init(full(i), kCopiers + 1);
    fence_barriers();
    __syncthreads();
  }

  __device__ uint32_t empty(uint32_t slot) const { return barriers_ + slot * 8; }
  __device__ uint32_t full(uint32_t stage) const { return barriers_ + (MOEFY_EXPERTS_RESIDENT_SLOTS + stage) * 8; }

  const uint32_t num_slots, num_full;

 private:
  uint32_t barriers_;
};

/// Tokens of a group by kRows of its rows, from row0 on.
struct Tile {
  Group group;
  RowRange tokens;
  uint32_t row0;
  bool brings_weights;
};

/// A block's tiles, one after the other.
template <int kRows>
class Tiles {
 public:
  /// `offsets`: of the groups' lengths, exclusive sums.
  __device__ Tiles(const moefy_experts_params& p, const uint32_t* offsets) : p_(p), offsets_(offsets) {
    const uint64_t all = offsets[num_groups(p.neurons)];
    at_ = static_cast<uint32_t>(all * blockIdx.x / gridDim.x);
    end_ = static_cast<uint32_t>(all * (blockIdx.x + 1) / gridDim.x);
    left_ = {0, 0};
  }

  /// Rows of x that a group takes in, its weights among them, as often as there are kRows of its rows.
  __device__ static uint32_t length(const moefy_experts_params& p, const Group& group) {
    const uint32_t count = rows_of(p, group).count;
    return count == 0 ? 0 : (count + kRows) * ceil_div(group.width, kRows);
  }

  __device__ bool next(Tile& tile) {
    const bool begins = left_.count == 0;
    while (left_.count == 0) {
      if (at_ >= end_) return false;
      begin_part();
    }
    const uint32_t count = min(left_.count, share_);
    tile = {group_, {left_.begin, count}, row0_, begins};
    left_ = {left_.begin + count, left_.count - count};
    return true;
  }

 private:
  /// Goes to the next group, or to more rows of this one.
  __device__ void begin_part() {
    const uint32_t index = find_tile(offsets_, num_groups(p_.neurons), at_);
    group_ = find_group(p_, index);
    const RowRange rows = rows_of(p_, group_);
    const uint32_t length = rows.count + kRows, inside = at_ - offsets_[index], first = inside % length;
    const uint32_t last = min(first + (end_ - at_), length);
    row0_ = inside / length * kRows;
    at_ += last - first;
    // The weights come first.
    const auto row_at = [](uint32_t place) { return max(place, uint32_t(kRows)) - kRows; };
    left_ = {rows.begin + row_at(first), row_at(last) - row_at(first)};
    share_ = ceil_div(left_.count, max(ceil_div(left_.count, kTokens), 1u));
  }

  const moefy_experts_params& p_;
  const uint32_t* offsets_;
  uint32_t at_, end_;  // of all lengths
  Group group_;
  RowRange left_;
  uint32_t row0_, share_;
};

template <int kRows>
__device__ __forceinline__ void copy_tiles(const moefy_experts_params& p, const moefy_tensor_map& w_in,
                                           const uint32_t* offsets, uint32_t weights, uint32_t memory, const Ring& ring) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x, chunk = thread % kChunks, pass_row = thread / kChunks;
  const uint32_t num_stages = stages_of(n), row_chunks = n.d_model / 8;
  const uint4* const x = static_cast<const uint4*>(p.x);
  Tiles<kRows> tiles(p, offsets);
  // Where this thread's part of each row of a tile begins in x.
  const auto find_rows = [&](const Tile& tile, uint32_t (&rows)[kPasses]) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t row = min(pass_row + i * kRowsPerPass, tile.tokens.count - 1);
      rows[i] = token_of(p, tile.group, tile.tokens.begin + row) * row_chunks;
    }
  };
  uint32_t places[kPasses];  // in a slot
#pragma unroll
  for (int i = 0; i < kPasses; ++i) places[i] = swizzled<kRowBytes>(pass_row + i * kRowsPerPass, chunk);
  Tile tile, following;
  uint32_t rows[kPasses], following_rows[kPasses];
  bool exists = tiles.next(tile);
  if (exists) find_rows(tile, rows);
  uint32_t slot = 0, phase = 1, full_index = 0;  // at first the slots are empty
#pragma unroll 1
  while (exists) {
    exists = tiles.next(following);
    if (exists) find_rows(following, following_rows);
    const uint4* from[kPasses];
    bool is_row[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      from[i] = x + rows[i] + chunk;
      // What is beyond the tile's last row gives rows that are not stored.
      is_row[i] = pass_row + i * kRowsPerPass < tile.tokens.count;
    }
    const uint32_t group_of_8 = (tile.group.first_neuron + tile.row0) / 8;
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      barrier_wait(ring.empty(slot), phase);
      const uint32_t to = memory + slot * kSlotBytes, full = ring.full(full_index);
      if (thread == 0) {
        barrier_expect(full, tile.brings_weights ? kParts * kRows * kRowBytes : 0);
        if (tile.brings_weights) {
#pragma unroll
          for (uint32_t part = 0; part < kParts; ++part) {
            const uint32_t place = weights + (stage * kParts + part) * kRows * kRowBytes;
            copy_box(place, w_in, {stage * kDepth + part * 64, 0, 0, group_of_8}, full);
          }
        }
      }
      const uint32_t own = stage * kParts * kChunks + chunk;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
#pragma unroll
        for (uint32_t part = 0; part < kParts; ++part) {
          const bool is_inside = own + part * kChunks < row_chunks;
          if (is_row[i]) copy_async(to + part * kPartBytes + places[i], from[i] + part * kChunks, is_inside);
        }
        from[i] += kParts * kChunks;
      }
      copy_async_arrive(full);
      if (++full_index == ring.num_full) full_index = 0;
      if (++slot == ring.num_slots) {
        slot = 0;
        phase ^= 1;
      }
    }
    tile = following;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) rows[i] = following_rows[i];
  }
}

/// Stores h of a tile from its pre-activations, which are used up: this lane's of row `row` and of the one eight further.
///
/// A loop moves them down instead of going up: unrolled, it would wait for tens of kilobytes of instructions.
template <class T, int kRows, class Activation>
__device__ __forceinline__ void store_tile(const moefy_experts_params& p, const Tile& tile, uint32_t row,
                                           float (&pre)[kRows / 2], Activation) {
  const moefy_neurons& n = p.neurons;
  const uint32_t t = threadIdx.x % 4, width = tile.group.width - tile.row0;
  const float* const mean = n.mean == nullptr ? nullptr : n.mean + tile.group.first_neuron + tile.row0;
  T* to[2];
  float gates[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = tile.tokens.begin + row + 8 * half;
    to[half] = static_cast<T*>(p.hidden) + tile.group.hidden + own * tile.group.hidden_stride + tile.row0;
    const bool has_gate = p.gates != nullptr && tile.group.expert != kNoExpert && row + 8 * half < tile.tokens.count;
    gates[half] = has_gate ? gate_of(p.gates, n.num_experts, token_of(p, tile.group, own), tile.group.expert) : 1.0f;
  }
#pragma unroll 1
  for (uint32_t block = 0; block < kRows / 8; block += 4) {
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t at = (block + i) * 8 + 2 * t;
      const bool has_mean = mean != nullptr && at < width;
      const float means[2] = {has_mean ? mean[at] : 0.0f, has_mean ? mean[at + 1] : 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* own = pre + i * 4 + 2 * half;
        words[half][i] = pack_two<T>(gates[half] * (activate<T>(Activation::value, own[0]) - means[0]),
                                     gates[half] * (activate<T>(Activation::value, own[1]) - means[1]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 eight = transpose_quad(words[half]);
      const uint32_t at = (block + t) * 8;
      store_vector_if(at < width && row + 8 * half < tile.tokens.count, to[half] + at, eight);
    }
#pragma unroll
    for (int i = 0; i + 16 < kRows / 2; ++i) pre[i] = pre[i + 16];
  }
}

template <class T, int kRows>
__device__ __forceinline__ void multiply_tiles(const moefy_experts_params& p, const uint32_t* offsets, uint32_t weights,
                                               uint32_t memory, const Ring& ring) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x - kCopiers, group = thread / 128, num_stages = stages_of(n);
  Tiles<kRows> tiles(p, offsets);
  Tile tile;
  uint32_t slot = 0, turn = 0, phase = 0;
#pragma unroll 1
  while (tiles.next(tile)) {
    const bool is_own = turn == group;
    if (++turn == kGroups) turn = 0;
    if (!is_own) {
      slot = (slot + num_stages) % ring.num_slots;
      continue;
    }
    float c[kRows / 2];
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const uint32_t at = tile.row0 + i * 8 + thread % 4 * 2;
      const float* const bias = n.b_in == nullptr || at >= tile.group.width ? nullptr : n.b_in + tile.group.first_neuron + at;
      c[i * 4] = c[i * 4 + 2] = bias == nullptr ? 0.0f : bias[0];
      c[i * 4 + 1] = c[i * 4 + 3] = bias == nullptr ? 0.0f : bias[1];
    }
    uint32_t last = slot;
    const auto free_last = [&] {
      if (thread % 32 == 0) barrier_arrive(ring.empty(last));
    };
#pragma unroll 1
    for (uint32_t stage = 0; stage < num_stages; ++stage) {
      barrier_wait(ring.full(group * num_stages + stage), phase);
      fence_for_copies();
      wgmma_fence();
#pragma unroll
      for (uint32_t part = 0; part < kParts; ++part) {
        const uint64_t a = operand_of_rows(memory + slot * kSlotBytes + part * kPartBytes);
        const uint64_t b = operand_of_rows(weights + (stage * kParts + part) * kRows * kRowBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma<T, false>(c, a + 2 * step, b + 2 * step, true);
      }
      wgmma_commit();
      if (stage > 0) {
        wgmma_wait<1>();
        free_last();
      }
      last = slot;
      if (++slot == ring.num_slots) slot = 0;
    }
    phase ^= 1;
    wgmma_wait<0>();
    free_last();
    const uint32_t row = thread % 128 / 32 * 16 + thread % 32 / 4;
    with_activation(n.activation, [&](auto known) { store_tile<T, kRows>(p, tile, row, c, known); });
  }
}

template <class T, int kRows>
__device__ __forceinline__ void resident_hidden(const moefy_experts_engine_params& engine) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const moefy_experts_params& p = engine.experts;
  const uint32_t num_stages = stages_of(p.neurons), weight_bytes = num_stages * kParts * kRows * kRowBytes;
  const Ring ring(num_stages);
  uint32_t* const offsets = reinterpret_cast<uint32_t*>(memory + weight_bytes + ring.num_slots * kSlotBytes);
  const uint32_t weights = shared_address(memory), slots = weights + weight_bytes;
  if (threadIdx.x == 0) prefetch_map(engine.weights);
  begin();
  const bool runs = !by_tokens(p);
  if (!runs) return;
  count_tiles<kThreads>(p, offsets, [&](const Group& group) { return Tiles<kRows>::length(p, group); });
  if (threadIdx.x < kCopiers) {
    become_copier<kGroups>();
    copy_tiles<kRows>(p, engine.weights, offsets, weights, slots, ring);
  } else {
    become_multiplier<kGroups>();
    multiply_tiles<T, kRows>(p, offsets, weights, slots, ring);
  }
}

}  // namespace
}  // namespace moefy

// rows: of w_in that a block keeps. Dynamic shared memory: those of all d_model, rounded up to 128, 16 KB for each slot, and
// num_experts + 3 words.
#define MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(name, type, rows)                       \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                 \
      moefy_experts_many_resident_hidden_##name##_##rows(                          \
          const __grid_constant__ moefy_experts_engine_params p) {                 \
    moefy::resident_hidden<type, rows>(p);                                         \
  }

MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(f16, __half, 32)
MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(f16, __half, 64)
MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(f16, __half, 128)
MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(bf16, __nv_bfloat16, 32)
MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(bf16, __nv_bfloat16, 64)
MOEFY_EXPERTS_MANY_RESIDENT_HIDDEN(bf16, __nv_bfloat16, 128)
