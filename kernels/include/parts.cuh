// Numbers of 16 bits that stand for one of f32, so that tensor cores can multiply it.
#pragma once

#include "element.cuh"
#include "team.cuh"

namespace moefy {

/// Numbers of T that stand for one of f32.
template <class T>
struct Parts;

/// Three times eight bits are all that f32 has.
template <>
struct Parts<__nv_bfloat16> {
  static constexpr int kCount = 3;
  static constexpr bool kIsScaled = false;

  /// Takes off two numbers what one part holds of them. Nothing is left of what is not finite.
  static __device__ __forceinline__ uint32_t take(float& a, float& b) {
    const uint32_t word = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
    a = isfinite(a) ? a - __uint_as_float(word << 16) : 0.0f;
    b = isfinite(b) ? b - __uint_as_float(word & 0xffff0000u) : 0.0f;
    return word;
  }
};

/// Two roundings to eleven bits leave at most 2^-23 of a number. A token's largest one comes near the end of what f16 can
/// hold, so that what its smallest ones lose does not count.
template <>
struct Parts<__half> {
  static constexpr int kCount = 2;
  static constexpr bool kIsScaled = true;

  /// A power of two, from the bits of the largest magnitude.
  static __device__ __forceinline__ float scale(uint32_t largest) {
    const int exponent = max(static_cast<int>(largest >> 23) - 127, -100);
    return __uint_as_float(static_cast<uint32_t>(127 + 14 - exponent) << 23);
  }

  static __device__ __forceinline__ uint32_t take(float& a, float& b) {
    const __half2 part = __floats2half2_rn(a, b);
    a = isfinite(a) ? a - __low2float(part) : 0.0f;
    b = isfinite(b) ? b - __high2float(part) : 0.0f;
    uint32_t word;
    memcpy(&word, &part, sizeof(word));
    return word;
  }
};

}  // namespace moefy
