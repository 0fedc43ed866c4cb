// Programmatic dependent launch: a kernel may begin while the one before it in the stream still runs. Every kernel is
// launched so, and therefore every kernel waits.
#pragma once

namespace moefy {

/// Lets the next kernel of the stream begin as soon as there is room for it.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until every kernel before this one has ended and what they wrote is visible. Only weights may be read earlier; and
/// through the second-level cache, by the copy engine, what had been written before the kernel ahead let this one begin, if that
/// one had waited first.
__device__ __forceinline__ void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// What a kernel with nothing to do before its inputs are there begins with.
__device__ __forceinline__ void begin() {
  launch_dependents();
  wait_for_dependencies();
}

/// Asks for the 128 bytes around an address to be brought into the second-level cache.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace moefy
