// Rows at and beyond num_valid_tokens, for what does not know of them itself.
#include "dependency.cuh"
#include "memory.cuh"
#include "moefy_abi.h"

extern "C" __global__ void __launch_bounds__(256)
    moefy_clear_invalid(const __grid_constant__ moefy_clear_invalid_params p) {
  moefy::begin();
  const uint64_t chunks = p.row_bytes / moefy::kChunkBytes;
  const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  uint64_t i = *p.num_valid_tokens * chunks + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i < p.num_tokens * chunks; i += step) static_cast<uint4*>(p.y)[i] = uint4{};
}

extern "C" __global__ void __launch_bounds__(256)
    moefy_split_valid(const __grid_constant__ moefy_split_valid_params p) {
  moefy::begin();
  const uint32_t valid = *p.num_valid_tokens;
  for (uint32_t chunk = threadIdx.x; chunk < p.num_chunks; chunk += blockDim.x) {
    const uint32_t before = chunk * p.chunk_tokens;
    p.of_chunk[chunk] = valid <= before ? 0 : min(valid - before, p.chunk_tokens);
  }
}
