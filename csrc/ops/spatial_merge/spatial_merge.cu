// spatial_merge on CUDA: picks packs of 16 bytes where every row allows them, and launches.
#include "ops/spatial_merge/spatial_merge.cuh"

namespace hk {
namespace {

const unsigned char* bytes_of(const void* data) {
  return static_cast<const unsigned char*>(data);
}

int check_area(const char* op, int64_t area) {
  if (area <= kMaxArea) return HK_OK;
  return fail(HK_UNSUPPORTED, "%s: merge_size**2 has value %lld, expected at most %d on CUDA", op,
              static_cast<long long>(area), kMaxArea);
}

}  // namespace

int spatial_merge_cuda(const SpatialMergeArgs& args, void* stream_handle) {
  const char* op = "spatial_merge";
  HK_RETURN_IF_ERROR(check_area(op, args.area));
  if (args.K == 0) return HK_OK;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = dtype_size(args.dtype);
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.x, args.x_stride, 2, size).row(args.out, args.out_stride, args.K, size);
  alignment.row(args.weight, 0, 1, 1).row(args.bias, 0, 1, 1);
  SpatialMergeWalk walk = {bytes_of(args.x),
                           args.weight,
                           args.bias,
                           args.keep,
                           static_cast<unsigned char*>(args.out),
                           args.mean,
                           args.rstd,
                           args.x_stride * size,
                           args.out_stride * size,
                           args.K,
                           0,
                           static_cast<int32_t>(args.E),
                           static_cast<int32_t>(args.area),
                           args.weight_dtype,
                           1.0f / static_cast<float>(args.E),
                           1.0f / static_cast<float>(args.area),
                           args.eps};
  with_row_kernel(args.dtype, alignment.packs(), args.E * size, [&](auto dtype, auto bytes, auto warps) {
    using Group = RowGroup<decltype(warps)::value>;
    walk.packs = static_cast<int32_t>(args.E * size / bytes.value);
    launch<spatial_merge_forward<decltype(dtype)::value, decltype(bytes)::value, decltype(warps)::value>>(
        grid_of(ceil_div(args.K, Group::kRows)), Group::kThreads, 0, stream, walk);
  });
  return launch_status(op);
}

int spatial_merge_backward_cuda(const SpatialMergeBackwardArgs& args, void* stream_handle) {
  const char* op = "spatial_merge_backward";
  HK_RETURN_IF_ERROR(check_area(op, args.area));
  HK_REQUIRE(args.K <= INT32_MAX / 2, "%s: grad has K=%lld, expected at most 2^30 on CUDA", op,
             static_cast<long long>(args.K));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t size = dtype_size(args.dtype);
  // Without a LayerNorm nothing is summed and any number of blocks will do.
  const int64_t blocks = args.weight == nullptr ? ceil_div(args.K, 4) : args.B;
  Alignment alignment;
  alignment.bytes(args.E * size).row(args.x, args.x_stride, 2, size).row(args.grad, args.grad_stride, args.K, size);
  alignment.row(args.grad_x, args.grad_x_stride, 2, size).row(args.weight, 0, 1, 1);
  SpatialMergeBackwardWalk walk = {bytes_of(args.grad),
                                   bytes_of(args.x),
                                   args.weight,
                                   args.keep,
                                   args.mean,
                                   args.rstd,
                                   static_cast<unsigned char*>(args.grad_x),
                                   args.weight == nullptr ? nullptr : args.partial,
                                   args.grad_stride * size,
                                   args.x_stride * size,
                                   args.grad_x_stride * size,
                                   args.cells,
                                   static_cast<int32_t>(args.K),
                                   static_cast<int32_t>(blocks == 0 ? 0 : ceil_div(args.K, blocks)),
                                   0,
                                   static_cast<int32_t>(args.E),
                                   static_cast<int32_t>(args.area),
                                   args.weight_dtype,
                                   1.0f / static_cast<float>(args.E),
                                   1.0f / static_cast<float>(args.area)};
  with_row_kernel(args.dtype, alignment.packs(), 0, [&](auto dtype, auto bytes, auto) {
    constexpr int kDtype = decltype(dtype)::value, kBytes = decltype(bytes)::value;
    walk.packs = static_cast<int32_t>(args.E * size / kBytes);
    // Few kept of many leave long gaps.
    if (args.keep != nullptr)
      launch<zero_cells_left_out<kBytes>>(grid_of(args.K + 1, ceil_div(kZeroBlocks, args.K + 1)), kMergeThreads, 0,
                                          stream, walk);
    if (blocks == 0) return;
    const dim3 grid = grid_of(blocks);
    if (walk.packs <= kMergeThreads) {
      launch<spatial_merge_backward<kDtype, kBytes, 1>>(grid, kMergeThreads, 0, stream, walk);
    } else {
      launch<spatial_merge_backward<kDtype, kBytes, 0>>(grid, kMergeThreads, 0, stream, walk);
      if (args.weight != nullptr)
        launch<spatial_merge_columns<kDtype>>(grid_of(args.B, ceil_div(args.E, kMergeThreads)), kMergeThreads, 0,
                                              stream, walk);
    }
  });
  if (args.weight != nullptr) {
    launch_sum_columns(args.partial, 2 * args.E, args.B, args.E, args.grad_weight, args.weight_dtype, stream);
    launch_sum_columns(args.partial + args.E, 2 * args.E, args.B, args.E, args.grad_bias, args.weight_dtype, stream);
  }
  return launch_status(op);
}

}  // namespace hk
