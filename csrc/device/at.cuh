// Where in the source an access stands: what a fault report of the simulator names. Empty on a device.
#pragma once

#ifdef HK_SIM
#include "sim/language.h"
#else
#include <cuda_runtime.h>
#endif

namespace hk {

#ifdef HK_SIM
struct At {
  const char* file;
  int line;
};
constexpr At here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}
#else
struct At {};
__host__ __device__ constexpr At here() {
  return {};
}
#endif

}  // namespace hk
