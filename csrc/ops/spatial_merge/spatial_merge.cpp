// spatial_merge: the C ABI. Checks, then the CPU kernels.
#include "ops/spatial_merge/spatial_merge.h"

#include "cpu/status.h"

namespace hk {

// x and keep; *kept becomes K.
static int check_cells(const char* op, const hk_exec* exec, const hk_tensor* x, const hk_tensor* keep,
                       int32_t merge_size, int64_t* kept) {
  HK_RETURN_IF_ERROR(check_tensor(op, "x", x, 2));
  HK_RETURN_IF_ERROR(check_float(op, "x", x));
  HK_RETURN_IF_ERROR(check_dense(op, "x", x, 1));
  HK_REQUIRE(merge_size >= 1 && merge_size <= 64, "%s: merge_size has value %d, expected 1 to 64", op, merge_size);
  const int64_t area = static_cast<int64_t>(merge_size) * merge_size;
  HK_REQUIRE(x->shape[0] % area == 0, "%s: x has N=%lld, expected a multiple of merge_size**2 = %lld", op,
             (long long)x->shape[0], (long long)area);
  HK_REQUIRE(x->shape[1] >= 1, "%s: x has E=0, expected at least 1 value a row", op);
  const int64_t cells = x->shape[0] / area;
  *kept = cells;
  if (keep == nullptr) return HK_OK;
  HK_RETURN_IF_ERROR(check_tensor(op, "keep", keep, 1));
  HK_RETURN_IF_ERROR(check_dtype(op, "keep", keep, HK_I64));
  HK_RETURN_IF_ERROR(check_dense(op, "keep", keep, 1));
  *kept = keep->shape[0];
  const int64_t* at = static_cast<const int64_t*>(keep->data);
  for (int64_t k = 0; values_on_host(exec) && k < *kept; ++k)
    HK_REQUIRE(at[k] >= 0 && at[k] < cells && (k == 0 || at[k] > at[k - 1]),
               "%s: keep has cell %lld at %lld, expected strictly increasing ones below N / merge_size**2 = %lld", op,
               (long long)at[k], (long long)k, (long long)cells);
  return HK_OK;
}

static int check_weight(const char* op, const hk_tensor* x, const hk_tensor* weight) {
  HK_RETURN_IF_ERROR(check_tensor(op, "weight", weight, 1));
  HK_RETURN_IF_ERROR(check_float(op, "weight", weight));
  return check_like(op, "weight", weight, weight->dtype, 1, x->shape + 1, "E", 1);
}

}  // namespace hk

using namespace hk;

extern "C" int hk_spatial_merge(const hk_exec* exec, const hk_tensor* x, const hk_tensor* weight, const hk_tensor* bias,
                                const hk_tensor* keep, const hk_tensor* out, const hk_tensor* mean,
                                const hk_tensor* rstd, int32_t merge_size, double eps) {
  const char* op = "spatial_merge";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  SpatialMergeArgs args = {};
  HK_RETURN_IF_ERROR(check_cells(op, exec, x, keep, merge_size, &args.K));
  HK_REQUIRE(eps >= 0, "%s: eps has value %g, expected at least 0", op, eps);
  HK_REQUIRE((weight == nullptr) == (bias == nullptr),
             "%s: only one of weight and bias is given, expected both or neither", op);
  args.area = static_cast<int64_t>(merge_size) * merge_size;
  const int64_t merged[] = {args.K, x->shape[1]}, statistics[] = {args.K, args.area};
  HK_RETURN_IF_ERROR(check_like(op, "out", out, x->dtype, 2, merged, "KE", 1));
  if (weight != nullptr) {
    HK_RETURN_IF_ERROR(check_weight(op, x, weight));
    HK_RETURN_IF_ERROR(check_like(op, "bias", bias, weight->dtype, 1, x->shape + 1, "E", 1));
    HK_RETURN_IF_ERROR(check_like(op, "mean", mean, HK_F32, 2, statistics, "Km", 2));
    HK_RETURN_IF_ERROR(check_like(op, "rstd", rstd, HK_F32, 2, statistics, "Km", 2));
    args.weight = weight->data;
    args.bias = bias->data;
    args.mean = static_cast<float*>(mean->data);
    args.rstd = static_cast<float*>(rstd->data);
    args.weight_dtype = weight->dtype;
  }
  args.x = x->data;
  args.keep = keep ? static_cast<const int64_t*>(keep->data) : nullptr;
  args.out = out->data;
  args.dtype = x->dtype;
  args.E = x->shape[1];
  args.x_stride = x->stride[0];
  args.out_stride = out->stride[0];
  args.eps = static_cast<float>(eps);
  args.num_threads = threads_for(exec, args.K * args.area * args.E * dtype_size(x->dtype));
  return HK_DISPATCH(spatial_merge, args);
}

