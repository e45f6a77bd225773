// Messages, dtype names and the shape checks that every launcher shares.
#include "cpu/status.h"

#include <cstdarg>
#include <cstdio>

#include "cpu/level.h"
#ifdef HK_SIM
#include "sim/memory.h"
#endif

namespace hk {

static thread_local char last_error[512] = "";

int fail(hk_status code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return code;
}

const char* dtype_name(int32_t dtype) {
  static const char* const names[] = {"u8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64"};
  return dtype >= HK_U8 && dtype <= HK_F64 ? names[dtype] : "unknown dtype";
}

int64_t dtype_size(int32_t dtype) {
  static const int64_t sizes[] = {1, 2, 4, 8, 2, 2, 4, 8};
  return dtype >= HK_U8 && dtype <= HK_F64 ? sizes[dtype] : 0;
}

int check_exec(const char* op, const hk_exec* exec) {
#ifdef HK_SIM
  sim::forget_tensors();
#endif
  HK_REQUIRE(exec != nullptr, "%s: exec is NULL, expected an hk_exec", op);
  HK_REQUIRE(exec->device == HK_CPU || exec->device == HK_CUDA,
             "%s: exec has device %d, expected HK_CPU (0) or HK_CUDA (1)", op, exec->device);
  HK_REQUIRE(exec->device != HK_CPU || exec->num_threads >= 1, "%s: exec has num_threads %d, expected at least 1", op,
             exec->num_threads);
  return HK_OK;
}

int check_cpu(const char* op, const hk_exec* exec) {
  HK_RETURN_IF_ERROR(check_exec(op, exec));
  if (exec->device != HK_CPU)
    return fail(HK_UNSUPPORTED, "%s: exec has device cuda, expected cpu: it has no CUDA kernel", op);
  return check_cpu_level(op);
}

int check_device(const char* op, const hk_exec* exec) {
  HK_RETURN_IF_ERROR(check_exec(op, exec));
  if (exec->device == HK_CPU) return check_cpu_level(op);
#ifdef HK_WITH_CUDA
  return HK_OK;
#else
  return fail(HK_UNSUPPORTED, "%s: exec has device cuda, expected cpu: %s", op, hk_cuda_absent_reason());
#endif
}

int check_tensor(const char* op, const char* name, const hk_tensor* t, int ndim) {
  HK_REQUIRE(t != nullptr, "%s: %s is NULL, expected a tensor", op, name);
  HK_REQUIRE(t->ndim == ndim, "%s: %s has %d dimensions, expected %d", op, name, t->ndim, ndim);
  int64_t numel = 1;
  for (int d = 0; d < ndim; ++d) {
    HK_REQUIRE(t->shape[d] >= 0, "%s: %s has size %lld in dimension %d, expected at least 0", op, name,
               (long long)t->shape[d], d);
    numel *= t->shape[d];
  }
  HK_REQUIRE(numel == 0 || t->data != nullptr, "%s: %s has no data, expected %lld elements", op, name,
             (long long)numel);
#ifdef HK_SIM
  sim::register_tensor(name, *t);
#endif
  return HK_OK;
}

int check_shape(const char* op, const char* name, const hk_tensor* t, int dim, int64_t expected, const char* letter) {
  HK_REQUIRE(t->shape[dim] == expected, "%s: %s has size %lld in dimension %d, expected %s=%lld", op, name,
             (long long)t->shape[dim], dim, letter, (long long)expected);
  return HK_OK;
}

int check_dense(const char* op, const char* name, const hk_tensor* t, int inner) {
  for (int d = 0; d < t->ndim; ++d)
    if (t->shape[d] == 0) return HK_OK;
  int64_t expected = 1;
  for (int d = t->ndim - 1; d >= t->ndim - inner; --d) {
    HK_REQUIRE(t->shape[d] <= 1 || t->stride[d] == expected,
               "%s: %s has stride %lld in dimension %d, expected %lld (dense rows)", op, name, (long long)t->stride[d],
               d, (long long)expected);
    expected *= t->shape[d];
  }
  return HK_OK;
}

int check_float(const char* op, const char* name, const hk_tensor* t) {
  HK_REQUIRE(t->dtype == HK_F32 || t->dtype == HK_BF16 || t->dtype == HK_F16,
             "%s: %s has dtype %s, expected f32, bf16 or f16", op, name, dtype_name(t->dtype));
  return HK_OK;
}

int check_dtype(const char* op, const char* name, const hk_tensor* t, int32_t dtype) {
  HK_REQUIRE(t->dtype == dtype, "%s: %s has dtype %s, expected %s", op, name, dtype_name(t->dtype), dtype_name(dtype));
  return HK_OK;
}

int check_like(const char* op, const char* name, const hk_tensor* t, int32_t dtype, int ndim, const int64_t* shape,
               const char* letters, int inner) {
  HK_RETURN_IF_ERROR(check_tensor(op, name, t, ndim));
  HK_RETURN_IF_ERROR(check_dtype(op, name, t, dtype));
  for (int d = 0; d < ndim; ++d) {
    const char letter[] = {letters[d], 0};
    HK_RETURN_IF_ERROR(check_shape(op, name, t, d, shape[d], letter));
  }
  return check_dense(op, name, t, inner);
}

}  // namespace hk

extern "C" const char* hk_last_error(void) {
  return hk::last_error;
}
