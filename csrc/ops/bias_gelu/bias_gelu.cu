// bias_gelu on CUDA: picks packs of 16 bytes where every row allows them, and launches.
#include "ops/bias_gelu/bias_gelu.cuh"

namespace hk {
namespace {

constexpr int64_t kStretch = 16;  // rows a thread walks: its bias and set-up then cost little

template <bool kBackward>
void launch_rows(BiasGeluWalk walk, int32_t dtype, int32_t gelu, bool packs, cudaStream_t stream) {
  with_row_kernel(dtype, packs, 0, [&](auto of, auto bytes, auto) {
    constexpr int kDtype = decltype(of)::value, kBytes = decltype(bytes)::value;
    walk.packs = static_cast<int32_t>(walk.E * dtype_size(dtype) / kBytes);
    const dim3 grid = grid_of(ceil_div(walk.N, walk.stretch), ceil_div(walk.packs, kGeluThreads));
    if (gelu == HK_GELU_TANH)
      launch<bias_gelu_rows<kDtype, kBytes, true, kBackward>>(grid, kGeluThreads, 0, stream, walk);
    else
      launch<bias_gelu_rows<kDtype, kBytes, false, kBackward>>(grid, kGeluThreads, 0, stream, walk);
  });
}

const unsigned char* bytes_of(const void* data) {
  return static_cast<const unsigned char*>(data);
}

}  // namespace

int bias_gelu_cuda(const BiasGeluArgs& args, void* stream) {
  if (args.N * args.E == 0) return HK_OK;
  const int64_t size = dtype_size(args.dtype);
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.x, args.x_stride, args.N, size).row(args.bias, 0, 1, 1);
  alignment.row(args.out, args.out_stride, args.N, size);
  BiasGeluWalk walk = {};
  walk.x = bytes_of(args.x);
  walk.bias = bytes_of(args.bias);
  walk.out = static_cast<unsigned char*>(args.out);
  walk.x_row = args.x_stride * size;
  walk.out_row = args.out_stride * size;
  walk.N = args.N;
  walk.stretch = kStretch;
  walk.E = static_cast<int32_t>(args.E);
  launch_rows<false>(walk, args.dtype, args.gelu, alignment.packs(), static_cast<cudaStream_t>(stream));
  return launch_status("bias_gelu");
}

int bias_gelu_backward_cuda(const BiasGeluBackwardArgs& args, void* stream_handle) {
  if (args.E == 0) return HK_OK;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = dtype_size(args.dtype);
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.x, args.x_stride, args.N, size).row(args.bias, 0, 1, 1);
  alignment.row(args.grad, args.grad_stride, args.N, size).row(args.grad_x, args.grad_x_stride, args.N, size);
  BiasGeluWalk walk = {};
  walk.grad = bytes_of(args.grad);
  walk.x = bytes_of(args.x);
  walk.bias = bytes_of(args.bias);
  walk.out = static_cast<unsigned char*>(args.grad_x);
  walk.partial = args.partial;
  walk.grad_row = args.grad_stride * size;
  walk.x_row = args.x_stride * size;
  walk.out_row = args.grad_x_stride * size;
  walk.N = args.N;
  walk.stretch = args.partial == nullptr ? kStretch : ceil_div(args.N, args.B);
  walk.E = static_cast<int32_t>(args.E);
  const int64_t blocks = args.N == 0 ? 0 : ceil_div(args.N, walk.stretch);
  if (blocks > 0) launch_rows<true>(walk, args.dtype, args.gelu, alignment.packs(), stream);
  if (args.grad_bias != nullptr)
    launch_sum_columns(args.partial, args.E, blocks, args.E, args.grad_bias, args.dtype, stream);
  return launch_status("bias_gelu_backward");
}

}  // namespace hk
