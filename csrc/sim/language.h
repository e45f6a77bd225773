// The CUDA language as far as csrc/device and csrc/ops use it, for a host compiler. A kernel becomes a plain
// function, its threads fibres (fibre.h) that see their indices through the globals below.
#pragma once

#include <math.h>
#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};

using cudaStream_t = void*;

// Set by the scheduler before a fibre runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
