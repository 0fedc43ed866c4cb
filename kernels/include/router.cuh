// What the kernels of routers share: activations, and the second layer for few tokens.
#pragma once

#include "element.cuh"
#include "select.cuh"

namespace moefy {

__device__ __forceinline__ float activate(moefy_router_activation activation, float z) {
  switch (activation) {
    case MOEFY_ROUTER_ACTIVATION_ABS: return fabsf(z);
    case MOEFY_ROUTER_ACTIVATION_RELU: return fmaxf(z, 0.0f);
    case MOEFY_ROUTER_ACTIVATION_TANH: return tanhf(z);
    default: return 1.0f / (1.0f + expf(-z));
  }
}

__device__ __forceinline__ moefy_router_activation first_activation(moefy_router_kind kind) {
  switch (kind) {
    case MOEFY_ROUTER_LINEAR: return MOEFY_ROUTER_ACTIVATION_ABS;
    case MOEFY_ROUTER_MOEFICATION: return MOEFY_ROUTER_ACTIVATION_TANH;
    default: return MOEFY_ROUTER_ACTIVATION_RELU;
  }
}

__device__ __forceinline__ moefy_router_activation second_activation(moefy_router_kind kind) {
  return kind == MOEFY_ROUTER_D2DMOE ? MOEFY_ROUTER_ACTIVATION_ABS : MOEFY_ROUTER_ACTIVATION_SIGMOID;
}

__device__ __forceinline__ bool has_unit_norm(moefy_router_kind kind) {
  return kind == MOEFY_ROUTER_MOEFICATION || kind == MOEFY_ROUTER_CENTROID;
}

__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
  return sum_of_squares > 0 ? 1.0f / sqrtf(sum_of_squares) : 0.0f;
}

/// Outputs of a router's first layer.
__device__ __forceinline__ uint32_t first_width(const moefy_router_select_params& p) {
  return p.w2 == nullptr ? p.num_experts : p.hidden;
}

/// Four threads share a dot product, 8 inputs at a time.
constexpr uint32_t kSecondDepth = 128;
/// Elements from one token's inputs to the next in shared memory, zeros at the end.
__host__ __device__ constexpr uint32_t padded_first(uint32_t width) {
  return (width + kSecondDepth - 1) / kSecondDepth * kSecondDepth;
}

/// Brings what the first layer gave for some tokens to shared memory.
__device__ __forceinline__ void load_first(const moefy_router_select_params& p, uint32_t token0, uint32_t num_tokens,
                                           float* in) {
  const uint32_t width = first_width(p), stride = padded_first(width);
  const float* first = p.first + static_cast<uint64_t>(token0) * width;
  for (uint32_t i = threadIdx.x * 4; i < num_tokens * stride; i += blockDim.x * 4) {
    const uint32_t token = i / stride, k = i % stride;
    float4 v = {};
    // Widths of hidden layers are multiples of 8 here, numbers of experts may be anything.
    if (width % 4 == 0) {
      if (k < width) v = __ldcg(reinterpret_cast<const float4*>(first + token * width + k));
    } else {
      const float* row = first + token * width;
      if (k < width) v.x = __ldcg(row + k);
      if (k + 1 < width) v.y = __ldcg(row + k + 1);
      if (k + 2 < width) v.z = __ldcg(row + k + 2);
      if (k + 3 < width) v.w = __ldcg(row + k + 3);
    }
    *reinterpret_cast<float4*>(in + i) = v;
  }
}

/// scores[t, e] = activation(<w2[e], in[t]>) of so many experts, by a block; w2 may lie in global or in shared memory.
template <class T>
__device__ __forceinline__ void second_layer(const moefy_router_select_params& p, const T* w2, uint32_t num_experts,
                                             const float* in, uint32_t num_tokens, float* scores) {
  const uint32_t stride = padded_first(p.hidden);
#pragma unroll 1
  for (uint32_t first = 0; first < p.hidden; first += kSecondDepth) {
#pragma unroll 1
    for (uint32_t e = threadIdx.x / 4; e < num_experts; e += blockDim.x / 4) {
      Eight<T> rows[4];
      float w[4][8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Beyond the end of a row `in` is 0: any number will do.
        const uint32_t k = first + (threadIdx.x % 4 + i * 4) * 8;
        rows[i].load_anywhere(w2 + static_cast<uint64_t>(e) * p.hidden + (k < p.hidden ? k : 0));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i].to_floats(w[i]);
#pragma unroll 1
      for (uint32_t token = 0; token < num_tokens; ++token) {
        const float4* from = reinterpret_cast<const float4*>(in + token * stride + first) + threadIdx.x % 4 * 2;
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 a = from[i * 8], b = from[i * 8 + 1];
          sums[i] = w[i][0] * a.x;
          sums[i] = fmaf(w[i][1], a.y, sums[i]);
          sums[i] = fmaf(w[i][2], a.z, sums[i]);
          sums[i] = fmaf(w[i][3], a.w, sums[i]);
          sums[i] = fmaf(w[i][4], b.x, sums[i]);
          sums[i] = fmaf(w[i][5], b.y, sums[i]);
          sums[i] = fmaf(w[i][6], b.z, sums[i]);
          sums[i] = fmaf(w[i][7], b.w, sums[i]);
        }
        float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const uint32_t quad = 0xfu << (threadIdx.x % 32 / 4 * 4);
        sum += __shfl_xor_sync(quad, sum, 1);
        sum += __shfl_xor_sync(quad, sum, 2);
        if (threadIdx.x % 4 == 0) {
          float* at = scores + token * num_experts + e;
          if (first > 0) sum += *at;
          const bool is_last = first + kSecondDepth >= p.hidden;
          *at = is_last ? activate(second_activation(p.kind), sum) : sum;
        }
      }
    }
  }
}

/// Selects by a block, from the keys of a row and the largest of them. `selection` is the same row for one warp.
__device__ __forceinline__ void select_by_block(const moefy_router_select_params& p, uint32_t token, bool valid,
                                                const RowSelection& selection, uint32_t max_key, uint32_t* count) {
  const moefy_selection& rule = p.selection;
  if (const uint32_t least = plain_threshold(rule, p.num_experts, max_key)) {
    for (uint32_t e = threadIdx.x; e < round_up_32(p.num_experts); e += blockDim.x) {
      const uint32_t word = __ballot_sync(kFullWarp, selection.keys[e] >= least);
      if (lane_id() == 0) {
        selection.mask[e / 32] = word;
        atomicAdd(count, __popc(word));
      }
    }
  } else if (threadIdx.x < 32) {
    const bool selected = selection.run(rule);
    __syncwarp();
    uint32_t own = 0;
    for (uint32_t w = lane_id(); w < round_up_32(p.num_experts) / 32; w += 32) own += __popc(selection.mask[w]);
    own = __reduce_add_sync(kFullWarp, own);
    if (lane_id() == 0) {
      *count = own;
      if (!selected && valid && p.status != nullptr) atomicOr(p.status, MOEFY_STATUS_ROW_WITHOUT_SCORE);
    }
  }
  if (p.counts == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) p.counts[token] = *count;
}

}  // namespace moefy
