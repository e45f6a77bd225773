// layer_norm on CUDA: picks packs of 16 bytes where every row allows them, else single elements, and launches.
#include "ops/layer_norm/layer_norm.cuh"

namespace hk {
namespace {

template <class T>
const unsigned char* bytes_of(const T* data) {
  return static_cast<const unsigned char*>(data);
}
unsigned char* bytes_of(void* data) {
  return static_cast<unsigned char*>(data);
}

}  // namespace

int layer_norm_cuda(const LayerNormArgs& args, void* stream_handle) {
  if (args.N == 0) return HK_OK;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = dtype_size(args.dtype);
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.x, args.x_stride, args.N, size).row(args.y, args.y_stride, args.N, size);
  alignment.row(args.residual, args.residual_stride, args.N, size);
  alignment.row(args.summed, args.summed_stride, args.N, size).row(args.weight, 0, 1, 1).row(args.bias, 0, 1, 1);
  LayerNormWalk walk = {bytes_of(args.x),
                        bytes_of(args.residual),
                        args.weight,
                        args.bias,
                        bytes_of(args.y),
                        bytes_of(args.summed),
                        args.mean,
                        args.rstd,
                        args.x_stride * size,
                        args.residual_stride * size,
                        args.y_stride * size,
                        args.summed_stride * size,
                        args.N,
                        0,
                        static_cast<int32_t>(args.E),
                        args.weight_dtype,
                        1.0f / static_cast<float>(args.E),
                        args.eps};
  with_row_kernel(args.dtype, alignment.packs(), args.E * size, [&](auto dtype, auto bytes, auto warps) {
    using Group = RowGroup<decltype(warps)::value>;
    walk.packs = static_cast<int32_t>(args.E * size / bytes.value);
    launch<layer_norm_forward<decltype(dtype)::value, decltype(bytes)::value, decltype(warps)::value>>(
        grid_of(ceil_div(args.N, Group::kRows)), Group::kThreads, 0, stream, walk);
  });
  return launch_status("layer_norm");
}

int layer_norm_backward_cuda(const LayerNormBackwardArgs& args, void* stream_handle) {
  const char* op = "layer_norm_backward";
  HK_REQUIRE(args.N <= INT32_MAX / 2, "%s: summed has N=%lld, expected at most 2^30 on CUDA", op,
             static_cast<long long>(args.N));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = dtype_size(args.dtype);
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.grad, args.grad_stride, args.N, size).row(args.weight, 0, 1, 1);
  alignment.row(args.grad_summed, args.grad_summed_stride, args.N, size);
  alignment.row(args.summed, args.summed_stride, args.N, size).row(args.grad_x, args.grad_x_stride, args.N, size);
  LayerNormBackwardWalk walk = {bytes_of(args.grad),
                                bytes_of(args.grad_summed),
                                bytes_of(args.summed),
                                args.weight,
                                args.mean,
                                args.rstd,
                                bytes_of(args.grad_x),
                                args.partial,
                                args.grad_stride * size,
                                args.grad_summed_stride * size,
                                args.summed_stride * size,
                                args.grad_x_stride * size,
                                static_cast<int32_t>(args.N),
                                static_cast<int32_t>(ceil_div(args.N, args.B)),
                                0,
                                static_cast<int32_t>(args.E),
                                args.weight_dtype,
                                1.0f / static_cast<float>(args.E)};
  with_row_kernel(args.dtype, alignment.packs(), 0, [&](auto dtype, auto bytes, auto) {
    constexpr int kDtype = decltype(dtype)::value, kBytes = decltype(bytes)::value;
    walk.packs = static_cast<int32_t>(args.E * size / kBytes);
    const dim3 grid = grid_of(args.B);
    if (walk.packs <= kBackwardThreads) {
      launch<layer_norm_backward<kDtype, kBytes, 1>>(grid, kBackwardThreads, 0, stream, walk);
    } else if (walk.packs <= 4 * kBackwardThreads) {
      launch<layer_norm_backward<kDtype, kBytes, 4>>(grid, kBackwardThreads, 0, stream, walk);
    } else {
      launch<layer_norm_backward<kDtype, kBytes, 0>>(grid, kBackwardThreads, 0, stream, walk);
      launch<layer_norm_columns<kDtype>>(grid_of(args.B, ceil_div(args.E, kBackwardThreads)), kBackwardThreads, 0,
                                         stream, walk);
    }
  });
  launch_sum_columns(args.partial, 2 * args.E, args.B, args.E, args.grad_weight, args.weight_dtype, stream);
  launch_sum_columns(args.partial + args.E, 2 * args.E, args.B, args.E, args.grad_bias, args.weight_dtype, stream);
  return launch_status(op);
}

}  // namespace hk