extern "C" int hk_spatial_merge_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* x,
                                         const hk_tensor* weight, const hk_tensor* keep, const hk_tensor* mean,
                                         const hk_tensor* rstd, const hk_tensor* grad_x, const hk_tensor* grad_weight,
                                         const hk_tensor* grad_bias, const hk_tensor* partial, int32_t merge_size) {
  const char* op = "spatial_merge_backward";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  SpatialMergeBackwardArgs args = {};
  HK_RETURN_IF_ERROR(check_cells(op, exec, x, keep, merge_size, &args.K));
  args.area = static_cast<int64_t>(merge_size) * merge_size;
  const int64_t merged[] = {args.K, x->shape[1]}, statistics[] = {args.K, args.area};
  HK_RETURN_IF_ERROR(check_like(op, "grad", grad, x->dtype, 2, merged, "KE", 1));
  HK_RETURN_IF_ERROR(check_like(op, "grad_x", grad_x, x->dtype, 2, x->shape, "NE", 1));
  if (weight != nullptr) {
    HK_RETURN_IF_ERROR(check_weight(op, x, weight));
    HK_RETURN_IF_ERROR(check_like(op, "mean", mean, HK_F32, 2, statistics, "Km", 2));
    HK_RETURN_IF_ERROR(check_like(op, "rstd", rstd, HK_F32, 2, statistics, "Km", 2));
    HK_RETURN_IF_ERROR(check_like(op, "grad_weight", grad_weight, weight->dtype, 1, x->shape + 1, "E", 1));
    HK_RETURN_IF_ERROR(check_like(op, "grad_bias", grad_bias, weight->dtype, 1, x->shape + 1, "E", 1));
    HK_RETURN_IF_ERROR(check_tensor(op, "partial", partial, 3));
    const int64_t sums[] = {partial->shape[0], 2, x->shape[1]};
    HK_RETURN_IF_ERROR(check_like(op, "partial", partial, HK_F32, 3, sums, "B2E", 3));
    HK_REQUIRE(sums[0] >= 1, "%s: partial has B=0, expected at least 1", op);
    args.weight = weight->data;
    args.mean = static_cast<const float*>(mean->data);
    args.rstd = static_cast<const float*>(rstd->data);
    args.grad_weight = grad_weight->data;
    args.grad_bias = grad_bias->data;
    args.partial = static_cast<float*>(partial->data);
    args.weight_dtype = weight->dtype;
    args.B = sums[0];
  }
  // None kept is not all kept, though the data of an empty tensor is null.
  static const int64_t none = 0;
  args.grad = grad->data;
  args.x = x->data;
  args.keep = keep == nullptr ? nullptr : keep->shape[0] == 0 ? &none : static_cast<const int64_t*>(keep->data);
  args.grad_x = grad_x->data;
  args.dtype = x->dtype;
  args.cells = x->shape[0] / args.area;
  args.E = x->shape[1];
  args.grad_stride = grad->stride[0];
  args.x_stride = x->stride[0];
  args.grad_x_stride = grad_x->stride[0];
  args.num_threads = threads_for(exec, x->shape[0] * args.E * dtype_size(x->dtype));
  return HK_DISPATCH(spatial_merge_backward, args);
}
