// The op `experts` for many tokens, second product, on Hopper: y of some tokens by 64 columns, summed where it is multiplied.
//
// A block keeps its y in shared memory, in f32, and goes through the experts. The pairs of an expert with these tokens follow
// each other in h: 64 of them at a time are multiplied by the expert's weights of these columns, and the products are added to
// the rows of their tokens. So no output of a pair goes to memory, and no product is by zeros. Sums have the order of the
// experts.
//
// Such a job is short, and a thread needs long for one: four warpgroups take jobs by turns, and each stage has a thread of its
// own that asks the copy engine for what belongs there.
#include "expert_groups.cuh"
#include "pipeline.cuh"

namespace moefy {
namespace {

constexpr uint32_t kPairs = 64;
constexpr uint32_t kColumns = MOEFY_EXPERTS_SUMS_COLUMNS;
constexpr uint32_t kDepth = 64;  // of a stage
constexpr uint32_t kRowBytes = 2 * kDepth;
constexpr uint32_t kPairBytes = kPairs * kRowBytes;  // of a stage; weights follow
constexpr uint32_t kStageBytes = kPairBytes + kDepth * kRowBytes;
constexpr int kStages = MOEFY_EXPERTS_SUMS_STAGES;
constexpr uint32_t kGroups = 4;  // that multiply
constexpr uint32_t kThreads = kGroups * 128 + kStages * 32;

/// Up to 64 pairs of a group with tokens of a block: rows of h that follow each other.
struct Job {
  uint32_t row;
  uint32_t group_and_count;

  Job() = default;
  __device__ Job(uint32_t first, uint32_t group, uint32_t count) : row(first), group_and_count(group << 8 | count) {}
  __device__ uint32_t group() const { return group_and_count >> 8; }
  __device__ uint32_t count() const { return group_and_count & 255; }
};

/// What a block does for each of its items, in shared memory: first the experts' jobs, then the shared and the linear neurons'.
struct Jobs {
  const Job* all;
  uint32_t of_experts, of_shared, num;
};

__device__ __forceinline__ uint32_t stages_of(uint32_t neurons) { return ceil_div(neurons, kDepth); }

/// Goes through the jobs of a block, again for every item.
class Walk {
 public:
  Job job;
  uint32_t item = 0;

  __device__ Walk(const moefy_experts_params& p, const Jobs& jobs, uint32_t num_items, uint32_t first)
      : n_(p.neurons), jobs_(jobs), end_(jobs.num == 0 ? 0 : num_items), stages_(stages_of(p.neurons.expert_width)) {
    skip(first);
  }

  __device__ bool exists() const { return item < end_; }
  __device__ bool is_first() const { return item == 0 && index_ == 0; }
  __device__ bool is_last() const { return item + 1 == end_ && index_ + 1 == jobs_.num; }
  __device__ bool is_of_experts() const { return index_ < jobs_.of_experts; }
  __device__ bool is_linear() const { return index_ >= jobs_.of_experts + jobs_.of_shared; }
  __device__ uint32_t first_neuron() const {
    return is_of_experts() ? job.group() * n_.expert_width : is_linear() ? n_.d_ff : routed_neurons(n_);
  }
  __device__ uint32_t num_stages() const {
    return is_of_experts() ? stages_ : stages_of(is_linear() ? n_.rank : n_.shared);
  }
  /// Of all jobs before this one.
  __device__ uint32_t first_stage() const {
    if (jobs_.of_experts == jobs_.num) return (item * jobs_.num + index_) * stages_;
    return item * stages_before(jobs_.num) + stages_before(index_);
  }

  __device__ void skip(uint32_t jobs) {
    index_ += jobs;
#pragma unroll 1
    while (exists() && index_ >= jobs_.num) {
      index_ -= jobs_.num;
      ++item;
    }
    if (exists()) job = jobs_.all[index_];
  }

 private:
  /// Of an item.
  __device__ uint32_t stages_before(uint32_t index) const {
    const uint32_t linear = jobs_.of_experts + jobs_.of_shared;
    const uint32_t of_experts = min(index, jobs_.of_experts), of_shared = min(index, linear) - of_experts;
    return of_experts * stages_ + of_shared * stages_of(n_.shared) +
           (index - of_experts - of_shared) * stages_of(n_.rank);
  }

