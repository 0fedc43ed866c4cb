// The op `experts` for many tokens, second product, on Hopper: y of some tokens by 64 columns, summed where it is multiplied.
//
// A block keeps its y in shared memory, in f32, and goes through the experts. The pairs of an expert with these tokens follow
// each other in h: 64 of them at a time are multiplied by the expert's weights of these columns, and the products are added to
// the rows of their tokens. So no output of a pair goes to memory, and no product is by zeros. Sums have the order of the
// experts.
//
// Such a job is short, and a thread needs long for one: four warpgroups take jobs by turns, and lanes of other warps find what to
// ask the copy engine for, 32 stages side by side.
#include "expert_groups.cuh"
#include "pipeline.cuh"

namespace moefy {
namespace {

constexpr uint32_t kPairs = 64;
constexpr uint32_t kColumns = MOEFY_EXPERTS_SUMS_COLUMNS;
constexpr uint32_t kDepth = 64;  // of a stage
constexpr uint32_t kRowBytes = 2 * kDepth;
/// h of the pairs of a stage, or weights of its columns.
constexpr uint32_t kSlotBytes = 64 * kRowBytes;
/// Warps that fill the slots of either kind, each of them always the same ones: two would take each other's phases for theirs.
constexpr uint32_t kAskers = 2;
constexpr uint32_t kThreads = MOEFY_EXPERTS_SUMS_THREADS;
constexpr uint32_t kGroups = (kThreads - 2 * kAskers * 32) / 128;  // that multiply

/// Slots for h, then those for weights: what tells when one is full and when it is empty again.
///
/// Who waits for the phase of a barrier takes the last but one for it, and warpgroups overtake each other. So the barriers of
/// full slots are more than there are slots: a stage has the next one, and before a warpgroup waits for it, this warpgroup has
/// added the products of a job that was after the barrier's last stage.
template <uint32_t kHiddenSlots, uint32_t kWeightSlots>
class Slots {
 public:
  static constexpr uint32_t kHidden = kHiddenSlots, kWeights = kWeightSlots, kAll = kHidden + kWeights;
  static_assert(kHidden % kAskers == 0 && kWeights % kAskers == 0, "a slot has one asker");

  /// By all threads of a block, before another barrier of it.
  __device__ Slots() {
    __shared__ uint64_t memory[kAll + 2 * kFull];
    barriers_ = shared_address(memory);
    const uint32_t i = threadIdx.x;
    if (i < kAll + 2 * kFull) {
      barrier_init(barriers_ + i * 8, i < kAll ? 128 / 32 : 1);
      fence_barriers();
    }
  }

  __device__ uint32_t empty(uint32_t slot) const { return barriers_ + slot * 8; }
  /// Of a stage of h or of weights, by its number.
  __device__ uint32_t full(bool of_weights, uint32_t stage) const {
    return barriers_ + (kAll + of_weights * kFull + stage % kFull) * 8;
  }
  __device__ void wait_until_full(bool of_weights, uint32_t stage) const {
    barrier_wait(full(of_weights, stage), stage / kFull & 1);
  }

 private:
  static constexpr uint32_t kFull = 16;
  static_assert(kFull % kAskers == 0, "a stage has one asker");
  // Between two stages of a barrier lie those that other warpgroups have, of a job two at most, and all slots of either kind.
  static_assert(kFull >= 2 * kGroups + kHidden && kFull >= 2 * kGroups + kWeights, "more barriers");
  uint32_t barriers_;
};

/// Tells the compiler that all lanes of the warp have the same.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

/// Whose neurons.
enum Kind : uint32_t { kOfExpert, kOfShared, kLinear };

/// Up to 64 pairs of a group with tokens of a block, rows of h that follow each other, by some neurons of the group: as many
/// stages as every job has. The first job of these neurons brings their weights, the last one gives them up.
struct alignas(16) Job {
  uint32_t row;
  uint32_t neuron;  // row of w_out
  uint32_t column;  // of h
  uint32_t what;

