// Hopper: products of a warpgroup straight from shared memory, and what feeds them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "bulk_copy.cuh"

namespace moefy {

// ---- operands ----

/// A tile of rows of 64 elements of the depth, 128 bytes each, swizzled as by `swizzled<128>`; it begins at a multiple of
/// 1024 bytes. 16 elements of the depth are 32 bytes further.
__device__ __forceinline__ uint64_t operand_of_rows(uint32_t address) {
  constexpr uint64_t kEightRows = 1024 / 16;
  return (1ull << 62) | (kEightRows << 32) | (1ull << 16) | ((address & 0x3ffff) >> 4);
}

/// A tile of blocks of 64 columns, `block_bytes` apart: rows of the depth, 128 bytes each, swizzled and aligned the same
/// way. 16 elements of the depth are 2048 bytes further.
__device__ __forceinline__ uint64_t operand_of_columns(uint32_t address, uint32_t block_bytes) {
  constexpr uint64_t kEightDepths = 1024 / 16;
  return (1ull << 62) | (kEightDepths << 32) | (static_cast<uint64_t>(block_bytes / 16) << 16) | ((address & 0x3ffff) >> 4);
}

/// An operand so many bytes further.
__device__ __forceinline__ uint64_t operand_after(uint64_t operand, uint32_t bytes) {
  return (operand >> 32 << 32) | (static_cast<uint32_t>(operand) + bytes / 16);
}

// ---- products ----

/// Before the first product of a tile, and after anything else has touched its sums.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until at most `kPending` groups of products are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// c[64 rows, 2 * kSums columns] = a b^T (+ c), 16 elements deep. Warp w of the group has rows 16 w and up: a lane those of
/// lane / 4 and 8 further, columns 8 j + lane % 4 * 2 and the next, in c[4 j] to c[4 j + 3]. `kByColumns`: of b.
template <class T, bool kByColumns, int kSums>
__device__ __forceinline__ void wgmma(float (&c)[kSums], uint64_t a, uint64_t b, bool adds);

/// The same with a in registers: of each of its fragments of 16 x 16 four words, as for `mma`.
template <class T, bool kByColumns, int kSums>
__device__ __forceinline__ void wgmma(float (&c)[kSums], const uint32_t (&a)[4], uint64_t b, bool adds);

// Sums as operands, and their numbers in the text.
#define MOEFY_SUMS_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define MOEFY_SUMS_8(i) MOEFY_SUMS_4(i), MOEFY_SUMS_4(i + 4)
#define MOEFY_SUMS_16(i) MOEFY_SUMS_4(i), MOEFY_SUMS_4(i + 4), MOEFY_SUMS_4(i + 8), MOEFY_SUMS_4(i + 12)
#define MOEFY_SUMS_32(i) MOEFY_SUMS_16(i), MOEFY_SUMS_16(i + 16)
#define MOEFY_SUMS_64(i) MOEFY_SUMS_32(i), MOEFY_SUMS_32(i + 32)
#define MOEFY_SUMS_96(i) MOEFY_SUMS_64(i), MOEFY_SUMS_32(i + 64)
#define MOEFY_SUMS_128(i) MOEFY_SUMS_64(i), MOEFY_SUMS_64(i + 64)
#define MOEFY_NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOEFY_NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MOEFY_NUMBERS_32 \
  MOEFY_NUMBERS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOEFY_NUMBERS_64 \
  MOEFY_NUMBERS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOEFY_NUMBERS_96 \
  MOEFY_NUMBERS_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MOEFY_NUMBERS_128 \
  MOEFY_NUMBERS_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Last the numbers of the other operands: of a, of b, and of whether it adds.
#define MOEFY_WGMMA_TEXT(name, columns, sums, by_columns, a, b, adds, transposed)                                     \
  "{.reg .pred adds; setp.ne.b32 adds, " adds ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name \
  " {" MOEFY_NUMBERS_##sums "}, " a ", " b ", adds, 1, 1, " transposed #by_columns ";}"

#define MOEFY_WGMMA_SHARED(type, name, columns, sums, by_columns, a_number, b_number, adds_number)                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[sums], uint64_t a, uint64_t b, bool adds) {     \
    asm volatile(MOEFY_WGMMA_TEXT(name, columns, sums, by_columns, a_number, b_number, adds_number, "0, ")           \
                 : MOEFY_SUMS_##sums(0)                                                                              \
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                                     \
  }

#define MOEFY_WGMMA_REGISTERS(type, name, columns, sums, by_columns, a_numbers, b_number, adds_number)               \
  template <>                                                                                                        \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[sums], const uint32_t (&a)[4], uint64_t b,      \
                                                          bool adds) {                                               \
    asm volatile(MOEFY_WGMMA_TEXT(name, columns, sums, by_columns, a_numbers, b_number, adds_number, "")             \
                 : MOEFY_SUMS_##sums(0)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));                 \
  }

#define MOEFY_WGMMA(type, name)                                                                   \
  MOEFY_WGMMA_SHARED(type, name, 16, 8, 0, "%8", "%9", "%10")                                     \
  MOEFY_WGMMA_SHARED(type, name, 32, 16, 0, "%16", "%17", "%18")                                  \
  MOEFY_WGMMA_SHARED(type, name, 64, 32, 0, "%32", "%33", "%34")                                  \
  MOEFY_WGMMA_SHARED(type, name, 64, 32, 1, "%32", "%33", "%34")                                  \
  MOEFY_WGMMA_SHARED(type, name, 128, 64, 0, "%64", "%65", "%66")                                 \
  MOEFY_WGMMA_SHARED(type, name, 128, 64, 1, "%64", "%65", "%66")                                 \
  MOEFY_WGMMA_SHARED(type, name, 192, 96, 1, "%96", "%97", "%98")                                 \
  MOEFY_WGMMA_SHARED(type, name, 256, 128, 0, "%128", "%129", "%130")                             \
  MOEFY_WGMMA_SHARED(type, name, 256, 128, 1, "%128", "%129", "%130")                             \
  MOEFY_WGMMA_REGISTERS(type, name, 64, 32, 1, "{%32, %33, %34, %35}", "%36", "%37")              \
  MOEFY_WGMMA_REGISTERS(type, name, 128, 64, 1, "{%64, %65, %66, %67}", "%68", "%69")

MOEFY_WGMMA(__half, "f16")
MOEFY_WGMMA(__nv_bfloat16, "bf16")

// ---- sums ----

/// Moves sums down that come after the first kUsed: a loop that does so is short, and unrolled it would wait for its
/// instructions.
template <int kUsed, int kSums>
__device__ __forceinline__ void move_down(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i + kUsed < kSums; ++i) sums[i] = sums[i + kUsed];
}

}  // namespace moefy
