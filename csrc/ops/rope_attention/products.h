// The one product of this op: C [M, 32] (+)= A [M, K] * B [K, 32], C in fp32. Queries (or, for the gradients
// of keys, keys) are the 32 lanes, so that softmax and rescaling work down columns, without shuffles.
//
// K counts units: one fp32, or a pair of bf16 in 32 bits, low half first. A unit of B is one row of 32.
// A is cut along K in `steps` of `units`: element (m, step, u) lies at data[step * step_stride + m * row + u].
// Three ways to multiply, by what the level has:
//   float  FMA (SSE2: multiply, add)         8 rows x 32 lanes in 16 registers of AVX-512
//   pair   vdpbf16ps, the same loop
//   pair   tdpbf16ps, 2 x 2 tiles. A step is one tile deep: D = 72 is 3 steps of 12 pairs, not 4.5 of 16.
#pragma once

#include "cpu/vec.h"

namespace {

constexpr int64_t kTileLanes = 32;

struct Pair {  // of bf16
  uint32_t bits;
};

#ifdef __AMX_BF16__
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif

template <class Unit>
struct Operand {
  const Unit* data;
  int64_t row, step_stride;
  int64_t steps, units;
};

template <class Unit>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<Pair> = true;

// Rows of A that are computed at once. D = 72 in tiles: 5 of 15.
template <class Unit>
inline int64_t tile_height(int64_t rows) {
  if (!kTiles || !kPairs<Unit>) return 8;
  const int64_t tiles = (rows + 15) / 16;
  return (rows + tiles - 1) / tiles;
}

inline int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRowsAtOnce = 8, kVectors = 2;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRowsAtOnce = 4, kVectors = 2;
#else
constexpr int kWidth = 4, kRowsAtOnce = 4, kVectors = 2;
#endif
typedef float Vector __attribute__((vector_size(4 * kWidth)));

HK_INLINE Vector multiply_add_units(float a, const float* b, Vector c) {
  Vector x;
  memcpy(&x, b, sizeof x);
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_fmadd_ps(_mm512_set1_ps(a), reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vector>(
      _mm256_fmadd_ps(_mm256_set1_ps(a), reinterpret_cast<__m256>(x), reinterpret_cast<__m256>(c)));
#else
  return a * x + c;
#endif
}

#ifdef __AVX512BF16__
HK_INLINE Vector multiply_add_units(Pair a, const Pair* b, Vector c) {
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits))),
      reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
}
#endif

// kRowsAtOnce rows of C by `vectors` vectors of lanes.
template <bool add, int vectors, class Unit>
HK_INLINE void product_block(float* c, int64_t c_row, const Operand<Unit>& A, const Unit* a, const Unit* b,
                             int64_t b_row) {
  Vector sum[kRowsAtOnce][vectors] = {};
  if (add)
    for (int r = 0; r < kRowsAtOnce; ++r)
      for (int v = 0; v < vectors; ++v) memcpy(&sum[r][v], c + r * c_row + v * kWidth, sizeof(Vector));
  for (int64_t step = 0; step < A.steps; ++step, a += A.step_stride)
    for (int64_t u = 0; u < A.units; ++u, b += b_row)
      for (int r = 0; r < kRowsAtOnce; ++r)
        for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add_units(a[r * A.row + u], b + v * kWidth, sum[r][v]);
  for (int r = 0; r < kRowsAtOnce; ++r)
    for (int v = 0; v < vectors; ++v) memcpy(c + r * c_row + v * kWidth, &sum[r][v], sizeof(Vector));
}

// B and C have `lanes` lanes, a multiple of 16; M is a multiple of 8.
template <bool add, class Unit>
void product_rows(float* C, int64_t c_row, int64_t M, const Operand<Unit>& A, const Unit* B, int64_t b_row,
                  int64_t lanes) {
  constexpr int64_t both = kVectors * kWidth;
  for (int64_t m = 0; m < M; m += kRowsAtOnce) {
    float* c = C + m * c_row;
    const Unit* a = A.data + m * A.row;
    int64_t lane = 0;
    for (; lane + both <= lanes; lane += both) product_block<add, kVectors>(c + lane, c_row, A, a, B + lane, b_row);
    if (lane < lanes) product_block<add, 1>(c + lane, c_row, A, a, B + lane, b_row);
  }
}

#ifdef __AMX_BF16__
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// C is tiles 0 to 3, A 4 and 5, B 6 and 7.
inline void configure_tiles(int64_t height, int64_t units) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 6 ? height : units);
    config.row_bytes[t] = static_cast<uint16_t>(t < 4 || t >= 6 ? 64 : 4 * units);
  }
  asm volatile("" ::"r"(&config) : "memory");  // gcc 12's intrinsics do not say that they read memory
  _tile_loadconfig(&config);
}

template <bool add, bool two>
HK_INLINE void product_tiles(float* C, int64_t height, const Operand<Pair>& A, const Pair* a, const Pair* B) {
  constexpr int64_t stride = kTileLanes * 4;
  const int64_t below = height * kTileLanes, a_stride = A.row * 4, a_below = height * A.row;
  if (add) {
    _tile_loadd(0, C, stride);
    _tile_loadd(1, C + 16, stride);
    if (two) {
      _tile_loadd(2, C + below, stride);
      _tile_loadd(3, C + below + 16, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t step = 0; step < A.steps; ++step, a += A.step_stride, B += A.units * kTileLanes) {
    _tile_loadd(4, a, a_stride);
    _tile_loadd(6, B, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, B + 16, stride);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, a + a_below, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, C, stride);
  _tile_stored(1, C + 16, stride);
  if (two) {
    _tile_stored(2, C + below, stride);
    _tile_stored(3, C + below + 16, stride);
  }
}
#endif

// M is a multiple of `height`, which is tile_height of M or a divisor of it.
template <bool add>
inline void product(float* C, int64_t M, int64_t, const Operand<float>& A, const float* B) {
  product_rows<add>(C, kTileLanes, M, A, B, kTileLanes, kTileLanes);
}

#ifdef __AVX512BF16__
template <bool add>
inline void product(float* C, int64_t M, int64_t height, const Operand<Pair>& A, const Pair* B) {
#ifdef __AMX_BF16__
  configure_tiles(height, A.units);
  int64_t m = 0;
  for (; m + 2 * height <= M; m += 2 * height)
    product_tiles<add, true>(C + m * kTileLanes, height, A, A.data + m * A.row, B);
  if (m < M) product_tiles<add, false>(C + m * kTileLanes, height, A, A.data + m * A.row, B);
#else
  (void)height;
  product_rows<add>(C, kTileLanes, M, A, B, kTileLanes, kTileLanes);
#endif
}
#endif

inline void release_tiles() {
#ifdef __AMX_BF16__
  _tile_release();
#endif
}

}  // namespace
