// What the launchers of rope_attention share: which shapes kernels are written for, and the rotary launch.
#pragma once

#include "device/launch.cuh"
#include "ops/rope_attention/rotate.cuh"
#include "ops/rope_attention/tiles.cuh"

namespace hk {

inline int check_head_dim(const char* op, int32_t D) {
  for (int32_t known : {64, 72, 80, 96, 128})
    if (D == known) return HK_OK;
  return fail(HK_UNSUPPORTED, "%s: q has D=%d, expected 64, 72, 80, 96 or 128 on CUDA", op, D);
}

// Every row of every head must begin at a multiple of 16 bytes. N and A of 1 make strides meaningless.
inline int check_packed(const char* op, const char* name, const Heads& heads, int64_t N, int64_t A, int32_t dtype) {
  const uint64_t size = static_cast<uint64_t>(dtype_size(dtype));
  uint64_t offsets = reinterpret_cast<uintptr_t>(heads.data);
  if (N > 1) offsets |= static_cast<uint64_t>(heads.row) * size;
  if (A > 1) offsets |= static_cast<uint64_t>(heads.head) * size;
  HK_REQUIRE(N * A == 0 || offsets % 16 == 0,
             "%s: %s has rows at addresses not divisible by 16, expected that they are", op, name);
  return HK_OK;
}

inline HeadRows in_bytes(const Heads& heads, int64_t size) {
  return {static_cast<const unsigned char*>(heads.data), heads.row * size, heads.head * size};
}

inline Heads dense_heads(void* data, int64_t A, int32_t D) {
  return {data, A * D, D};
}

inline void launch_rotate(const Heads& x, const Heads& out, const int32_t* positions, const Rope& rope, int64_t N,
                          int64_t A, int32_t dtype, bool inverse, cudaStream_t stream) {
  if (N * A == 0) return;
  const int64_t size = dtype_size(dtype);
  const RotateWalk walk = {static_cast<const unsigned char*>(x.data),
                           static_cast<unsigned char*>(out.data),
                           x.row * size,
                           x.head * size,
                           out.row * size,
                           out.head * size,
                           positions,
                           static_cast<int32_t>(N),
                           static_cast<int32_t>(A),
                           inverse,
                           rope};
  const dim3 grid = grid_of(ceil_div(N, kRotateRows));
  if (dtype == HK_F32)
    launch<rotate_rows<HK_F32>>(grid, kRotateThreads, 0, stream, walk);
  else if (dtype == HK_BF16)
    launch<rotate_rows<HK_BF16>>(grid, kRotateThreads, 0, stream, walk);
  else
    launch<rotate_rows<HK_F16>>(grid, kRotateThreads, 0, stream, walk);
}

}  // namespace hk
