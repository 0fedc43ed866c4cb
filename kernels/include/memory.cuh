// What most kernels share: tokens that are valid, and sixteen bytes at a time: loads, stores, asynchronous copies to shared
// memory, swizzled rows.
#pragma once

#include <stdint.h>

namespace moefy {

constexpr int kChunkBytes = 16;

// Tokens that are not padding.
template <class Params>
__device__ __forceinline__ uint32_t valid_tokens(const Params& p) {
  return p.num_valid_tokens == nullptr ? p.num_tokens : min(*p.num_valid_tokens, p.num_tokens);
}

// Loads of 16 bytes, or zeros. Written out, because a conditional load would become a branch, and one that waits for the load
// before it. `qualifier` and `clobbers` say what the compiler may not move them across.
#define MOEFY_LOAD_IF(name, load, qualifier, clobbers)                                                              \
  __device__ __forceinline__ uint4 name(bool valid, const void* address) {                                          \
    uint4 v;                                                                                                        \
    asm qualifier(                                                                                                  \
        "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"        \
        "@p ld.global" load ".v4.u32 {%0,%1,%2,%3}, [%4];}"                                                         \
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)                                                            \
        : "l"(address), "r"(static_cast<int>(valid))                                                                \
        : clobbers);                                                                                                \
    return v;                                                                                                       \
  }

/// Of weights.
MOEFY_LOAD_IF(load_vector_if, ".nc", , )
/// Of weights that nobody reads again.
MOEFY_LOAD_IF(load_streaming_if, ".nc.L1::no_allocate.L2::128B", volatile, )
/// Of what another kernel wrote a moment ago: past the first-level cache.
MOEFY_LOAD_IF(load_fresh_vector_if, ".cg", volatile, "memory")
/// Of that again and again: through the first-level cache.
MOEFY_LOAD_IF(load_cached_vector_if, "", volatile, "memory")

/// Loads 16 bytes that another kernel wrote a moment ago.
__device__ __forceinline__ uint4 load_fresh_vector(const void* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

/// Stores 16 bytes, or nothing. Written out, because the compiler makes four stores of what came from shuffles.
__device__ __forceinline__ void store_vector_if(bool exists, void* address, uint4 v) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0;\n@p st.global.v4.u32 [%0], {%1,%2,%3,%4};}" ::"l"(address), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<int>(exists))
               : "memory");
}

/// Gives up the 128 bytes that begin here, at a multiple of 128: nobody reads them before they are written again.
__device__ __forceinline__ void discard_line(const void* address) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(address) : "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_word(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint4 load_shared_vector(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

/// Copies 16 bytes to shared memory, or writes zeros there and reads nothing.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? kChunkBytes : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/// Copies 4 bytes to shared memory.
__device__ __forceinline__ void copy_async_word(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

/// Waits until at most `kPending` of the thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Byte offset of a 16-byte chunk in a tile of rows of `kRowBytes` (a multiple of 128): eight
/// consecutive rows keep the same chunk in different banks.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

}  // namespace moefy
