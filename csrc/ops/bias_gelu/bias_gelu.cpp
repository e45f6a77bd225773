// bias_gelu: the C ABI. Checks, then the CPU kernels.
#include "ops/bias_gelu/bias_gelu.h"

#include "cpu/status.h"

namespace hk {

static int check_inputs(const char* op, const hk_tensor* x, const hk_tensor* bias, int32_t gelu) {
  HK_RETURN_IF_ERROR(check_tensor(op, "x", x, 2));
  HK_RETURN_IF_ERROR(check_float(op, "x", x));
  HK_RETURN_IF_ERROR(check_dense(op, "x", x, 1));
  if (bias != nullptr) HK_RETURN_IF_ERROR(check_like(op, "bias", bias, x->dtype, 1, x->shape + 1, "E", 1));
  HK_REQUIRE(gelu == HK_GELU_TANH || gelu == HK_GELU_ERF,
             "%s: gelu has value %d, expected HK_GELU_TANH (0) or HK_GELU_ERF (1)", op, gelu);
  return HK_OK;
}

}  // namespace hk

using namespace hk;

extern "C" int hk_bias_gelu(const hk_exec* exec, const hk_tensor* x, const hk_tensor* bias, const hk_tensor* out,
                            int32_t gelu) {
  const char* op = "bias_gelu";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_inputs(op, x, bias, gelu));
  HK_RETURN_IF_ERROR(check_like(op, "out", out, x->dtype, 2, x->shape, "NE", 1));
  BiasGeluArgs args = {};
  args.x = x->data;
  args.bias = bias ? bias->data : nullptr;
  args.out = out->data;
  args.dtype = x->dtype;
  args.gelu = gelu;
  args.N = x->shape[0];
  args.E = x->shape[1];
  args.x_stride = x->stride[0];
  args.out_stride = out->stride[0];
  args.num_threads = threads_for(exec, 2 * args.N * args.E * dtype_size(x->dtype));
  return HK_DISPATCH(bias_gelu, args);
}

extern "C" int hk_bias_gelu_backward(const hk_exec* exec, const hk_tensor* grad, const hk_tensor* x,
                                     const hk_tensor* bias, const hk_tensor* grad_x, const hk_tensor* grad_bias,
                                     const hk_tensor* partial, int32_t gelu) {
  const char* op = "bias_gelu_backward";
  HK_RETURN_IF_ERROR(check_device(op, exec));
  HK_RETURN_IF_ERROR(check_inputs(op, x, bias, gelu));
  HK_RETURN_IF_ERROR(check_like(op, "grad", grad, x->dtype, 2, x->shape, "NE", 1));
  HK_RETURN_IF_ERROR(check_like(op, "grad_x", grad_x, x->dtype, 2, x->shape, "NE", 1));
  BiasGeluBackwardArgs args = {};
  if (bias != nullptr) {
    HK_RETURN_IF_ERROR(check_like(op, "grad_bias", grad_bias, x->dtype, 1, x->shape + 1, "E", 1));
    HK_RETURN_IF_ERROR(check_tensor(op, "partial", partial, 2));
    const int64_t sums[] = {partial->shape[0], x->shape[1]};
    HK_RETURN_IF_ERROR(check_like(op, "partial", partial, HK_F32, 2, sums, "BE", 2));
    HK_REQUIRE(sums[0] >= 1, "%s: partial has B=0, expected at least 1", op);
    args.bias = bias->data;
    args.grad_bias = grad_bias->data;
    args.partial = static_cast<float*>(partial->data);
    args.B = sums[0];
  }
  args.grad = grad->data;
  args.x = x->data;
  args.grad_x = grad_x->data;
  args.dtype = x->dtype;
  args.gelu = gelu;
  args.N = x->shape[0];
  args.E = x->shape[1];
  args.grad_stride = grad->stride[0];
  args.x_stride = x->stride[0];
  args.grad_x_stride = grad_x->stride[0];
  args.num_threads = threads_for(exec, 2 * args.N * args.E * dtype_size(x->dtype));
  return HK_DISPATCH(bias_gelu_backward, args);
}
