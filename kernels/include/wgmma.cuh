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

#define MOEFY_WGMMA_32(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[16], uint64_t a, uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
        "}, %16, %17, adds, 1, 1, 0, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  }

#define MOEFY_WGMMA_64(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[32], uint64_t a, uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
        "}, %32, %33, adds, 1, 1, 0, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
          "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
          "+f"(c[30]), "+f"(c[31]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  }

#define MOEFY_WGMMA_128(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[64], uint64_t a, uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
        "}, %64, %65, adds, 1, 1, 0, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
          "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
          "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), \
          "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), \
          "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), \
          "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), \
          "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  }

#define MOEFY_WGMMA_256(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[128], uint64_t a, uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
        "}, %128, %129, adds, 1, 1, 0, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
          "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
          "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), \
          "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), \
          "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), \
          "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), \
          "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), "+f"(c[64]), "+f"(c[65]), \
          "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), \
          "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), \
          "+f"(c[78]), "+f"(c[79]), "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), \
          "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), "+f"(c[88]), "+f"(c[89]), \
          "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), \
          "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), \
          "+f"(c[102]), "+f"(c[103]), "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), \
          "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), "+f"(c[112]), "+f"(c[113]), \
          "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), \
          "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), \
          "+f"(c[126]), "+f"(c[127]) \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds))); \
  }

#define MOEFY_WGMMA_REGISTERS_64(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[32], const uint32_t (&a)[4], uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
        "}, {%32, %33, %34, %35}, %36, adds, 1, 1, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
          "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
          "+f"(c[30]), "+f"(c[31]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))); \
  }

#define MOEFY_WGMMA_REGISTERS_128(type, name, by_columns) \
  template <> \
  __device__ __forceinline__ void wgmma<type, by_columns>(float (&c)[64], const uint32_t (&a)[4], uint64_t b, bool adds) { \
    asm volatile( \
        "{.reg .pred adds; setp.ne.b32 adds, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
        "}, {%64, %65, %66, %67}, %68, adds, 1, 1, " #by_columns ";}" \
        : \
          "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), \
          "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), \
          "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), \
          "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), \
          "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), \
          "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), \
          "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), \
          "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), \
          "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds))); \
  }

MOEFY_WGMMA_32(__half, "f16", 0)
MOEFY_WGMMA_32(__nv_bfloat16, "bf16", 0)
MOEFY_WGMMA_64(__half, "f16", 0)
MOEFY_WGMMA_64(__nv_bfloat16, "bf16", 0)
MOEFY_WGMMA_64(__half, "f16", 1)
MOEFY_WGMMA_64(__nv_bfloat16, "bf16", 1)
MOEFY_WGMMA_128(__half, "f16", 0)
MOEFY_WGMMA_128(__nv_bfloat16, "bf16", 0)
MOEFY_WGMMA_256(__half, "f16", 0)
MOEFY_WGMMA_256(__nv_bfloat16, "bf16", 0)
MOEFY_WGMMA_256(__half, "f16", 1)
MOEFY_WGMMA_256(__nv_bfloat16, "bf16", 1)
MOEFY_WGMMA_128(__half, "f16", 1)
MOEFY_WGMMA_128(__nv_bfloat16, "bf16", 1)
MOEFY_WGMMA_REGISTERS_64(__half, "f16", 1)
MOEFY_WGMMA_REGISTERS_64(__nv_bfloat16, "bf16", 1)
MOEFY_WGMMA_REGISTERS_128(__half, "f16", 1)
MOEFY_WGMMA_REGISTERS_128(__nv_bfloat16, "bf16", 1)

}  // namespace moefy
