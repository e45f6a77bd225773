// token_compact kernels.
//
// Index of a mask: one launch, no look-back and no atomics. A block owns kTile rows and counts for itself what
// is kept before them, since a mask is one byte a row: 64 KB for 65,536 tokens, read from L2 by 64 blocks in
// less time than a chain of 64 waits. So no flag has to be reset, any order of blocks is right, and a graph
// can replay it. Beyond about a million rows the counting (blocks x N / L2 bandwidth) passes the copying.
//
// Rows: a warp per row. Gathering it reads its source's number, scattering it searches for it, so that every
// row of grad_x is written once, by copy or with zeros.
#pragma once

#include "device/arith.cuh"
#include "device/reduce.cuh"
#include "device/shared.cuh"
#include "device/vec.cuh"
#include "ops/token_compact/token_compact.h"

namespace hk {

constexpr int kCompactThreads = 256, kCompactWarps = kCompactThreads / kWarpSize;
constexpr int kTile = 4 * kCompactThreads;  // rows a block

// The last s with ends[s] <= row, or the only one.
__device__ __forceinline__ int64_t sequence_of(const int32_t* ends, int64_t sequences, int64_t row) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (load_value(ends + middle) <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// How many of rows[0 .. n) are below `value`.
__device__ __forceinline__ int64_t count_below(const int64_t* rows, int64_t n, int64_t value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_value(rows + middle) < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct CompactWalk {
  const uint8_t* mask;
  const int64_t* rows;
  int64_t n_rows, n_kept;
  const int32_t* ends;  // NULL: one sequence of all rows
  int64_t sequences, bound;
  int64_t *index, *position_ids, *count;
  int32_t* ends_out;
};

__device__ __forceinline__ int64_t sequence_end(const CompactWalk& walk, int64_t s) {
  return walk.ends != nullptr ? load_value(walk.ends + s) : s == 0 ? 0 : walk.n_rows;
}

// Sum over the block, in every thread. `sums` holds kCompactWarps values and is free again after a barrier.
__device__ __forceinline__ uint32_t block_sum(uint32_t x, const Shared<uint32_t>& sums) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) sums.set(threadIdx.x / kWarpSize, x);
  block_barrier();
  uint32_t total = 0;
  for (int w = 0; w < kCompactWarps; ++w) total += sums.get(w);
  block_barrier();
  return total;
}

// Kept rows of [begin, end), by the whole block.
__device__ __forceinline__ uint32_t count_kept(const uint8_t* mask, int64_t begin, int64_t end,
                                               const Shared<uint32_t>& sums) {
  uint32_t sum = 0;
  // By packs from the first to the last multiple of 16 bytes, and single rows around them.
  const int64_t skip = static_cast<int64_t>(-(reinterpret_cast<uintptr_t>(mask) + begin) & 15);
  const int64_t first = begin + skip < end ? begin + skip : end, packs = (end - first) / 16;
  for (int64_t i = threadIdx.x; i < packs; i += kCompactThreads) {
    const Pack<16> pack = load_pack<16>(mask + first + 16 * i);
#pragma unroll
    for (int w = 0; w < 4; ++w) sum = add_abs_diff_u8x4(sum, pack.words[w], 0);
  }
  for (int64_t row = begin + threadIdx.x; row < first; row += kCompactThreads) sum += load_value(mask + row);
  for (int64_t row = first + 16 * packs + threadIdx.x; row < end; row += kCompactThreads) sum += load_value(mask + row);
  return block_sum(sum, sums);
}

__global__ void __launch_bounds__(kCompactThreads, 1) compact_mask(const CompactWalk walk) {
  __shared__ SharedArray<uint32_t, kCompactWarps> sums_array;
  __shared__ SharedArray<uint32_t, kTile + 1> before_array;
  const Shared<uint32_t> sums = sums_array.view(), before = before_array.view();  // kept before each row of the tile
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = begin + kTile < walk.n_rows ? begin + kTile : walk.n_rows;

  // The sequence that runs on into this tile: its rows kept so far shift the positions here.
  const int64_t open = walk.ends != nullptr ? sequence_of(walk.ends, walk.sequences, begin) : 0;
  const int64_t open_begin = sequence_end(walk, open) < begin ? sequence_end(walk, open) : begin;
  const uint32_t before_open = count_kept(walk.mask, 0, open_begin, sums);
  const uint32_t in_open = count_kept(walk.mask, open_begin, begin, sums);
  const uint32_t first = before_open + in_open;

  uint32_t kept[4], mine = 0;
  const int64_t row = begin + 4 * threadIdx.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    kept[i] = row + i < end ? load_value(walk.mask + row + i) : 0;
    mine += kept[i];
  }
  uint32_t inclusive = mine;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const uint32_t lower = shuffle(inclusive, lane >= offset ? lane - offset : lane);
    inclusive += lane >= offset ? lower : 0;
  }
  if (lane == kWarpSize - 1) sums.set(warp, inclusive);
  block_barrier();
  uint32_t exclusive = inclusive - mine;
  for (int w = 0; w < warp; ++w) exclusive += sums.get(w);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    before.set(4 * threadIdx.x + i, exclusive);
    exclusive += kept[i];
  }
  if (threadIdx.x == kCompactThreads - 1) before.set(kTile, exclusive);
  block_barrier();

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kept[i] == 0) continue;
    const uint32_t place = before.get(4 * threadIdx.x + i);
    if (first + place >= walk.bound) continue;
    const int64_t of = walk.ends != nullptr ? sequence_of(walk.ends, walk.sequences, row + i) : 0;
    const int64_t of_begin = sequence_end(walk, of);
    const int64_t position =
        of_begin >= begin ? place - before.get(static_cast<int>(of_begin - begin)) : place + in_open;
    store_value(walk.index + first + place, row + i);
    store_value(walk.position_ids + first + place, position);
  }
  // Ends in this tile; the last tile has that at n_rows too.
  const bool last = blockIdx.x == gridDim.x - 1;
  for (int64_t s = threadIdx.x; s <= walk.sequences; s += kCompactThreads) {
    const int64_t at = sequence_end(walk, s);
    if (at < begin || (at >= end && !last)) continue;
    const int64_t place = static_cast<int64_t>(first) + before.get(static_cast<int>(at - begin));
    store_value(walk.ends_out + s, static_cast<int32_t>(place < walk.bound ? place : walk.bound));
  }
  // What is left of the outputs, each block its share.
  block_barrier();
  const int64_t total = static_cast<int64_t>(first) + before.get(kTile) + count_kept(walk.mask, end, walk.n_rows, sums);
  if (last && threadIdx.x == 0) store_value(walk.count, total);
  for (int64_t b = total + begin + threadIdx.x; b < walk.bound; b += kCompactThreads) {
    if (b >= total + begin + kTile && !last) break;
    store_value(walk.index + b, int64_t{-1});
    store_value(walk.position_ids + b, int64_t{0});
  }
}

