// The op `experts` for many tokens, second product, on Hopper: the output of every (expert, token) pair, expert by expert.
//
// The tiles of a slab, 128 pairs of one expert by 256 columns of y, lie in a row: those of one expert and one stripe of
// columns beside each other. A block takes its share of the row, so that it copies the weights of a stripe once for all
// tokens of an expert. One warpgroup copies, two multiply 64 pairs each and store. moefy_experts_many_sum does the rest.
#include "expert_groups.cuh"
#include "pipeline.cuh"
#include "store_lines.cuh"
#include "wgmma.cuh"

namespace moefy {
namespace {

constexpr uint32_t kPairs = 128;
constexpr uint32_t kColumns = MOEFY_EXPERTS_MANY_SLAB;
constexpr int kRowBytes = 128;
constexpr uint32_t kDepth = 64;      // neurons of a stage of h
constexpr uint32_t kNeurons = 128;   // of a piece of weights
constexpr uint32_t kStripe = 64;     // columns of a block of weights
constexpr uint32_t kBlockBytes = kNeurons * kRowBytes;
constexpr uint32_t kPieceBytes = kColumns / kStripe * kBlockBytes;
constexpr uint32_t kPieces = 2;  // one is multiplied with, one under way
constexpr int kStages = 4;
constexpr uint32_t kStageBytes = kPairs * kRowBytes;

/// Goes through the tiles of a block, and through the pieces of 128 neurons of each.
class Walk {
 public:
  Group group;
  RowRange pairs;
  uint32_t column0;
  uint32_t first_neuron;  // of the piece, in the group
  uint32_t num_neurons;   // of the piece
  uint32_t piece = 0;     // which weights: counts those that differ from the ones before

  __device__ Walk(const moefy_experts_params& p, const Slab& slab, const uint32_t* tile_offsets)
      : p_(p), slab_(slab), tile_offsets_(tile_offsets), of_stripe_(tile_offsets[num_groups(p.neurons)]) {
    const uint64_t all = static_cast<uint64_t>(of_stripe_) * ceil_div(slab.end - slab.first, kColumns);
    tile_ = all * blockIdx.x / gridDim.x;
    end_ = all * (blockIdx.x + 1) / gridDim.x;
    if (exists()) find();
  }

  __device__ bool exists() const { return tile_ < end_; }
  __device__ bool is_first() const { return first_neuron == 0; }
  __device__ bool is_last() const { return first_neuron + kNeurons >= group.width; }

  __device__ void next() {
    if (!is_last()) {
      first_neuron += kNeurons;
      num_neurons = min(group.width - first_neuron, kNeurons);
      ++piece;
      return;
    }
    const uint32_t index = index_, column = column0;
    const bool whole = group.width <= kNeurons;
    if (++tile_ >= end_) return;
    find();
    if (!whole || index != index_ || column != column0) ++piece;
  }

 private:
  __device__ void find() {
    const uint32_t inside = tile_ % of_stripe_;
    index_ = find_tile(tile_offsets_, num_groups(p_.neurons), inside);
    group = find_group(p_, index_);
    const RowRange all = rows_of(p_, group);
    const uint32_t first = (inside - tile_offsets_[index_]) * kPairs;
    pairs = {all.begin + first, min(all.count - first, kPairs)};
    column0 = slab_.first + tile_ / of_stripe_ * kColumns;
    first_neuron = 0;
    num_neurons = min(group.width, kNeurons);
  }

  const moefy_experts_params& p_;
  const Slab& slab_;
  const uint32_t* tile_offsets_;
  uint32_t of_stripe_, tile_, end_, index_;
};

/// Pieces of weights are handed over with the stages that follow them, and given back by a barrier of their own.
struct PieceBarriers {
  uint32_t barriers;

  __device__ PieceBarriers() {
    __shared__ uint64_t memory[kPieces];
    barriers = shared_address(memory);
    if (threadIdx.x < kPieces) {
      barrier_init(barriers + threadIdx.x * 8, kMultipliers / 32);
      fence_barriers();
    }
    __syncthreads();
  }

