// What every launcher does: launch on the caller's stream, report what the runtime refused, and ask for the
// device's size. No allocation, no sync.
#pragma once

#include "cpu/status.h"
#include "device/at.cuh"
#ifdef HK_SIM
#include "sim/block.h"
#else
#include <cuda_runtime.h>
#endif

namespace hk {

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

// A value for a generic lambda to make a template argument of.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

#ifdef HK_SIM

template <auto kKernel, class... Args>
void launch(dim3 grid, int64_t threads, size_t shared_bytes, cudaStream_t, Args... args) {
  sim::run_grid(__PRETTY_FUNCTION__, grid, dim3(static_cast<unsigned>(threads)), shared_bytes,
                [&] { kKernel(args...); });
}

inline int launch_status(const char* op) {
  const char* report = sim::take_fault();
  return *report == '\0' ? HK_OK : fail(HK_DEVICE_ERROR, "%s: %s", op, report);
}

inline int multiprocessors(const char*, int* count) {
  *count = sim::kMultiprocessors;
  return HK_OK;
}

#else

template <auto kKernel, class... Args>
void launch(dim3 grid, int64_t threads, size_t shared_bytes, cudaStream_t stream, Args... args) {
  // Above 48 KB a kernel must be told; a refusal shows in launch_status.
  if (shared_bytes > 48 << 10)
    cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kKernel, args...);
}

// To be returned right after a launch. Asynchronous errors of the kernel itself surface at the caller's
// next synchronisation, as everywhere in CUDA.
inline int launch_status(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return HK_OK;
  return fail(HK_DEVICE_ERROR, "%s: the kernel launch has status %s (%s), expected cudaSuccess", op,
              cudaGetErrorName(error), cudaGetErrorString(error));
}

// Multiprocessors of the current device. A cached attribute: no sync.
inline int multiprocessors(const char* op, int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) return HK_OK;
  return fail(HK_DEVICE_ERROR, "%s: the current device has status %s (%s), expected cudaSuccess", op,
              cudaGetErrorName(error), cudaGetErrorString(error));
}

#endif

}  // namespace hk
