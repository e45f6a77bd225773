// token_compact on CUDA: launches only; nothing here waits for the device.
#include <string.h>

#include "cpu/half.h"
#include "device/launch.cuh"
#include "ops/token_compact/token_compact.cuh"

namespace hk {
namespace {

template <class T>
void repeat(uint32_t (&words)[4], T value) {
  unsigned char bytes[16];
  for (size_t i = 0; i < sizeof bytes; i += sizeof value) memcpy(bytes + i, &value, sizeof value);
  memcpy(words, bytes, sizeof words);
}

void set_fill(uint32_t (&words)[4], int32_t dtype, int64_t value) {
  const float x = static_cast<float>(value);
  switch (dtype) {
    case HK_U8:
      return repeat(words, static_cast<uint8_t>(value));
    case HK_I16:
      return repeat(words, static_cast<int16_t>(value));
    case HK_I32:
      return repeat(words, static_cast<int32_t>(value));
    case HK_I64:
      return repeat(words, value);
    case HK_F16:
      return repeat(words, from_float<f16>(x).bits);
    case HK_BF16:
      return repeat(words, from_float<bf16>(x).bits);
    case HK_F32:
      return repeat(words, x);
    default:
      return repeat(words, static_cast<double>(value));
  }
}

template <bool kGather>
void launch_copy(CopyWalk walk, int64_t row_bytes, cudaStream_t stream) {
  if (walk.rows == 0 || row_bytes == 0) return;
  const dim3 grid = grid_of(ceil_div(walk.rows, kCompactWarps));
  const uint64_t offsets = reinterpret_cast<uintptr_t>(walk.from) | reinterpret_cast<uintptr_t>(walk.to) |
                           static_cast<uint64_t>(walk.from_row | walk.to_row | row_bytes);
  const auto with = [&](auto kernel_bytes) {
    constexpr int kBytes = decltype(kernel_bytes)::value;
    walk.packs = static_cast<int32_t>(row_bytes / kBytes);
    launch<copy_rows<kBytes, kGather>>(grid, kCompactThreads, 0, stream, walk);
  };
  if (offsets % 16 == 0) return with(Constant<16>{});
  if (offsets % 8 == 0) return with(Constant<8>{});
  if (offsets % 4 == 0) return with(Constant<4>{});
  if (offsets % 2 == 0) return with(Constant<2>{});
  with(Constant<1>{});
}

}  // namespace

int token_compact_index_cuda(const TokenCompactIndexArgs& args, void* stream_handle) {
  const char* op = "token_compact";
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const CompactWalk walk = {args.mask,         args.rows,        args.n_rows,        args.n_kept,
                            args.cu_seqlens,   args.n_sequences, args.bound,         args.index,
                            args.position_ids, args.count,       args.cu_seqlens_out};
  if (args.is_mask) {
    launch<compact_mask>(grid_of(args.n_rows > 0 ? ceil_div(args.n_rows, kTile) : 1), kCompactThreads, 0, stream, walk);
  } else {
    const int64_t threads = args.bound > args.n_sequences + 1 ? args.bound : args.n_sequences + 1;
    launch<compact_rows>(grid_of(ceil_div(threads, kCompactThreads)), kCompactThreads, 0, stream, walk);
  }
  return launch_status(op);
}

int token_compact_rows_cuda(const TokenCompactRowsArgs& args, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  CopyWalk walk = {reinterpret_cast<const unsigned char*>(args.from),
                   reinterpret_cast<unsigned char*>(args.to),
                   args.index,
                   args.bound,
                   args.gather ? args.bound : args.n_to,
                   args.from_stride,
                   args.to_stride,
                   0,
                   args.fill != nullptr,
                   {}};
  if (args.fill != nullptr) set_fill(walk.fill, args.dtype, *args.fill);
  if (args.gather)
    launch_copy<true>(walk, args.row_bytes, stream);
  else
    launch_copy<false>(walk, args.row_bytes, stream);
  return launch_status("token_compact");
}

}  // namespace hk
