// Sums over a warp, and the block barrier. Kernels call these, never the intrinsics: a build for the
// host replaces this file's bodies and nothing else.
#pragma once

#include <stdint.h>

namespace hk {

constexpr int kWarpSize = 32;

__device__ __forceinline__ void block_barrier() {
  __syncthreads();
}

// The sum over all 32 lanes, in every lane. All lanes must call. Integers are exact; floats add in the
// order of a butterfly, the same at every call.
__device__ __forceinline__ uint32_t warp_sum(uint32_t x) {
  return __reduce_add_sync(0xffffffffu, x);
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(x), offset);
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace hk
