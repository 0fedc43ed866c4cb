// The number formats of weights and activations, and the activations phi.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "moefy_abi.h"

namespace moefy {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

/// Rounds to nearest even.
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float activate(uint32_t activation, float z)
{
    switch (activation) {
    case MOEFY_RELU: return fmaxf(z, 0.0f);
    case MOEFY_GELU: return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case MOEFY_GELU_TANH: {
        const float inner = 0.79788456080286536f * (z + 0.044715f * z * z * z);
        return 0.5f * z * (1.0f + tanhf(inner));
    }
    case MOEFY_SILU: return z / (1.0f + expf(-z));
    default: return z;
    }
}

}  // namespace moefy
