// The op `experts` for one token of 16 bits, both products in one launch; moefy_add_shares adds the shares.
//
// A block takes a share of the executed neurons through both products, so that h never leaves it and nothing waits for the
// whole device between them. A thread owns eight columns of d_model: of every row it copies 16 bytes to its own place in
// shared memory, where nobody else reads them, and keeps its share of y in registers. First come the rows of w_in, then those
// of w_out, which are on their way while h is made. One token needs no tensor cores. Every sum has a fixed order.
#include "experts_few.cuh"

namespace moefy {
namespace {

constexpr uint32_t kBatch = 64;  // neurons whose h is made together, at most
constexpr int kGroup = 2;        // rows that are waited for, and multiplied, together
constexpr uint32_t kNoRow = 0xffffffffu;

/// Eight elements as they lie in memory, as floats.
template <class T>
__device__ __forceinline__ void to_floats(const uint4& vector, float (&out)[8]) {
  T elements[8];
  memcpy(elements, &vector, sizeof(vector));
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = to_float(elements[i]);
}

/// Sums over a warp of two numbers of each lane: the lower half of the lanes gets that of the first.
__device__ __forceinline__ float sum_of_lanes(const float (&values)[2]) {
  const bool upper = lane_id() >= 16;
  float sum = (upper ? values[1] : values[0]) + __shfl_xor_sync(kFullWarp, upper ? values[0] : values[1], 16);
#pragma unroll
  for (int step = 8; step >= 1; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  return sum;
}

template <class T, uint32_t kThreads>
struct OneToken {
  static constexpr uint32_t kWarps = kThreads / 32;
  /// Groups of rows that are under way.
  static constexpr uint32_t kGroups = MOEFY_EXPERTS_ONE_ROWS / kGroup;

  struct Memory {
    Union<kThreads> united;
    float sums[kWarps][2 * kBatch];  // rows of w_in
    float hidden[kBatch];
  };

  /// A group of rows, in the order in which all come: of every batch of neurons first those of w_in, then those of w_out.
  struct Group {
    uint32_t batch, count;  // first column of h, and how many
    uint32_t first = 0;     // row of the batch
    bool is_out = false;
  };

  const moefy_experts_params& p;
  const moefy_neurons& n;
  Memory& memory;
  uint4* const ring;  // this thread's part of the first row
  const uint32_t column0 = threadIdx.x * 8;
  const bool exists;
  Executed<kThreads> executed;
  uint32_t begin = 0, end = 0;  // columns of h: the block's share
  Group next;                   // to be asked for
  uint32_t slot = 0;            // of the ring: of the group that is next to be multiplied

  __device__ OneToken(const moefy_experts_params& params, Memory& shared, uint4* all)
      : p(params),
        n(params.neurons),
        memory(shared),
        ring(all + threadIdx.x),
        exists(column0 < params.neurons.d_model),
        executed(params, shared.united) {}

  __device__ Group first_of(uint32_t batch) const { return {batch, min(end - batch, kBatch)}; }

  /// Asks for the next group of rows, which a lane each finds.
  __device__ void ask(uint32_t to_slot) {
    if (next.batch < end) {
      const uint32_t halves = next.is_out ? 0 : n.glu, number = next.first + lane_id() % kGroup, index = number >> halves;
      uint32_t expert;
      const uint32_t neuron = executed.find(next.batch + index, expert);
      const bool is_up = number & halves;
      const uint32_t row = next.is_out ? neuron : is_up ? up_row(n, neuron) : input_row(n, neuron);
      const bool is_wanted = index < next.count && !(is_up && neuron >= n.d_ff);
      const T* matrix = static_cast<const T*>(next.is_out ? n.w_out : n.w_in) + column0;
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t of_lane = __shfl_sync(kFullWarp, is_wanted ? row : kNoRow, i);
        if (of_lane == kNoRow || !exists) continue;
        const uint32_t to = shared_address(ring + (to_slot * kGroup + i) * kThreads);
        copy_async(to, matrix + static_cast<uint64_t>(of_lane) * n.d_model, true);
      }
      next.first += kGroup;
      if (next.first >= next.count << halves) {
        if (next.is_out) {
          next = first_of(next.batch + next.count);
        } else {
          next.is_out = true;
          next.first = 0;
        }
      }
    }
    copy_async_commit();
  }

  /// Asks for a group in place of the one that has been multiplied.
  __device__ void go_on() {
    ask(slot);
    slot = slot + 1 == kGroups ? 0 : slot + 1;
  }

  __device__ void weights(int i, float (&w)[8]) const { to_floats<T>(ring[(slot * kGroup + i) * kThreads], w); }

  /// Products of rows of w_in with the token, summed over a warp's columns.
  __device__ void multiply_in(const float (&x)[8], uint32_t num_rows) {
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kGroup) {
      copy_async_wait<kGroups - 1>();
      float parts[kGroup] = {};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        float w[8];
        weights(i, w);
#pragma unroll
        for (int c = 0; c < 8; ++c) parts[i] = fmaf(w[c], x[c], parts[i]);
      }
      const float sum = sum_of_lanes(parts);
      if (lane_id() % 16 == 0) memory.sums[threadIdx.x / 32][first + lane_id() / 16] = sum;
      go_on();
    }
  }