// Row numbers are given: a thread per output row and per end.
__global__ void __launch_bounds__(kCompactThreads) compact_rows(const CompactWalk walk) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCompactThreads + threadIdx.x;
  if (i < walk.bound) {
    int64_t row = -1, position = 0;
    if (i < walk.n_kept) {
      row = load_value(walk.rows + i);
      const int64_t of = walk.ends != nullptr ? sequence_of(walk.ends, walk.sequences, row) : 0;
      position = i - count_below(walk.rows, walk.n_kept, sequence_end(walk, of));
    }
    store_value(walk.index + i, row);
    store_value(walk.position_ids + i, position);
  }
  if (i <= walk.sequences) {
    const int64_t place = count_below(walk.rows, walk.n_kept, sequence_end(walk, i));
    store_value(walk.ends_out + i, static_cast<int32_t>(place < walk.bound ? place : walk.bound));
  }
  if (i == 0) store_value(walk.count, walk.n_kept);
}

struct CopyWalk {
  const unsigned char* from;
  unsigned char* to;
  const int64_t* index;
  int64_t bound, rows, from_row, to_row;  // rows of `to`; strides in bytes
  int32_t packs;
  int32_t has_fill;
  uint32_t fill[4];  // one pack of it
};

template <int kBytes, bool kGather>
__global__ void __launch_bounds__(kCompactThreads) copy_rows(const CopyWalk walk) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCompactWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= walk.rows) return;
  int64_t source;  // row of `from`, or -1
  if (kGather) {
    source = load_value(walk.index + row);
    if (source < 0 && !walk.has_fill) return;
  } else {
    // Padding is -1 and stands last: as an unsigned number it is larger than any row.
    int64_t low = 0, high = walk.bound;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<uint64_t>(load_value(walk.index + middle)) < static_cast<uint64_t>(row))
        low = middle + 1;
      else
        high = middle;
    }
    source = low < walk.bound && load_value(walk.index + low) == row ? low : -1;
  }
  Pack<kBytes> fill;
#pragma unroll
  for (int w = 0; w < Pack<kBytes>::kWords; ++w) fill.words[w] = walk.fill[w];
  const unsigned char* from = walk.from + source * walk.from_row;
  unsigned char* to = walk.to + row * walk.to_row;
#pragma unroll 4
  for (int i = lane; i < walk.packs; i += kWarpSize) {
    const int64_t at = static_cast<int64_t>(i) * kBytes;
    store_pack<kBytes>(to + at, source < 0 ? fill : load_pack<kBytes>(from + at));
  }
}

}  // namespace hk
