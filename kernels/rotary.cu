// The op `rotary`: turns the halves of queries and keys by their token's position, in place. A thread a pair of elements.
#include "activation.cuh"
#include "dependency.cuh"

namespace moefy {
namespace {

template <class T>
__device__ __forceinline__ void rotary(const moefy_rotary_params& p) {
  const uint32_t half = p.d_head / 2;
  const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  begin();
  const uint64_t token = i / (static_cast<uint64_t>(p.num_heads) * half);
  if (token >= p.num_tokens) return;
  const uint32_t in_token = i % (static_cast<uint64_t>(p.num_heads) * half), pair = in_token % half;
  // The base to the power of -2 pair / d_head; the angle in double precision, because a position has many turns.
  const double rate = exp2(-static_cast<double>(pair) / half * p.log2_base);
  double turns = p.position_ids[token] * rate * 0.15915494309189535;
  turns -= floor(turns);
  float sine, cosine;
  sincospif(static_cast<float>(2.0 * turns), &sine, &cosine);
  T* x = static_cast<T*>(p.x) + token * p.stride + in_token / half * p.d_head + pair;
  const float first = to_float(x[0]), second = to_float(x[half]);
  x[0] = from_float<T>(first * cosine - second * sine);
  x[half] = from_float<T>(second * cosine + first * sine);
}

}  // namespace
}  // namespace moefy

#define MOEFY_ROTARY(name, type)                                           \
  extern "C" __global__ void __launch_bounds__(256)                        \
      moefy_rotary_##name(const __grid_constant__ moefy_rotary_params p) { \
    moefy::rotary<type>(p);                                                \
  }

MOEFY_ROTARY(f32, float)
MOEFY_ROTARY(f16, __half)
MOEFY_ROTARY(bf16, __nv_bfloat16)
