// cp.async: copies from global to shared memory that the thread does not wait for. A copy is complete for the
// thread that made it after wait_async covers its group, and for others after a barrier that follows.
#pragma once

#include "device/shared.cuh"

namespace hk {

// 16 bytes to element i of `to`, past L1; zeros when not `valid` (`from` is then not read).
__device__ __forceinline__ void copy_async_16(const Shared<uint16_t>& to, int i, const void* from, bool valid,
                                              At at = here()) {
#ifdef HK_SIM
  sim::async_copy(to.memory, to.byte(i, 16, "cp.async", at), from, 16, valid ? 16 : 0, at);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.data + i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// What was copied since the last commit becomes one group.
__device__ __forceinline__ void commit_async() {
#ifdef HK_SIM
  sim::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All but the last kLeft groups are complete.
template <int kLeft>
__device__ __forceinline__ void wait_async() {
#ifdef HK_SIM
  sim::async_wait(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace hk