  __device__ uint32_t empty(uint32_t piece) const { return barriers + piece % kPieces * 8; }
};

template <class T>
__device__ __forceinline__ void copy_tiles(const moefy_experts_params& p, const Slab& slab, Walk& walk, uint32_t weights,
                                           uint32_t stages, const Pipeline<kStages>& pipeline,
                                           const PieceBarriers& pieces) {
  constexpr uint32_t kHiddenChunks = kRowBytes / kChunkBytes, kWeightChunks = kColumns / 8;
  const moefy_neurons& n = p.neurons;
  Copier<kStages> copier(pipeline);
  uint32_t copied = 0;  // pieces
  for (; walk.exists(); walk.next()) {
    const Group& group = walk.group;
    const auto copy_weights = [&] {
      if (walk.piece >= kPieces) {
        barrier_wait(pieces.empty(walk.piece), (walk.piece / kPieces - 1) & 1);
      }
      const T* w = static_cast<const T*>(n.w_out);
      const uint32_t to = weights + walk.piece % kPieces * kPieceBytes;
#pragma unroll 4
      for (uint32_t i = threadIdx.x; i < ceil_div(walk.num_neurons, kDepth) * kDepth * kWeightChunks; i += kCopiers) {
        const uint32_t row = i / kWeightChunks, chunk = i % kWeightChunks, column = walk.column0 + chunk * 8;
        const bool valid = row < walk.num_neurons && column < slab.end;
        const uint64_t neuron = group.first_neuron + walk.first_neuron + row;
        copy_async(to + chunk / 8 * kBlockBytes + swizzled<kRowBytes>(row, chunk % 8),
                   w + (valid ? neuron * n.d_model + column : 0), valid);
      }
      ++copied;
    };
    const T* hidden = static_cast<const T*>(p.hidden) + group.hidden + walk.pairs.begin * group.hidden_stride;
    for (uint32_t depth = 0; depth < walk.num_neurons; depth += kDepth) {
      const uint32_t to = stages + copier.begin() * kStageBytes, neuron0 = walk.first_neuron + depth;
      if (walk.piece == copied) copy_weights();
#pragma unroll 4
      for (uint32_t i = threadIdx.x; i < kPairs * kHiddenChunks; i += kCopiers) {
        const uint32_t row = i / kHiddenChunks, chunk = i % kHiddenChunks, neuron = neuron0 + chunk * 8;
        const bool valid = row < walk.pairs.count && neuron < group.hidden_stride;
        copy_async(to + swizzled<kRowBytes>(row, chunk), hidden + (valid ? row * group.hidden_stride + neuron : 0), valid);
      }
      copier.end();
    }
  }
}

template <class T>
__device__ __forceinline__ void multiply_tiles(const moefy_experts_params& p, const Slab& slab, Walk& walk,
                                               uint32_t weights, uint32_t stages, const Pipeline<kStages>& pipeline,
                                               const PieceBarriers& pieces) {
  const uint32_t thread = threadIdx.x - kCopiers, group_pair = thread / 128 * 64;
  Multiplier<kStages> multiplier(pipeline);
  float c[kColumns / 2];
  while (walk.exists()) {
    const bool has_pairs = group_pair < walk.pairs.count;
    const uint32_t piece = walk.piece, w = weights + piece % kPieces * kPieceBytes;
    for (uint32_t depth = 0; depth < walk.num_neurons; depth += kDepth) {
      const uint32_t from = stages + multiplier.begin() * kStageBytes;
      if (has_pairs) {
        const uint64_t a = operand_of_rows(from + group_pair * kRowBytes);
        const uint64_t b = operand_of_columns(w + depth * kRowBytes, kBlockBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < int(kDepth / 16); ++step) {
          wgmma<T, true>(c, a + 2 * step, b + 128 * step, !walk.is_first() || depth > 0 || step > 0);
        }
        wgmma_commit();
      }
      multiplier.end();
    }
    multiplier.finish();
    const Walk here = walk;
    walk.next();
    const bool is_over = !walk.exists() || walk.piece != piece;
    if (is_over && threadIdx.x % 32 == 0) barrier_arrive(pieces.empty(piece));
    if (!here.is_last() || !has_pairs) continue;
    T* rows = static_cast<T*>(p.rows) + place_of_rows(p, here.group) * slab.width + here.column0 - slab.first;
    const uint32_t first_pair = group_pair + thread % 128 / 32 * 16;
    store_lines<T, kColumns / 8>(
        slab.end - here.column0,
        [&](int block, int half) {
          const float* sums = c + block * 4 + 2 * half;
          return make_float2(sums[0], sums[1]);
        },
        [&](uint32_t row) {
          const uint32_t pair = first_pair + row;
          return pair < here.pairs.count ? rows + (here.pairs.begin + pair) * static_cast<uint64_t>(slab.width) : nullptr;
        });
  }
}

template <class T>
__device__ __forceinline__ void many_output(const moefy_experts_params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  constexpr uint32_t kBytes = kPieces * kPieceBytes + kStages * kStageBytes;
  uint32_t* tile_offsets = reinterpret_cast<uint32_t*>(memory + kBytes);
  const uint32_t weights = shared_address(memory), stages = weights + kPieces * kPieceBytes;
  const Pipeline<kStages> pipeline;
  const PieceBarriers pieces;
  begin();
  const Slab slab = find_slab<T>(p);
  if (slab.first >= slab.end) return;
  count_tiles<kPipelineThreads>(p, tile_offsets, [&](const Group& group) {
    return group.width == 0 ? 0 : ceil_div(rows_of(p, group).count, kPairs);
  });
  if (tile_offsets[num_groups(p.neurons)] == 0) return;
  Walk walk(p, slab, tile_offsets);
  if (threadIdx.x < kCopiers) {
    become_copier();
    copy_tiles<T>(p, slab, walk, weights, stages, pipeline, pieces);
  } else {
    become_multiplier();
    multiply_tiles<T>(p, slab, walk, weights, stages, pipeline, pieces);
  }
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: 192 KB, and num_experts + 3 words.
#define MOEFY_EXPERTS_MANY_OUTPUT(name, type)                                                  \
  extern "C" __global__ void __launch_bounds__(moefy::kPipelineThreads, 1)                     \
      moefy_experts_many_wide_output_##name(const __grid_constant__ moefy_experts_params p) { \
    moefy::many_output<type>(p);                                                               \
  }

MOEFY_EXPERTS_MANY_OUTPUT(f16, __half)
MOEFY_EXPERTS_MANY_OUTPUT(bf16, __nv_bfloat16)
