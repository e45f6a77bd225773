// What threads of a warp or block do together: barriers, shuffles, sums. Kernels call these, never the
// intrinsics, so that the simulator can stand in. All lanes of a warp must call.
#pragma once

#include <stdint.h>

#include "device/at.cuh"
#ifdef HK_SIM
#include <string.h>

#include "sim/block.h"
#endif

namespace hk {

constexpr int kWarpSize = 32;

__device__ __forceinline__ void block_barrier(At at = here()) {
#ifdef HK_SIM
  sim::block_barrier(at);
#else
  __syncthreads();
#endif
}

// Orders shared memory among the lanes.
__device__ __forceinline__ void warp_barrier(At at = here()) {
#ifdef HK_SIM
  sim::warp_barrier(at);
#else
  __syncwarp();
#endif
}

// x of lane `lane ^ mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int mask, At at = here()) {
#ifdef HK_SIM
  T y;
  memcpy(&y, sim::exchange("shuffle_xor", &x, sizeof x, nullptr, at)[(threadIdx.x % kWarpSize) ^ mask].bytes, sizeof y);
  return y;
#else
  return __shfl_xor_sync(0xffffffffu, x, mask);
#endif
}

// x of lane `lane`.
template <class T>
__device__ __forceinline__ T shuffle(T x, int lane, At at = here()) {
#ifdef HK_SIM
  T y;
  memcpy(&y, sim::exchange("shuffle", &x, sizeof x, nullptr, at)[lane].bytes, sizeof y);
  return y;
#else
  return __shfl_sync(0xffffffffu, x, lane);
#endif
}

// Bit l: the predicate of lane l.
__device__ __forceinline__ uint32_t ballot(bool predicate, At at = here()) {
#ifdef HK_SIM
  const sim::Slot* slots = sim::exchange("ballot", &predicate, sizeof predicate, nullptr, at);
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) bits |= static_cast<uint32_t>(slots[lane].bytes[0]) << lane;
  return bits;
#else
  return __ballot_sync(0xffffffffu, predicate);
#endif
}

__device__ __forceinline__ int count_bits(uint32_t x) {
#ifdef HK_SIM
  return __builtin_popcount(x);
#else
  return __popc(x);
#endif
}

struct Add {
  template <class T>
  __device__ static T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ static T of(T a, T b) {
    return a > b ? a : b;
  }
};

// Over groups of kLanes adjacent lanes, in every lane. Floats combine in the order of a butterfly: the same
// at every call, and the same bits in every lane.
template <class Operation, int kLanes = kWarpSize, class T>
__device__ __forceinline__ T warp_reduce(T x, At at = here()) {
#ifdef HK_SIM
  const auto combine = [](sim::Slot* slots) {
    T values[kWarpSize], next[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) memcpy(&values[lane], slots[lane].bytes, sizeof(T));
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      for (int lane = 0; lane < kWarpSize; ++lane) next[lane] = Operation::of(values[lane], values[lane ^ offset]);
      memcpy(values, next, sizeof values);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) memcpy(slots[lane].bytes, &values[lane], sizeof(T));
  };
  memcpy(&x, sim::exchange("warp_reduce", &x, sizeof x, combine, at)[threadIdx.x % kWarpSize].bytes, sizeof x);
  return x;
#else
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = Operation::of(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
#endif
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t x, At at = here()) {
#ifdef HK_SIM
  return warp_reduce<Add>(x, at);
#else
  (void)at;
  return __reduce_add_sync(0xffffffffu, x);
#endif
}
__device__ __forceinline__ uint64_t warp_sum(uint64_t x, At at = here()) {
  return warp_reduce<Add>(static_cast<unsigned long long>(x), at);
}
__device__ __forceinline__ float warp_sum(float x, At at = here()) {
  return warp_reduce<Add>(x, at);
}

}  // namespace hk
