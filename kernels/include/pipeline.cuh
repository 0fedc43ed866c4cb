// Hopper: stages in shared memory that some warps fill by asynchronous copies while whole warpgroups multiply.
#pragma once

#include "memory.cuh"
#include "wgmma.cuh"

namespace moefy {

constexpr uint32_t kCopiers = 128, kMultipliers = 256;
constexpr uint32_t kPipelineThreads = kCopiers + kMultipliers;

/// Who copies leaves registers to who multiplies: sums take 128 with two warpgroups that multiply, 64 with three. All of them
/// have 65,536. `kAsks`: the copy engine does everything, and one thread asks it to.
template <int kGroups = 2, bool kAsks = false>
__device__ __forceinline__ void become_copier() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kGroups == 3 ? 80 : kAsks ? 40 : 88));
}
template <int kGroups = 2, bool kAsks = false>
__device__ __forceinline__ void become_multiplier() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kGroups == 3 ? 144 : kAsks ? 232 : 208));
}

/// The barriers of the stages. All threads of a block make one, before anything else that they share. `kWithEngine`: the copy
/// engine fills every stage or a part of it: then it is full when those bytes are there too. One thread says how many they are.
template <int kStages, bool kWithEngine = false>
struct Pipeline {
  uint32_t barriers;

  /// `full_arrivals`: of a stage, beside the bytes that it is told to expect; `empty_arrivals`: warps that multiply.
  __device__ explicit Pipeline(uint32_t full_arrivals = kCopiers + kWithEngine,
                               uint32_t empty_arrivals = kMultipliers / 32) {
    __shared__ uint64_t memory[2 * kStages];
    barriers = shared_address(memory);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full(stage), full_arrivals);
        barrier_init(empty(stage), empty_arrivals);
      }
      fence_barriers();
    }
    __syncthreads();
  }

  __device__ uint32_t full(uint32_t stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(uint32_t stage) const { return barriers + (kStages + stage) * 8; }
};

/// A thread that copies: between `begin`, which gives the stage, and `end` it asks for its part of one. It is handed over
/// when all parts have arrived.
template <int kStages, bool kWithEngine = false>
class Copier {
 public:
  __device__ explicit Copier(const Pipeline<kStages, kWithEngine>& pipeline) : pipeline_(pipeline) {}

  __device__ uint32_t begin() {
    const uint32_t stage = count_ % kStages;
    if (count_ >= kStages) barrier_wait(pipeline_.empty(stage), (count_ / kStages - 1) & 1);
    return stage;
  }

  __device__ void end() { copy_async_arrive(pipeline_.full(count_++ % kStages)); }

  /// Where the copy engine does everything.
  __device__ void end_by_engine() { ++count_; }

 private:
  const Pipeline<kStages, kWithEngine>& pipeline_;
  uint32_t count_ = 0;
};

/// A thread that multiplies: between `begin`, which gives the stage, and `end` it begins at most one group of products. The
/// group before it has then ended, and its stage can be filled again.
template <int kStages, bool kWithEngine = false>
class Multiplier {
 public:
  __device__ explicit Multiplier(const Pipeline<kStages, kWithEngine>& pipeline) : pipeline_(pipeline) {}

  __device__ uint32_t begin() {
    const uint32_t stage = count_ % kStages;
    barrier_wait(pipeline_.full(stage), count_ / kStages & 1);
    fence_for_copies();
    return stage;
  }

  __device__ void end() {
    wgmma_wait<1>();
    if (count_ > freed_) free();
    ++count_;
  }

  /// Leaves stages before this one to others, after `finish`.
  __device__ void go_to(uint32_t stage) { count_ = freed_ = stage; }

  /// Waits for all products.
  __device__ void finish() {
    wgmma_wait<0>();
    while (count_ > freed_) free();
  }

 private:
  __device__ void free() {
    const uint32_t empty = pipeline_.empty(freed_++ % kStages);
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
  }

  const Pipeline<kStages, kWithEngine>& pipeline_;
  uint32_t count_ = 0, freed_ = 0;
};

}  // namespace moefy
