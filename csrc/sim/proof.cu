// The products of attention alone, so that a test can prove index maps: with one value in an operand, the result
// must be that value times one row or column of the other, and nothing else (tests/sim/test_fragments.py). The
// simulator's ldmatrix faults on a bank conflict, so a run also proves there is none.
#include "device/launch.cuh"
#include "ops/rope_attention/tiles.cuh"

namespace hk {
namespace {

// a [16, D], tile [64, D] -> rows = a tile^T [16, 64]; p [16, 64] -> columns = p tile [16, D]. One warp.
template <int kDtype, int kD>
__global__ void products(const uint16_t* a, const uint16_t* tile, const uint16_t* p, float* rows, float* columns) {
  constexpr int kStride = kTileStride<kD>;
  const Shared<uint16_t> left = dynamic_shared<uint16_t>(0, 16 * kStride);
  const Shared<uint16_t> right = dynamic_shared<uint16_t>(16 * kStride * 2, 64 * kStride);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * kD; i += 32) left.set(i / kD * kStride + i % kD, load_value(a + i));
  for (int i = lane; i < 64 * kD; i += 32) right.set(i / kD * kStride + i % kD, load_value(tile + i));
  warp_barrier();
  RowFragments<kD> fragments[1];
  fragments[0].load(left, 0);
  float of_rows[1][8][4] = {}, of_columns[1][kD / 8][4] = {};
  multiply_rows<kDtype, kD>(of_rows, fragments, right);

  uint32_t operand[1][4][4];
  for (int s = 0; s < 4; ++s) {
    float result[2][4];  // two neighbouring results of p
    for (int j = 0; j < 2; ++j)
      for (int e = 0; e < 4; ++e)
        result[j][e] = unpack2<kDtype>(load_value(p + (g + e / 2 * 8) * 64 + 16 * s + 8 * j + 2 * t + e % 2)).x;
    pack_operand<kDtype>(operand[0][s], result[0], result[1]);
  }
  multiply_columns<kDtype, kD>(of_columns, operand, right);
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    for (int j = 0; j < 8; ++j) store_value(rows + row * 64 + 8 * j + column, of_rows[0][j][e]);
    for (int j = 0; j < kD / 8; ++j) store_value(columns + row * kD + 8 * j + column, of_columns[0][j][e]);
  }
}

template <int kDtype, int kD>
void start(const uint16_t* a, const uint16_t* tile, const uint16_t* p, float* rows, float* columns) {
  launch<products<kDtype, kD>>(grid_of(1), 32, 80 * kTileStride<kD> * 2, nullptr, a, tile, p, rows, columns);
}

template <int kDtype>
void start_of(int D, const uint16_t* a, const uint16_t* tile, const uint16_t* p, float* rows, float* columns) {
  if (D == 64) return start<kDtype, 64>(a, tile, p, rows, columns);
  if (D == 72) return start<kDtype, 72>(a, tile, p, rows, columns);
  if (D == 80) return start<kDtype, 80>(a, tile, p, rows, columns);
  if (D == 96) return start<kDtype, 96>(a, tile, p, rows, columns);
  start<kDtype, 128>(a, tile, p, rows, columns);
}

}  // namespace
}  // namespace hk

extern "C" HK_API int hk_sim_products(int dtype, int D, const uint16_t* a, const uint16_t* tile, const uint16_t* p,
                                      float* rows, float* columns) {
  using namespace hk;
  sim::forget_tensors();
  sim::register_memory("a", a, 16 * D * 2, true);
  sim::register_memory("tile", tile, 64 * D * 2, true);
  sim::register_memory("p", p, 16 * 64 * 2, true);
  sim::register_memory("rows", rows, 16 * 64 * 4, true);
  sim::register_memory("columns", columns, 16 * D * 4, true);
  if (dtype == HK_BF16)
    start_of<HK_BF16>(D, a, tile, p, rows, columns);
  else
    start_of<HK_F16>(D, a, tile, p, rows, columns);
  return launch_status("products");
}

extern "C" HK_API int hk_sim_tile_stride(int D) {
  return D == 64   ? hk::kTileStride<64>
         : D == 72 ? hk::kTileStride<72>
         : D == 80 ? hk::kTileStride<80>
         : D == 96 ? hk::kTileStride<96>
                   : hk::kTileStride<128>;
}
