// The one way a launcher reports: a code, and a thread-local message of one format,
//   <op>: <argument> has <what came>, expected <what was expected>
#pragma once

#include "hulukern/hulukern.h"

namespace hk {

// Stores the printf-formatted text for hk_last_error() and returns `code`.
__attribute__((format(printf, 2, 3))) int fail(hk_status code, const char* format, ...);

// A kernel that could allocate no scratch says so by its status alone.
inline int with_memory(const char* op, int status) {
  return status == HK_OUT_OF_MEMORY ? fail(HK_OUT_OF_MEMORY, "%s: has no memory for its scratch, expected some", op)
                                    : status;
}

const char* dtype_name(int32_t dtype);
int64_t dtype_size(int32_t dtype);

// Each check returns from the calling launcher on failure.
#define HK_REQUIRE(condition, ...)                                       \
  do {                                                                   \
    if (!(condition)) return hk::fail(HK_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)

#define HK_RETURN_IF_ERROR(expression)              \
  do {                                              \
    if (int status_ = (expression)) return status_; \
  } while (0)

int check_exec(const char* op, const hk_exec* exec);
// For what has no CUDA kernel: exec must name the CPU, and the CPU level be usable.
int check_cpu(const char* op, const hk_exec* exec);
// What exec names must be built in, and the CPU level be usable.
int check_device(const char* op, const hk_exec* exec);
// Whether a call may look into its tensors: on CUDA that would stall the stream, unless it is simulated.
inline bool values_on_host(const hk_exec* exec) {
#ifdef HK_SIM
  return true;
#else
  return exec->device == HK_CPU;
#endif
}
int check_tensor(const char* op, const char* name, const hk_tensor* t, int ndim);
int check_shape(const char* op, const char* name, const hk_tensor* t, int dim, int64_t expected, const char* letter);
int check_float(const char* op, const char* name, const hk_tensor* t);
int check_dtype(const char* op, const char* name, const hk_tensor* t, int32_t dtype);
// A tensor of `ndim` dimensions whose sizes are `shape` and whose trailing `inner` ones are dense.
int check_like(const char* op, const char* name, const hk_tensor* t, int32_t dtype, int ndim, const int64_t* shape,
               const char* letters, int inner);
// The trailing `inner` dimensions must be dense (row-major, last stride 1).
int check_dense(const char* op, const char* name, const hk_tensor* t, int inner);

// Threads for work that touches `bytes`: one below 128 KB, which a core does in the 5 us a fork costs.
inline int32_t threads_for(const hk_exec* exec, int64_t bytes) {
  return bytes < (1 << 17) ? 1 : exec->num_threads;
}

}  // namespace hk
