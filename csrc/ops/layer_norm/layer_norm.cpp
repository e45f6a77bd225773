// layer_norm: the C ABI. Checks, then the CPU kernels.
#include "ops/layer_norm/layer_norm.h"

#include "cpu/status.h"

using namespace hk;

extern "C" int hk_layer_norm(const hk_exec* exec, const hk_tensor* x, const hk_tensor* residual,
                             const hk_tensor* weight, const hk_tensor* bias, const hk_tensor* y,
                             const hk_tensor* summed, const hk_tensor* mean, const hk_tensor* rstd, double eps) {
  const char* op = "layer_norm";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "x", x, 2));
  HK_RETURN_IF_ERROR(check_float(op, "x", x));
  HK_RETURN_IF_ERROR(check_dense(op, "x", x, 1));
  const int64_t *rows = x->shape, *row = x->shape + 1;
  HK_REQUIRE(*row >= 1, "%s: x has E=0, expected at least 1 value a row", op);
  HK_REQUIRE(eps >= 0, "%s: eps has value %g, expected at least 0", op, eps);
  HK_REQUIRE((residual == nullptr) == (summed == nullptr),
             "%s: only one of residual and summed is given, expected both or neither", op);
  if (residual != nullptr) {
    HK_RETURN_IF_ERROR(check_like(op, "residual", residual, x->dtype, 2, rows, "NE", 1));
    HK_RETURN_IF_ERROR(check_like(op, "summed", summed, x->dtype, 2, rows, "NE", 1));
  }
  HK_RETURN_IF_ERROR(check_tensor(op, "weight", weight, 1));
  HK_RETURN_IF_ERROR(check_float(op, "weight", weight));
  HK_RETURN_IF_ERROR(check_like(op, "weight", weight, weight->dtype, 1, row, "E", 1));
  HK_RETURN_IF_ERROR(check_like(op, "bias", bias, weight->dtype, 1, row, "E", 1));
  HK_RETURN_IF_ERROR(check_like(op, "y", y, x->dtype, 2, rows, "NE", 1));
  HK_RETURN_IF_ERROR(check_like(op, "mean", mean, HK_F32, 1, rows, "N", 1));
  HK_RETURN_IF_ERROR(check_like(op, "rstd", rstd, HK_F32, 1, rows, "N", 1));

  LayerNormArgs args = {};
  args.x = x->data;
  args.residual = residual ? residual->data : nullptr;
  args.weight = weight->data;
  args.bias = bias->data;
  args.y = y->data;
  args.summed = summed ? summed->data : nullptr;
  args.mean = static_cast<float*>(mean->data);
  args.rstd = static_cast<float*>(rstd->data);
  args.dtype = x->dtype;
  args.weight_dtype = weight->dtype;
  args.N = rows[0];
  args.E = rows[1];
  args.x_stride = x->stride[0];
  args.residual_stride = residual ? residual->stride[0] : 0;
  args.y_stride = y->stride[0];
  args.summed_stride = summed ? summed->stride[0] : 0;
  args.eps = static_cast<float>(eps);
  args.num_threads = threads_for(exec, args.N * args.E * dtype_size(x->dtype));
  return HK_DISPATCH(layer_norm, args);
}

extern "C" int hk_layer_norm_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* grad_summed,
                                      const hk_tensor* summed, const hk_tensor* weight, const hk_tensor* mean,
                                      const hk_tensor* rstd, const hk_tensor* grad_x, const hk_tensor* grad_weight,
                                      const hk_tensor* grad_bias, const hk_tensor* partial) {
  const char* op = "layer_norm_backward";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_tensor(op, "summed", summed, 2));
  HK_RETURN_IF_ERROR(check_float(op, "summed", summed));
  HK_RETURN_IF_ERROR(check_dense(op, "summed", summed, 1));
  const int64_t *rows = summed->shape, *row = summed->shape + 1;
  HK_RETURN_IF_ERROR(check_like(op, "grad", grad, summed->dtype, 2, rows, "NE", 1));
  if (grad_summed != nullptr)
    HK_RETURN_IF_ERROR(check_like(op, "grad_summed", grad_summed, summed->dtype, 2, rows, "NE", 1));
  HK_RETURN_IF_ERROR(check_tensor(op, "weight", weight, 1));
  HK_RETURN_IF_ERROR(check_float(op, "weight", weight));
  HK_RETURN_IF_ERROR(check_like(op, "weight", weight, weight->dtype, 1, row, "E", 1));
  HK_RETURN_IF_ERROR(check_like(op, "mean", mean, HK_F32, 1, rows, "N", 1));
  HK_RETURN_IF_ERROR(check_like(op, "rstd", rstd, HK_F32, 1, rows, "N", 1));
  HK_RETURN_IF_ERROR(check_like(op, "grad_x", grad_x, summed->dtype, 2, rows, "NE", 1));
  HK_RETURN_IF_ERROR(check_like(op, "grad_weight", grad_weight, weight->dtype, 1, row, "E", 1));
  HK_RETURN_IF_ERROR(check_like(op, "grad_bias", grad_bias, weight->dtype, 1, row, "E", 1));
  HK_RETURN_IF_ERROR(check_tensor(op, "partial", partial, 3));
  const int64_t sums[] = {partial->shape[0], 2, *row};
  HK_RETURN_IF_ERROR(check_like(op, "partial", partial, HK_F32, 3, sums, "B2E", 3));
  HK_REQUIRE(sums[0] >= 1, "%s: partial has B=0, expected at least 1", op);

  LayerNormBackwardArgs args = {};
  args.grad = grad->data;
  args.grad_summed = grad_summed ? grad_summed->data : nullptr;
  args.summed = summed->data;
  args.weight = weight->data;
  args.mean = static_cast<const float*>(mean->data);
  args.rstd = static_cast<const float*>(rstd->data);
  args.grad_x = grad_x->data;
  args.grad_weight = grad_weight->data;
  args.grad_bias = grad_bias->data;
  args.partial = static_cast<float*>(partial->data);
  args.dtype = summed->dtype;
  args.weight_dtype = weight->dtype;
  args.N = rows[0];
  args.E = rows[1];
  args.B = sums[0];
  args.grad_stride = grad->stride[0];
  args.grad_summed_stride = grad_summed ? grad_summed->stride[0] : 0;
  args.summed_stride = summed->stride[0];
  args.grad_x_stride = grad_x->stride[0];
  args.num_threads = threads_for(exec, args.N * args.E * dtype_size(summed->dtype));
  return HK_DISPATCH(layer_norm_backward, args);
}