  Job() = default;
  __device__ explicit Job(uint32_t of_all_lanes) : what(of_all_lanes) {}
  __device__ Job(uint32_t first_row, uint32_t first_neuron, uint32_t first_column, uint32_t slice, uint32_t kind,
                 uint32_t count, bool brings, bool gives_up)
      : row(first_row),
        neuron(first_neuron),
        column(first_column),
        what(slice << 11 | kind << 9 | gives_up << 8 | brings << 7 | count) {}
  __device__ uint32_t count() const { return what & 127; }
  __device__ bool brings_weights() const { return what >> 7 & 1; }
  __device__ bool gives_weights_up() const { return what >> 8 & 1; }
  __device__ uint32_t kind() const { return what >> 9 & 3; }
  /// Of the block's slices of neurons, which share their weights, which this one is.
  __device__ uint32_t slice() const { return what >> 11; }
};

/// What a block does for each of its items, in shared memory.
struct Jobs {
  uint32_t num;
  uint32_t num_slices;
};

__device__ __forceinline__ uint32_t width_of(const moefy_neurons& n, uint32_t group) {
  return group < n.num_experts ? n.expert_width : group == n.num_experts ? n.shared : n.rank;
}

/// Row of w_out.
__device__ __forceinline__ uint32_t first_neuron_of(const moefy_neurons& n, uint32_t group) {
  return group <= n.num_experts ? group * n.expert_width : n.d_ff;
}

/// Of a job: as many as the weights of half of the slots have.
__device__ __forceinline__ uint32_t stages_of_job(const moefy_neurons& n) { return n.expert_width > kDepth ? 2 : 1; }

/// Finds the pairs of all groups with `count` tokens from `token0` on, by all threads of a block. `ends`: two words for each
/// group.
__device__ __forceinline__ Jobs find_jobs(const moefy_experts_params& p, uint32_t token0, uint32_t count, uint2* ends,
                                          Job* all) {
  __shared__ Jobs found_jobs;
  const moefy_neurons& n = p.neurons;
  const uint32_t groups = num_groups(n);
  const uint32_t words = ceil_div(p.num_tokens, 32);
  for (uint32_t i = threadIdx.x; i < groups; i += kThreads) {
    const Group group = find_group(p, i);
    const RowRange rows = rows_of(p, group);
    // The first row of a token, or of those after it. Blocks have multiples of 32 tokens.
    const auto row_of = [&](uint32_t token) {
      if (group.expert == kNoExpert) return min(token, rows.count);
      if (token >= p.num_tokens) return rows.begin + rows.count;
      return min(p.word_offsets[static_cast<uint64_t>(i) * words + token / 32], p.max_pairs);
    };
    ends[i] = make_uint2(row_of(token0), row_of(token0 + count));
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const uint32_t slice_width = stages_of_job(n) * kDepth;
    Jobs jobs = {0, 0};
    for (uint32_t first = 0; first < groups; first += 32) {
      const uint32_t group = first + threadIdx.x;
      const uint2 range = group < groups ? ends[group] : make_uint2(0, 0);
      const uint32_t tiles = ceil_div(range.y - range.x, kPairs);
      const uint32_t slices = tiles == 0 ? 0 : ceil_div(width_of(n, group), slice_width);
      const uint32_t own = tiles * slices, last = prefix_sum(own), last_slice = prefix_sum(slices);
      const uint32_t kind = group < n.num_experts ? kOfExpert : group == n.num_experts ? kOfShared : kLinear;
      Job* to = all + jobs.num + last - own;
      for (uint32_t slice = 0; slice < slices; ++slice) {
        const uint32_t column = slice * slice_width, index = jobs.num_slices + last_slice - slices + slice;
        for (uint32_t i = 0; i < tiles; ++i) {
          const uint32_t row = range.x + i * kPairs;
          *to++ = Job(row, first_neuron_of(n, group) + column, column, index, kind, min(range.y - row, kPairs), i == 0,
                      i + 1 == tiles);
        }
      }
      jobs.num += __shfl_sync(0xffffffffu, last, 31);
      jobs.num_slices += __shfl_sync(0xffffffffu, last_slice, 31);
    }
    if (threadIdx.x == 0) found_jobs = jobs;
    fence_for_copies();  // slots are where the ends were
  }
  __syncthreads();
  return found_jobs;
}

/// Pieces of 64 columns that a block takes: of all, every `num_across`-th.
__device__ __forceinline__ uint32_t items_of(const moefy_experts_sums_params& p, uint32_t across) {
  return ceil_div(ceil_div(p.experts.neurons.d_model, kColumns) - across, p.num_across);
}

__device__ __forceinline__ uint32_t column_of(const moefy_experts_sums_params& p, uint32_t across, uint32_t item) {
  return (across + item * p.num_across) * kColumns;
}

/// Asks for weights that the jobs of 32 stages later bring to be in the second-level cache by then. They come from memory, and
/// every block needs them at about the same time: blocks of other tokens take turns.
__device__ __forceinline__ void ask_ahead(const moefy_experts_sums_params& sums, const Job* all, const Jobs& jobs,
                                          uint32_t column, uint32_t stage) {
  const uint32_t job_stages = stages_of_job(sums.experts.neurons);
  if (stage >= jobs.num * job_stages) return;
  const Job job = all[stage / job_stages];
  const uint32_t num_blocks = gridDim.x / sums.num_across;
  if (!job.brings_weights() || job.slice() % num_blocks != blockIdx.x % num_blocks) return;
  prefetch_box(sums.w_out, column, job.neuron + stage % job_stages * kDepth);
}

/// Asks for h of all jobs, or for their weights: a warp for every kAskers-th stage. Lanes find what to ask for side by side, since
/// a thread alone needs long for it, and ask one after another.
template <bool kOfWeights, class Slots>
__device__ __forceinline__ void ask(const moefy_experts_sums_params& sums, const Job* all, const Jobs& jobs, uint32_t across,
                                    uint32_t memory, const Slots& slots, uint32_t asker) {
  constexpr uint32_t kFirstSlot = kOfWeights ? Slots::kHidden : 0, kOwnSlots = kOfWeights ? Slots::kWeights : Slots::kHidden;
  const uint32_t num_items = items_of(sums, across), job_stages = stages_of_job(sums.experts.neurons);
  const uint32_t num_stages = jobs.num * job_stages, lane = threadIdx.x % 32;
  uint32_t slot = kFirstSlot + asker, phase = 1;  // of the warp's next stage; at first the slots are empty
#pragma unroll 1
  for (uint32_t item = 0; item < num_items; ++item) {
    const uint32_t column = column_of(sums, across, item);
#pragma unroll 1
    for (uint32_t first = 0; first < num_stages; first += 32) {
      const uint32_t stage = first + lane, of_job = stage % job_stages;
      const Job job = all[min(stage / job_stages, jobs.num - 1)];
      const bool is_of_expert = job.kind() == kOfExpert;
      const uint32_t eights = is_of_expert ? (job.count() + 7) / 8 : 8;
      const moefy_tensor_map* const map = kOfWeights                 ? &sums.w_out
                                          : is_of_expert             ? &sums.hidden[eights - 1]
                                          : job.kind() == kOfShared  ? &sums.hidden_shared
                                                                     : &sums.hidden_linear;
      const uint32_t bytes = kOfWeights ? kSlotBytes : eights * 8 * kRowBytes;
      const uint32_t from_column = kOfWeights ? column : job.column + of_job * kDepth;
      const uint32_t from_row = kOfWeights ? job.neuron + of_job * kDepth : job.row;
      const uint32_t use = kOfWeights ? (item * jobs.num_slices + job.slice()) * job_stages + of_job : item * num_stages + stage;
      const bool wants = stage < num_stages && use % kAskers == asker && (!kOfWeights || job.brings_weights());
      if (kOfWeights && asker == 0) {
        const bool same_item = first + 32 < num_stages;
        const uint32_t later = same_item ? column : column_of(sums, across, item + 1);
        if (same_item || item + 1 < num_items) ask_ahead(sums, all, jobs, later, same_item ? stage + 32 : lane);
      }
      uint32_t left = __ballot_sync(0xffffffffu, wants);
#pragma unroll 1
      while (left != 0) {
        const uint32_t next = __ffs(left) - 1;
        left &= left - 1;
        if (lane == next) {
          barrier_wait(slots.empty(slot), phase);
          barrier_expect(slots.full(kOfWeights, use), bytes);
          copy_box(memory + slot * kSlotBytes, *map, from_column, from_row, slots.full(kOfWeights, use));
        }
        // Or the next lane would wait for a phase that this one has not begun.
        __syncwarp();
        slot += kAskers;
        if (slot >= kFirstSlot + kOwnSlots) {
          slot -= kOwnSlots;
          phase ^= 1;
        }
      }
    }
  }
}

// ---- sums ----

/// y of a block in shared memory: rows of 64 sums, in an order that gives a lane four that follow each other: columns 2 t and
/// 2 t + 1 of two blocks of eight, for the lane t of a quad.
constexpr uint32_t kSumBytes = kColumns * sizeof(float);

__device__ __forceinline__ float4 load_sums(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_sums_if(bool exists, uint32_t address, float4 v) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0;\n@p st.shared.v4.f32 [%0], {%1,%2,%3,%4};}" ::"r"(address), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w), "r"(static_cast<int>(exists))
               : "memory");
}