  /// Adds rows of w_out, weighted by h, to this thread's columns of y.
  __device__ void multiply_out(float (&y)[8], uint32_t num_rows) {
#pragma unroll 1
    for (uint32_t first = 0; first < num_rows; first += kGroup) {
      copy_async_wait<kGroups - 1>();
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (first + i >= num_rows) break;
        const float h = memory.hidden[first + i];
        float w[8];
        weights(i, w);
#pragma unroll
        for (int c = 0; c < 8; ++c) y[c] = fmaf(h, w[c], y[c]);
      }
      go_on();
    }
  }

  __device__ void run() {
    const Shares shares(gridDim.x);
    launch_dependents();
    // Nothing is copied for threads without columns, whose sums count: zeros. Other places that get no row hold anything, and
    // nobody uses what comes of them.
    if (!exists) {
      for (uint32_t i = 0; i < kGroups * kGroup; ++i) ring[i * kThreads] = uint4{};
    }
    wait_for_dependencies();
    const uint4 token = load_fresh_vector_if(exists, static_cast<const T*>(p.x) + column0);
    executed.find(p, memory.united);
    begin = shares.begin(executed.all, blockIdx.x);
    end = shares.begin(executed.all, blockIdx.x + 1);
    next = first_of(begin);
#pragma unroll 1
    for (uint32_t i = 0; i < kGroups; ++i) ask(i);
    float x[8], y[8] = {};
    to_floats<T>(token, x);
#pragma unroll 1
    for (uint32_t batch = begin; batch < end; batch += kBatch) {
      const uint32_t count = min(end - batch, kBatch);
      // What belongs to this thread's neuron arrives while the rows do. The token selects all experts of its union.
      uint32_t expert;
      const uint32_t neuron = executed.find(batch + threadIdx.x, expert);
      const NeuronConstants constants = neuron_constants(n, neuron);
      const float gate = expert == kNoExpert ? 1.0f : gate_of(p.gates, n.num_experts, 0, expert);
      multiply_in(x, count << n.glu);
      __syncthreads();
      if (threadIdx.x < count) {
        float pre = 0.0f, up = 0.0f;
        const float* sums = &memory.sums[0][threadIdx.x << n.glu];
#pragma unroll
        for (uint32_t w = 0; w < kWarps; ++w) {
          pre += sums[w * 2 * kBatch];
          if (n.glu) up += sums[w * 2 * kBatch + 1];
        }
        const T h = from_float<T>(gate * neuron_value<T>(n, neuron, constants, pre, up));
        memory.hidden[threadIdx.x] = to_float(h);
      }
      __syncthreads();
      multiply_out(y, count);
    }
    if (!exists) return;
    float* to = p.partials + static_cast<uint64_t>(blockIdx.x) * n.d_model + column0;
#pragma unroll
    for (int c = 0; c < 8; c += 4) {
      __stcg(reinterpret_cast<float4*>(to + c), float4{y[c], y[c + 1], y[c + 2], y[c + 3]});
    }
  }
};

template <class T, uint32_t kThreads>
__device__ __forceinline__ void one_token(const moefy_experts_params& p, uint4* ring) {
  __shared__ typename OneToken<T, kThreads>::Memory memory;
  OneToken<T, kThreads>(p, memory, ring).run();
}

}  // namespace
}  // namespace moefy

// Dynamic shared memory: the ring.
#define MOEFY_EXPERTS_ONE(name, type, threads)                                          \
  extern "C" __global__ void __launch_bounds__(threads, 512 / threads)                        \
      moefy_experts_one_##name##_##threads(const __grid_constant__ moefy_experts_params p) { \
    extern __shared__ uint4 ring[];                                                           \
    moefy::one_token<type, threads>(p, ring);                                                 \
  }

MOEFY_EXPERTS_ONE(f16, __half, 256)
MOEFY_EXPERTS_ONE(f16, __half, 512)
MOEFY_EXPERTS_ONE(bf16, __nv_bfloat16, 256)
MOEFY_EXPERTS_ONE(bf16, __nv_bfloat16, 512)
