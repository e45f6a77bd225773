// Tiles of packed sequences without a scan or a host sync: sequence s owns tile ids
//   [cu[s] / B + s, cu[s + 1] / B + s + 1)
// which is at least ceil(length / B) of them, since floor(b / B) - floor(a / B) + 1 >= ceil((b - a) / B), and
// the intervals follow each other: N / B + S tiles in all, known from shapes alone. Tiles past a sequence's
// end are empty. A tile finds its sequence by binary search.
#pragma once

#include "device/vec.cuh"

namespace hk {

struct Tile {
  int32_t sequence;
  int32_t first, rows;  // rows first .. first + rows; none when rows <= 0
};

__device__ __forceinline__ Tile find_tile(const int32_t* cu_seqlens, int32_t sequences, int32_t tile_rows,
                                          int32_t tile) {
  int32_t low = 0, high = sequences;  // the last s with cu[s] / B + s <= tile
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (load_value(cu_seqlens + middle) / tile_rows + middle <= tile)
      low = middle;
    else
      high = middle;
  }
  const int32_t begin = load_value(cu_seqlens + low), end = load_value(cu_seqlens + low + 1);
  const int32_t first = begin + (tile - (begin / tile_rows + low)) * tile_rows;
  return {low, first, end - first < tile_rows ? end - first : tile_rows};
}

}  // namespace hk