__device__ __forceinline__ void store_sums(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ __forceinline__ void wait_for_all() { asm volatile("bar.sync 1, %0;" ::"n"(kGroups * 128) : "memory"); }

/// Whose turn it is to add to either half of the columns. Of each warpgroup a barrier where the one before it arrives.
///
/// All threads arrive, although one of a warp would do, and nothing is by `bar.arrive`: racecheck sees no order by either
/// (kernels/NOTES.md).
class Turns {
 public:
  enum What : uint32_t { kAddFirst, kAddSecond, kNum };

  /// By all threads of a block, before another barrier of it.
  __device__ Turns() {
    __shared__ uint64_t memory[kNum * kGroups];
    barriers_ = shared_address(memory);
    const uint32_t i = threadIdx.x;
    if (i < kNum * kGroups) barrier_init(barriers_ + i * 8, 128);
  }

  /// `round`: of the warpgroup. The first one's first turn has come.
  __device__ void wait(What what, uint32_t group, uint32_t round) const {
    barrier_wait(barriers_ + (what * kGroups + group) * 8, (group == 0 ? round + 1 : round) & 1);
  }

  __device__ void pass(What what, uint32_t group) const {
    barrier_arrive(barriers_ + (what * kGroups + (group + 1) % kGroups) * 8);
  }

 private:
  uint32_t barriers_;
};

/// A fourth of a row of products, of which `half` says whether it is this lane's first row or the one eight further.
__device__ __forceinline__ float4 part_of_row(const float (&c)[kColumns / 2], int part, int half) {
  const float* first = c + part * 8 + half * 2;
  return make_float4(first[0], first[1], first[4], first[5]);
}

/// Adds products to two fourths of the rows of their tokens, of which each lane has two places or none. Even rows of a warp
/// take the first part first, odd ones the second, so that they meet other banks.
template <uint32_t kFirst>
__device__ __forceinline__ void add_products(const float (&c)[kColumns / 2], const uint32_t (&rows)[2], const bool (&exists)[2]) {
  const bool odd = threadIdx.x / 4 % 2;
  float4 sums[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (uint32_t part = 0; part < 2; ++part) {
      const uint32_t at = rows[half] + ((kFirst + part) ^ odd) * 64;
      if (exists[half]) sums[half][part] = load_sums(at);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (uint32_t part = 0; part < 2; ++part) {
      const uint32_t at = rows[half] + ((kFirst + part) ^ odd) * 64;
      const float4 even_part = part_of_row(c, kFirst + part, half), odd_part = part_of_row(c, kFirst + (part ^ 1), half);
      float4 v = sums[half][part];
      v.x += odd ? odd_part.x : even_part.x;
      v.y += odd ? odd_part.y : even_part.y;
      v.z += odd ? odd_part.z : even_part.z;
      v.w += odd ? odd_part.w : even_part.w;
      store_sums_if(exists[half], at, v);
    }
  }
}

/// Rows of y of a block, from its sums, which become zeros.
template <class T>
__device__ __forceinline__ void store_rows(const moefy_experts_params& p, uint32_t sums, uint32_t token0, uint32_t count,
                                           uint32_t column) {
  const moefy_neurons& n = p.neurons;
  const uint32_t thread = threadIdx.x, t = thread % 4, odd = thread / 4 % 2, valid = valid_tokens(p);
  float2 bias[kColumns / 8];
#pragma unroll
  for (uint32_t block = 0; block < kColumns / 8; ++block) {
    const uint32_t at = column + block * 8 + 2 * t;
    const bool exists = n.b_out != nullptr && at < n.d_model;
    bias[block] = exists ? make_float2(n.b_out[at], n.b_out[at + 1]) : make_float2(0.0f, 0.0f);
  }
  // All lanes of a warp take part, and there are rows for all.
#pragma unroll 1
  for (uint32_t row = thread / 4; row < (count + 7) / 8 * 8; row += kGroups * 128 / 4) {
    const uint32_t token = token0 + row;
    float4 parts[4];
#pragma unroll
    for (uint32_t part = 0; part < 4; ++part) {
      const uint32_t from = sums + row * kSumBytes + t * 16 + (part ^ odd) * 64;
      parts[part] = load_sums(from);
      store_sums(from, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
    }
    T* const to = static_cast<T*>(p.y) + static_cast<uint64_t>(token) * n.d_model + column;
#pragma unroll
    for (uint32_t first = 0; first < 4; first += 2) {
      uint32_t words[4];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float4& v = parts[first + i];
        const float4& other = parts[first + (i ^ 1)];
        const float2 low = bias[(first + i) * 2], high = bias[(first + i) * 2 + 1];
        words[2 * i] = pack_two<T>((odd ? other.x : v.x) + low.x, (odd ? other.y : v.y) + low.y);
        words[2 * i + 1] = pack_two<T>((odd ? other.z : v.z) + high.x, (odd ? other.w : v.w) + high.y);
      }
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) words[i] = token < valid ? words[i] : 0;
      const uint4 eight = transpose_quad(words);
      const uint32_t at = (first * 2 + t) * 8;
      store_vector_if(row < count && column + at < n.d_model, to + at, eight);
    }
  }
}

/// Tokens of this lane's two rows of a job, of all. Nothing looks at them before the next job, so nothing waits.
struct Tokens {
  uint32_t of_row[2];

  __device__ Tokens(const moefy_experts_params& p, const Job& job, uint32_t own_row) {
    const uint32_t row = job.row + own_row;
    const uint32_t* const from = p.token_ids + row;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      of_row[half] = row + half * 8;
      asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0;\n@p ld.global.u32 %0, [%1];}"
                   : "+r"(of_row[half])
                   : "l"(from + half * 8), "r"(static_cast<int>(own_row + half * 8 < job.count() && job.kind() == kOfExpert)));
    }
  }
};

