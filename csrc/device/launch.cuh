// What every launcher does around <<<>>>: report what the runtime refused, and ask for the device's size.
#pragma once

#include <cuda_runtime.h>

#include "cpu/status.h"

namespace hk {

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

}  // namespace hk