  const moefy_neurons& n_;
  const Jobs& jobs_;
  const uint32_t end_, stages_;
  uint32_t index_ = 0;
};

/// The first of `ids`, ascending, from `low` to `high`, that is at least `least`.
__device__ __forceinline__ uint32_t find_first(const uint32_t* ids, uint32_t low, uint32_t high, uint32_t least) {
#pragma unroll 1
  while (low < high) {
    const uint32_t step = ceil_div(high - low, 4);
    uint32_t less = 0;
#pragma unroll
    for (uint32_t i = 1; i <= 3; ++i) {
      const uint32_t at = low + i * step - 1;
      less += at < high && ids[min(at, high - 1)] < least;
    }
    low += less * step;
    if (less < 3) high = min(high, low + step - 1);
  }
  return low;
}

/// Finds the pairs of all groups with `count` tokens from `token0` on, by all threads of a block. `ends`: two words for each
/// group.
__device__ __forceinline__ Jobs find_jobs(const moefy_experts_params& p, uint32_t token0, uint32_t count, uint2* ends,
                                          Job* all) {
  __shared__ uint32_t of_experts, of_shared, num_jobs;
  const uint32_t groups = num_groups(p.neurons);
  // Two threads search the ends.
  for (uint32_t i = threadIdx.x; i < 2 * groups; i += kThreads) {
    const Group group = find_group(p, i / 2);
    const RowRange rows = rows_of(p, group);
    const uint32_t token = token0 + i % 2 * count;
    const uint32_t found = group.expert == kNoExpert
                               ? min(token, rows.count)
                               : find_first(p.token_ids, rows.begin, rows.begin + rows.count, token);
    (i % 2 == 0 ? ends[i / 2].x : ends[i / 2].y) = found;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    uint32_t jobs = 0;
    for (uint32_t first = 0; first < groups; first += 32) {
      const uint32_t group = first + threadIdx.x;
      const uint2 range = group < groups ? ends[group] : make_uint2(0, 0);
      const uint32_t own = ceil_div(range.y - range.x, kPairs);
      uint32_t sum = own;
#pragma unroll
      for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t earlier = __shfl_up_sync(0xffffffffu, sum, step);
        if (threadIdx.x >= step) sum += earlier;
      }
      Job* const to = all + jobs + sum - own;
      for (uint32_t i = 0; i < own; ++i) {
        const uint32_t row = range.x + i * kPairs;
        to[i] = Job(row, group, min(range.y - row, kPairs));
      }
      if (group + 1 == p.neurons.num_experts) of_experts = jobs + sum;
      if (group == p.neurons.num_experts) of_shared = own;
      jobs += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (threadIdx.x == 0) num_jobs = jobs;
    fence_for_copies();  // stages come where the ends were
  }
  __syncthreads();
  return {all, of_experts, of_shared, num_jobs};
}

/// Pieces of 64 columns that a block takes: of all, every `num_lanes`-th.
__device__ __forceinline__ uint32_t items_of(const moefy_experts_sums_params& p, uint32_t lane) {
  return ceil_div(ceil_div(p.experts.neurons.d_model, kColumns) - lane, p.num_lanes);
}

__device__ __forceinline__ uint32_t column_of(const moefy_experts_sums_params& p, uint32_t lane, uint32_t item) {
  return (lane + item * p.num_lanes) * kColumns;
}

/// Fills a stage again and again.
__device__ __forceinline__ void copy_items(const moefy_experts_sums_params& sums, const Jobs& jobs, uint32_t lane,
                                           uint32_t memory, const Pipeline<kStages, true>& pipeline, uint32_t slot) {
  const uint32_t to = memory + slot * kStageBytes, full = pipeline.full(slot), empty = pipeline.empty(slot);
  Walk walk(sums.experts, jobs, items_of(sums, lane), 0);
  uint32_t stage = slot;  // of the job
  for (uint32_t times = 0;; ++times) {
    while (walk.exists() && stage >= walk.num_stages()) {
      stage -= walk.num_stages();
      walk.skip(1);
    }
    if (!walk.exists()) return;
    if (times > 0) barrier_wait(empty, (times - 1) & 1);
    barrier_expect(full, kStageBytes);
    copy_box(to + kPairBytes, sums.w_out, column_of(sums, lane, walk.item), walk.first_neuron() + stage * kDepth, full);
    if (walk.is_of_experts()) {
      copy_box(to, sums.hidden, stage * kDepth, walk.job.row, full);
    } else if (walk.is_linear()) {
      copy_box(to, sums.hidden_linear, stage * kDepth, walk.job.row, full);
    } else {
      copy_box(to, sums.hidden_shared, stage * kDepth, walk.job.row, full);
    }
    stage += kStages;
  }
}

// ---- sums ----

/// y of a block in shared memory: rows of 64 sums, in an order that gives a lane four that follow each other: columns 2 t and
/// 2 t + 1 of two blocks of eight, for the lane t of a quad.
constexpr uint32_t kSumBytes = kColumns * sizeof(float);
constexpr uint32_t kNoSums = 0xffffffffu;

__device__ __forceinline__ float4 load_sums(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_sums(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

/// Barriers: of all warpgroups that multiply; for each of them, of it and the one before it: when it may multiply, and when it
/// may add to either half of the columns.
enum Barrier : uint32_t { kAll = 1, kMultiplies = 2, kAdds = kMultiplies + kGroups, kEnd = kAdds + 2 * kGroups };
static_assert(kEnd <= 16, "a block has 16 barriers");

__device__ __forceinline__ void wait_for_all() { asm volatile("bar.sync 1, %0;" ::"n"(kGroups * 128) : "memory"); }

__device__ __forceinline__ void wait_for_last(uint32_t barrier) {
  asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void let_next(uint32_t barrier) {
  asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory");
}

/// A fourth of a row of products, of which `half` says whether it is this lane's first row or the one eight further.
__device__ __forceinline__ float4 part_of_row(const float (&c)[kColumns / 2], int part, int half) {
  const float* first = c + part * 8 + half * 2;
  return make_float4(first[0], first[1], first[4], first[5]);
}

/// Adds products to two fourths of the rows of their tokens, of which each lane has two places or none. Even rows of a warp
/// take the first part first, odd ones the second, so that they meet other banks.
template <uint32_t kFirst>
__device__ __forceinline__ void add_products(const float (&c)[kColumns / 2], const uint32_t (&rows)[2]) {
  const uint32_t odd = threadIdx.x / 4 % 2;
  float4 sums[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (uint32_t part = 0; part < 2; ++part) {
      const uint32_t at = rows[half] + ((kFirst + part) ^ odd) * 64;
      if (rows[half] != kNoSums) sums[half][part] = load_sums(at);
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
      if (rows[half] != kNoSums) store_sums(at, v);
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
      if (row < count && column + at < n.d_model) *reinterpret_cast<uint4*>(to + at) = eight;
    }
  }
}

/// Tokens of this lane's two rows of a job, of all, or kNoSums. Nothing looks at them before the next job, so nothing waits.
struct Tokens {
  uint32_t of_row[2];

  __device__ Tokens(const moefy_experts_params& p, const Walk& walk, uint32_t own_row) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t own = own_row + half * 8, row = walk.job.row + own;
      const bool exists = walk.exists() && own < walk.job.count();
      of_row[half] = exists ? row : kNoSums;
      asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0;\n@p ld.global.u32 %0, [%1];}"
                   : "+r"(of_row[half])
                   : "l"(p.token_ids + row), "r"(static_cast<int>(exists && walk.is_of_experts())));
    }
  }
};

template <class T>
__device__ __forceinline__ void multiply_items(const moefy_experts_sums_params& p, const Jobs& jobs, uint32_t token0,
                                               uint32_t count, uint32_t lane, uint32_t memory,
                                               const Pipeline<kStages, true>& pipeline) {
  const uint32_t sums = memory + kStages * kStageBytes, thread = threadIdx.x, group = thread / 128;
  const uint32_t next_group = group + 1 == kGroups ? 0 : group + 1;
  const uint32_t own_row = thread % 128 / 32 * 16 + thread % 32 / 4;
  for (uint32_t i = thread; i < count * (kSumBytes / 16); i += kGroups * 128) {
    store_sums(sums + i * 16, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
  }
  wait_for_all();
  const uint32_t num_items = items_of(p, lane);
  const auto free_stage = [&](uint32_t stage) {
    if (thread % 32 == 0) barrier_arrive(pipeline.empty(stage % kStages));
  };
  Walk walk(p.experts, jobs, num_items, group);
  Tokens next_tokens(p.experts, walk, own_row);
#pragma unroll 1
  for (uint32_t item = 0; item < num_items; ++item) {
#pragma unroll 1
    while (walk.exists() && walk.item == item) {
      const uint32_t first_stage = walk.first_stage(), end_stage = first_stage + walk.num_stages();
      const bool is_first = walk.is_first(), is_last = walk.is_last();
      uint32_t rows[2];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t token = next_tokens.of_row[half];
        rows[half] = token == kNoSums ? kNoSums : sums + (token - token0) * kSumBytes + thread % 4 * 16;
      }
      // Who would wait for a stage before the last one has seen its own would take an earlier phase for that.
      if (!is_first) wait_for_last(kMultiplies + group);
      float c[kColumns / 2];
#pragma unroll 1
      for (uint32_t stage = first_stage; stage < end_stage; ++stage) {
        const uint32_t from = memory + stage % kStages * kStageBytes;
        barrier_wait(pipeline.full(stage % kStages), stage / kStages & 1);
        if (stage + 1 == end_stage && !is_last) let_next(kMultiplies + next_group);
        const uint64_t a = operand_of_rows(from), b = operand_of_columns(from + kPairBytes, kDepth * kRowBytes);
        wgmma_fence();
#pragma unroll
        for (uint32_t step = 0; step < kDepth / 16; ++step) {
          wgmma<T, true>(c, a + 2 * step, b + 128 * step, stage > first_stage || step > 0);
        }
        wgmma_commit();
        if (stage == first_stage) continue;
        wgmma_wait<1>();
        free_stage(stage - 1);
      }
      walk.skip(kGroups);
      next_tokens = Tokens(p.experts, walk, own_row);
      wgmma_wait<0>();
      free_stage(end_stage - 1);
      if (!is_first) wait_for_last(kAdds + group);
      add_products<0>(c, rows);
      if (!is_last) let_next(kAdds + next_group);
      if (!is_first) wait_for_last(kAdds + kGroups + group);
      add_products<2>(c, rows);
      if (!is_last) let_next(kAdds + kGroups + next_group);
    }
    wait_for_all();
    store_rows<T>(p.experts, sums, token0, count, column_of(p, lane, item));
    wait_for_all();
  }
}

template <class T>
__device__ __forceinline__ void many_sums(const moefy_experts_sums_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Job* const all = reinterpret_cast<Job*>(memory + kStages * kStageBytes + p.block_tokens * kSumBytes);
  const Pipeline<kStages, true> pipeline(1, 128 / 32);
  begin();
  if (by_tokens(p.experts)) return;
  const uint32_t num_blocks = ceil_div(p.experts.num_tokens, p.block_tokens), lane = blockIdx.x / num_blocks;
  const uint32_t token0 = blockIdx.x % num_blocks * p.block_tokens;
  const uint32_t count = min(p.block_tokens, p.experts.num_tokens - token0);
  const Jobs jobs = find_jobs(p.experts, token0, count, reinterpret_cast<uint2*>(memory), all);
  const uint32_t warp = threadIdx.x / 32;
  if (warp < kGroups * 4) {
    multiply_items<T>(p, jobs, token0, count, lane, shared_address(memory), pipeline);
  } else if (threadIdx.x % 32 == 0) {
    copy_items(p, jobs, lane, shared_address(memory), pipeline, warp - kGroups * 4);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the stages, where the ends of the groups are at first, 256 bytes for each token of a block, and two
// words for each job that can be.
#define MOEFY_EXPERTS_MANY_SUMS(name, type)                                                     \
  extern "C" __global__ void __launch_bounds__(moefy::kThreads, 1)                              \
      moefy_experts_many_sums_##name(const __grid_constant__ moefy_experts_sums_params p) {     \
    moefy::many_sums<type>(p);                                                                  \
  }

MOEFY_EXPERTS_MANY_SUMS(f16, __half)
MOEFY_EXPERTS_MANY_SUMS(bf16, __nv_bfloat16)