template <class T, class Slots>
__device__ __forceinline__ void multiply_items(const moefy_experts_sums_params& p, const Job* all, const Jobs& jobs, uint32_t token0,
                                               uint32_t count, uint32_t across, uint32_t memory, const Slots& slots,
                                               const Turns& turns) {
  const uint32_t sums = memory + Slots::kAll * kSlotBytes, thread = threadIdx.x, group = uniform(thread / 128);
  const uint32_t own_row = thread % 128 / 32 * 16 + thread % 32 / 4;
  for (uint32_t i = thread; i < count * (kSumBytes / 16); i += kGroups * 128) {
    store_sums(sums + i * 16, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  wait_for_all();
  const uint32_t num_stages = stages_of_job(p.experts.neurons);
  const uint32_t num_items = items_of(p, across), first_row = sums - token0 * kSumBytes + thread % 4 * 16;
  const bool is_first_lane = thread % 32 == 0;
  const auto free_hidden = [&](uint32_t stage) {
    if (is_first_lane) barrier_arrive(slots.empty(stage % Slots::kHidden));
  };
  const auto free_weights = [&](uint32_t stage) {
    if (is_first_lane) barrier_arrive(slots.empty(Slots::kHidden + stage % Slots::kWeights));
  };
  const auto find_job = [&](uint32_t index) {
    if (jobs.num == 0) return Job(0);
#pragma unroll 1
    while (index >= jobs.num) index -= jobs.num;
    return all[index];
  };
  Job job = find_job(group);
  Tokens tokens(p.experts, job, own_row);
  uint32_t index = group, round = 0;  // of this item's jobs; of this warpgroup's
#pragma unroll 1
  for (uint32_t item = 0; item < num_items; ++item) {
#pragma unroll 1
    for (; index < jobs.num; index += kGroups, ++round) {
      const uint32_t rows[2] = {first_row + tokens.of_row[0] * kSumBytes, first_row + tokens.of_row[1] * kSumBytes};
      const bool exists[2] = {own_row < job.count(), own_row + 8 < job.count()};
      const Job same(uniform(job.what));
      const bool brings = same.brings_weights(), gives_up = same.gives_weights_up();
      uint32_t h = (item * jobs.num + index) * num_stages, w = (item * jobs.num_slices + same.slice()) * num_stages;
      const uint32_t end = h + num_stages;
      float c[kColumns / 2];
      bool adds = false;
#pragma unroll 1
      for (;;) {
        const uint32_t slot = h % Slots::kHidden, weight_slot = Slots::kHidden + w % Slots::kWeights;
        slots.wait_until_full(true, w);
        slots.wait_until_full(false, h);
        const uint64_t a = operand_of_rows(memory + slot * kSlotBytes);
        const uint64_t b = operand_of_columns(memory + weight_slot * kSlotBytes, kSlotBytes);
        wgmma_fence();
#pragma unroll
        for (uint32_t step = 0; step < kDepth / 16; ++step) {
          wgmma<T, true>(c, operand_after(a, 32 * step), operand_after(b, 2048 * step), step > 0 || adds);
        }
        wgmma_commit();
        if (adds) {
          wgmma_wait<1>();
          free_hidden(h - 1);
          if (brings && gives_up) free_weights(w - 1);
        }
        adds = true;
        if (h + 1 == end) break;
        ++h;
        ++w;
      }
      job = find_job(index + kGroups);
      tokens = Tokens(p.experts, job, own_row);
      wgmma_wait<0>();
      free_hidden(h);
      if (brings && gives_up) free_weights(w);
      turns.wait(Turns::kAddFirst, group, round);
      // Those before this one have multiplied by them too.
      if (gives_up && !brings) {
#pragma unroll 1
        for (uint32_t i = 0; i < num_stages; ++i) free_weights(w - i);
      }
      add_products<0>(c, rows, exists);
      turns.pass(Turns::kAddFirst, group);
      turns.wait(Turns::kAddSecond, group, round);
      add_products<2>(c, rows, exists);
      turns.pass(Turns::kAddSecond, group);
    }
    index -= jobs.num;
    wait_for_all();
    store_rows<T>(p.experts, sums, token0, count, column_of(p, across, item));
    wait_for_all();
  }
}

template <class T, class Slots>
__device__ __forceinline__ void many_sums(const moefy_experts_sums_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Job* const all = reinterpret_cast<Job*>(memory + Slots::kAll * kSlotBytes + p.block_tokens * kSumBytes);
  const Slots slots;
  const Turns turns;
  if (threadIdx.x == 0 && p.experts.max_pairs > 0) {
    for (const moefy_tensor_map& map : p.hidden) prefetch_map(map);
    prefetch_map(p.w_out);
  }
  begin_before_many();
  const bool runs = !by_tokens(p.experts);
  const uint32_t num_blocks = ceil_div(p.experts.num_tokens, p.block_tokens), across = blockIdx.x / num_blocks;
  const uint32_t token0 = blockIdx.x % num_blocks * p.block_tokens;
  const uint32_t count = min(p.block_tokens, p.experts.num_tokens - token0);
  const Jobs jobs = find_jobs(p.experts, token0, count, reinterpret_cast<uint2*>(memory), all);
  // Asked for before the ends of the groups, looked at after them.
  if (!runs) return;
  const uint32_t asker = threadIdx.x / 32 - kGroups * 4;
  // All have 65,536 registers or, with four warpgroups that multiply, 61,440.
  if (threadIdx.x < kGroups * 128) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kGroups == 3 ? 144 : 104));
    multiply_items<T>(p, all, jobs, token0, count, across, shared_address(memory), slots, turns);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGroups == 3 ? 80 : 64));
    if (asker < kAskers) {
      ask<false>(p, all, jobs, across, shared_address(memory), slots, asker);
    } else {
      ask<true>(p, all, jobs, across, shared_address(memory), slots, asker - kAskers);
    }
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the slots, where the ends of the groups are at first, 256 bytes for each token of a block, and four
// words for each job that can be.
#define MOEFY_EXPERTS_MANY_SUMS(name, type, hidden, weights)                                 \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                           \
      moefy_experts_many_sums_##name(const __grid_constant__ moefy_experts_sums_params p) {  \
    moefy::many_sums<type, moefy::Slots<hidden, weights>>(p);                                \
  }

#define MOEFY_EXPERTS_MANY_SUMS_OF(name, type)                                                                \
  MOEFY_EXPERTS_MANY_SUMS(name, type, MOEFY_EXPERTS_SUMS_HIDDEN_SLOTS, MOEFY_EXPERTS_SUMS_WEIGHT_SLOTS)       \
  MOEFY_EXPERTS_MANY_SUMS(more_##name, type, MOEFY_EXPERTS_SUMS_MORE_HIDDEN_SLOTS, MOEFY_EXPERTS_SUMS_MORE_WEIGHT_SLOTS)

MOEFY_EXPERTS_MANY_SUMS_OF(f16, __half)
MOEFY_EXPERTS_MANY_SUMS_OF(bf16, __nv_bfloat16)
