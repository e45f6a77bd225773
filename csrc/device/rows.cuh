// Rows of a [N, E] tensor by packs, and what kernels over rows and columns share.
//
// A row belongs to a group of kWarps warps (1, or 8 for long rows) and is read once from memory; later passes
// over it hit L1, which holds the rows in flight (64 warps x 2304 bytes of 1152 bf16 are 147 KB) and is ten
// times as fast as memory. So nothing is kept in registers and a row may have any length.
#pragma once

#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "device/shared.cuh"
#include "device/vec.cuh"

namespace hk {

// Where a thread stands: which row of the grid, and its place in the row's group.
template <int kWarps>
struct RowGroup {
  static constexpr int kThreads = kWarps == 1 ? 128 : 32 * kWarps;  // of the block
  static constexpr int kRows = kThreads / (32 * kWarps);
  static constexpr int kSize = 32 * kWarps;

  int64_t row;
  int place;
  __device__ __forceinline__ RowGroup()
      : row(static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kSize), place(threadIdx.x % kSize) {}

  // The sum over the group, in every thread, in a fixed order. `scratch` holds 2 * kWarps floats, `turn` must
  // alternate between 0 and 1: while one half is read the other may be written.
  static __device__ __forceinline__ float sum(float x, const Shared<float>& scratch, int turn) {
    x = warp_sum(x);
    if constexpr (kWarps == 1) {
      return x;
    } else {
      if (threadIdx.x % kWarpSize == 0) scratch.set(turn * kWarps + threadIdx.x / kWarpSize, x);
      block_barrier();
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += scratch.get(turn * kWarps + w);
      return total;
    }
  }
};

// Pack i of a row.
template <int kDtype, int kBytes>
__device__ __forceinline__ void load_row(float (&out)[kPackElements<kDtype, kBytes>], const unsigned char* row, int i) {
  unpack<kDtype, kBytes>(out, load_pack<kBytes>(row + static_cast<int64_t>(i) * kBytes));
}
template <int kDtype, int kBytes>
__device__ __forceinline__ void store_row(unsigned char* row, int i, const float (&in)[kPackElements<kDtype, kBytes>]) {
  store_pack<kBytes>(row + static_cast<int64_t>(i) * kBytes, pack_floats<kDtype, kBytes>(in));
}

// A vector [E] of the rows' dtype or another, at the elements of pack i.
template <int kDtype, int kBytes>
__device__ __forceinline__ void load_vector(float (&out)[kPackElements<kDtype, kBytes>], const void* data, int dtype,
                                            int i) {
  if (dtype == kDtype) {
    load_row<kDtype, kBytes>(out, static_cast<const unsigned char*>(data), i);
  } else {
#pragma unroll
    for (int k = 0; k < kPackElements<kDtype, kBytes>; ++k)
      out[k] = load_float(data, dtype, static_cast<int64_t>(i) * kPackElements<kDtype, kBytes> + k);
  }
}

// --- column sums, first stage -----------------------------------------------------------------------

// Calls body(pack, slot) for a thread's packs of a row: slot s is always the same pack, so that its sums stay in
// registers. Rows of more than kSlots packs a thread have kSlots = 0: one slot, whose sums nobody stores.
template <int kSlots, int kThreads, class Body>
__device__ __forceinline__ void each_slot(int packs, const Body& body) {
  const int thread = threadIdx.x;
  if constexpr (kSlots > 0) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (thread + s * kThreads < packs) body(thread + s * kThreads, s);
  } else {
    for (int i = thread; i < packs; i += kThreads) body(i, 0);
  }
}

// A block's sums for weight and bias to its place in partial [B, 2, E].
template <int kThreads, int kSlots, int kN>
__device__ __forceinline__ void store_column_sums(float* partial, int E, const float (&of_weight)[kSlots][kN],
                                                  const float (&of_bias)[kSlots][kN]) {
  float* to = partial + static_cast<int64_t>(blockIdx.x) * 2 * E;
  const int thread = threadIdx.x;
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      const int e = (thread + s * kThreads) * kN + k;
      if (e >= E) continue;
      store_value(to + e, of_weight[s][k]);
      store_value(to + E + e, of_bias[s][k]);
    }
}

// --- column sums, second stage ----------------------------------------------------------------------

constexpr int kColumnWarps = 8;

// out[e] = sum over b of partial[b * stride + e], rounded to the dtype. A block takes 32 columns; warp w sums
// a fixed stretch of rows, and the warps' sums are added in order: the same bits at every call.
static __global__ void __launch_bounds__(32 * kColumnWarps)
    sum_columns(const float* partial, int64_t stride, int32_t B, int32_t E, void* out, int32_t dtype) {
  __shared__ SharedArray<float, 32 * kColumnWarps> array;
  const Shared<float> sums = array.view();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, e = blockIdx.x * kWarpSize + lane;
  const int rows = (B + kColumnWarps - 1) / kColumnWarps, begin = warp * rows;
  const int end = begin + rows < B ? begin + rows : B;
  float sum = 0.0f;
  if (e < E)
#pragma unroll 4
    for (int b = begin; b < end; ++b) sum += load_value(partial + b * stride + e);
  sums.set(threadIdx.x, sum);
  block_barrier();
  if (warp > 0 || e >= E) return;
  sum = 0.0f;
  for (int w = 0; w < kColumnWarps; ++w) sum += sums.get(w * kWarpSize + lane);
  store_float(out, dtype, e, sum);
}

inline void launch_sum_columns(const float* partial, int64_t stride, int64_t B, int64_t E, void* out, int32_t dtype,
                               cudaStream_t stream) {
  launch<sum_columns>(grid_of(ceil_div(E, kWarpSize)), 32 * kColumnWarps, 0, stream, partial, stride,
                      static_cast<int32_t>(B), static_cast<int32_t>(E), out, dtype);
}

// --- launchers --------------------------------------------------------------------------------------

// Collects what must be a multiple of 16 bytes for packs of 16.
struct Alignment {
  uint64_t offsets = 0;
  Alignment& row(const void* data, int64_t stride, int64_t N, int64_t size) {
    offsets |= reinterpret_cast<uintptr_t>(data);
    if (N > 1 && data != nullptr) offsets |= static_cast<uint64_t>(stride * size);
    return *this;
  }
  Alignment& bytes(int64_t n) {
    offsets |= static_cast<uint64_t>(n);
    return *this;
  }
  bool packs() const { return offsets % 16 == 0; }
};

constexpr int kMaxWarpPacks = 256;  // a row of more belongs to 8 warps

// function(dtype, bytes of a pack, warps of a group), each a Constant.
template <int kDtype, class Function>
void with_pack(bool packs, int64_t row_bytes, const Function& function) {
  if (packs && row_bytes / 16 > kMaxWarpPacks) return function(Constant<kDtype>{}, Constant<16>{}, Constant<8>{});
  if (packs) return function(Constant<kDtype>{}, Constant<16>{}, Constant<1>{});
  function(Constant<kDtype>{}, Constant<kElementBytes<kDtype>>{}, Constant<8>{});
}
template <class Function>
void with_row_kernel(int32_t dtype, bool packs, int64_t row_bytes, const Function& function) {
  if (dtype == HK_F32) return with_pack<HK_F32>(packs, row_bytes, function);
  if (dtype == HK_BF16) return with_pack<HK_BF16>(packs, row_bytes, function);
  with_pack<HK_F16>(packs, row_bytes, function);
}

}  // namespace hk
