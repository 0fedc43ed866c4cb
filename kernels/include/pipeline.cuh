// Hopper: stages in shared memory that one warpgroup fills by asynchronous copies while two others multiply.
#pragma once

#include "memory.cuh"
#include "wgmma.cuh"

namespace moefy {

constexpr uint32_t kCopiers = 128, kMultipliers = 256;
constexpr uint32_t kPipelineThreads = kCopiers + kMultipliers;

/// Who copies leaves registers to who multiplies: sums take 128. The three warpgroups have 65,536.
__device__ __forceinline__ void become_copier() { asm volatile("setmaxnreg.dec.sync.aligned.u32 88;"); }
__device__ __forceinline__ void become_multiplier() { asm volatile("setmaxnreg.inc.sync.aligned.u32 208;"); }

/// The barriers of the stages. All threads of a block make one, before anything else that they share. `kPaired`: the blocks
/// of a cluster of two fill parts of each other's stages by the copy engine, so that both must be done with one, and a stage
/// is full when those bytes are there too.
template <int kStages, bool kPaired = false>
struct Pipeline {
  uint32_t barriers;

  /// `full_arrivals`: of a stage, beside the bytes that it is told to expect.
  __device__ explicit Pipeline(uint32_t full_arrivals = kCopiers + kPaired) {
    __shared__ uint64_t memory[2 * kStages];
    barriers = shared_address(memory);
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(full(stage), full_arrivals);
        barrier_init(empty(stage), kMultipliers / 32 * (1 + kPaired));
      }
      fence_barriers();
    }
    if constexpr (kPaired) {
      sync_cluster();
    } else {
      __syncthreads();
    }
  }

  __device__ uint32_t full(uint32_t stage) const { return barriers + stage * 8; }
  __device__ uint32_t empty(uint32_t stage) const { return barriers + (kStages + stage) * 8; }
};

/// A thread that copies: between `begin`, which gives the stage, and `end` it asks for its part of one. Copies arrive a few
/// stages later, and only then are handed over, because products see them only after a fence by who asked for them.
template <int kStages, bool kPaired = false>
class Copier {
 public:
  __device__ explicit Copier(const Pipeline<kStages, kPaired>& pipeline) : pipeline_(pipeline) {}

  __device__ uint32_t begin() {
    const uint32_t stage = count_ % kStages;
    if (count_ >= kStages) barrier_wait(pipeline_.empty(stage), (count_ / kStages - 1) & 1);
    return stage;
  }

  __device__ void end() {
    copy_async_commit();
    ++count_;
    if (count_ - handed_ <= kBehind) return;
    copy_async_wait<kBehind>();
    hand_over();
  }

  /// The same where the copy engine does everything, and hands over as well.
  __device__ void end_by_engine() { ++count_; }

  /// Hands over every stage: at the end, and before a wait for products that may need them.
  __device__ void flush() {
    copy_async_wait<0>();
    while (handed_ < count_) hand_over();
  }

 private:
  static constexpr uint32_t kBehind = kStages - 2;

  __device__ void hand_over() {
    fence_for_copies();
    barrier_arrive(pipeline_.full(handed_++ % kStages));
  }

  const Pipeline<kStages, kPaired>& pipeline_;
  uint32_t count_ = 0, handed_ = 0;
};

/// A thread that multiplies: between `begin`, which gives the stage, and `end` it begins at most one group of products. The
/// group before it has then ended, and its stage can be filled again.
template <int kStages, bool kPaired = false>
class Multiplier {
 public:
  __device__ explicit Multiplier(const Pipeline<kStages, kPaired>& pipeline) : pipeline_(pipeline) {}

  __device__ uint32_t begin() {
    const uint32_t stage = count_ % kStages;
    barrier_wait(pipeline_.full(stage), count_ / kStages & 1);
    return stage;
  }

  __device__ void end() {
    wgmma_wait<1>();
    if (count_ > freed_) free();
    ++count_;
  }

  /// Waits for all products.
  __device__ void finish() {
    wgmma_wait<0>();
    while (count_ > freed_) free();
  }

 private:
  __device__ void free() {
    const uint32_t empty = pipeline_.empty(freed_++ % kStages), lane = threadIdx.x % 32;
    if constexpr (kPaired) {
      if (lane < 2) barrier_arrive_in_cluster(address_in_block(empty, lane));
    } else {
      if (lane == 0) barrier_arrive(empty);
    }
  }

  const Pipeline<kStages, kPaired>& pipeline_;
  uint32_t count_ = 0, freed_ = 0;
};

}  // namespace moefy
