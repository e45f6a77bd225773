// Operands of the products: 32 rows of one head are read, turned by their coordinates in fp32 and written as
//   rows     [rows, K]            A, contracted over D
//   columns  [rows/32, D, 32]     A, contracted over rows
//   lanes    [K, 32]              B, contracted over D
// in units of fp32 or of pairs of bf16 (products.h). Nothing is padded to a power of two; what lies beyond
// the last row, or beyond D within the last unit or tile, is 0.
#pragma once

#include "ops/rope_attention/products.h"
#include "ops/rope_attention/rope_attention.h"

namespace {

using hk::Heads;
using hk::Rope;

// How D is cut along K, and rounded up to whole tiles along M.
template <class Unit>
struct Depth {
  static constexpr int64_t per_unit = kPairs<Unit> ? 2 : 1, column_units = 32 / per_unit;
  int64_t D, steps, units, height, rows;

  explicit Depth(int64_t D) : D(D) {
    const int64_t all = (D + per_unit - 1) / per_unit;
    steps = kTiles && kPairs<Unit> ? (all + 15) / 16 : 1;
    units = (all + steps - 1) / steps;
    height = tile_height<Unit>(D);
    rows = round_up(D, height);
  }
  int64_t row_units() const { return steps * units; }
  int64_t rows_size(int64_t n) const { return round_up(n, 32) * row_units(); }
  int64_t columns_size(int64_t n) const { return round_up(n, 32) / per_unit * rows; }
  int64_t lanes_size() const { return row_units() * kTileLanes; }
  // Floats of a tile of 32 rows, and of a product [D, 32].
  int64_t stride() const { return round_up(row_units() * per_unit, 16); }
  int64_t product_size() const { return round_up(rows, 16) * kTileLanes; }

  Operand<Unit> rows_from(const Unit* data, int64_t row) const {
    return {data + row * row_units(), row_units(), units, steps, units};
  }
  Operand<Unit> columns_from(const Unit* data, int64_t first, int64_t n) const {
    const int64_t chunk = rows * column_units;
    return {data + first / 32 * chunk, column_units, chunk, (n + 31) / 32, column_units};
  }
};

template <class T>
HK_INLINE T* allocate(int64_t n) {
  return reinterpret_cast<T*>(allocate_floats((n * static_cast<int64_t>(sizeof(T)) + 3) / 4));
}

// Rows of 16 units, `from_stride` apart, to `count` <= 16 columns.
inline void transpose(uint32_t* to, int64_t to_stride, const uint32_t* from, int64_t from_stride, int64_t count) {
#ifdef __AVX512F__
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
  for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + i * to_stride, a[i]);
#else
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
#endif
}

HK_INLINE const uint32_t* words(const void* p) {
  return static_cast<const uint32_t*>(p);
}
HK_INLINE uint32_t* words(void* p) {
  return static_cast<uint32_t*>(p);
}

// --- angles -------------------------------------------------------------------------------------------------

// cos and sin of every row and pair: a row of 2 * stride floats each.
struct Turns {
  float* data;
  int64_t stride;
  const float* cos(int64_t row) const { return data + 2 * row * stride; }
  const float* sin(int64_t row) const { return cos(row) + stride; }
};

// The angle is exact in double, and so is the remainder of its quarter turns; the polynomials are fp32 (those of
// Cephes, 1 ulp on an eighth of a turn).
inline void fill_turns(float* cos, float* sin, const int32_t* position, const Rope& rope) {
  double angle[hk::kMaxHeadDim / 2];
  for (int j = 0; j < rope.pairs; ++j)
    angle[j] = static_cast<double>(position[rope.axis[j]]) * static_cast<double>(rope.frequency[j]);
  for (int j = 0; j < rope.pairs; ++j) {
    const double shifted = angle[j] * 0.63661977236758134308 + 0x1.8p52, quarters = shifted - 0x1.8p52;
    const float r =
        static_cast<float>((angle[j] - quarters * 1.57079632679489655800) - quarters * 6.12323399573676603587e-17);
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    const uint32_t quadrant = static_cast<uint32_t>(bits) & 3u;
    const float r2 = r * r;
    const float s = r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f + r2 * -1.9515295891e-4f));
    const float c = 1.0f - 0.5f * r2 + r2 * r2 * (4.166664568e-2f + r2 * (-1.388731625e-3f + r2 * 2.443315712e-5f));
    const uint32_t odd = 0u - (quadrant & 1u);
    const uint32_t of_sin = (as_bits(s) & ~odd) | (as_bits(c) & odd), of_cos = (as_bits(c) & ~odd) | (as_bits(s) & odd);
    sin[j] = as_float(of_sin ^ ((quadrant & 2u) << 30));
    cos[j] = as_float(of_cos ^ (((quadrant + 1u) & 2u) << 30));
  }
}

// Angles of all keys, and of all queries unless those are the same rows.
struct TurnTable {
  float* data;
  int64_t rows;
  Turns of_q, of_k;

  explicit TurnTable(const hk::RopeAttentionArgs& a) {
    const bool shared = a.positions_q == a.positions_k && a.Nq == a.Nk;
    const int64_t stride = round_up(a.rope.pairs, 16);
    rows = a.Nk + (shared ? 0 : a.Nq);
    data = allocate_floats(2 * rows * stride);
    of_k = {data, stride};
    of_q = {shared ? data : data + 2 * a.Nk * stride, stride};
  }
  ~TurnTable() { free(data); }
  TurnTable(const TurnTable&) = delete;
  void fill(const hk::RopeAttentionArgs& a, int64_t row) const {
    const int32_t* position =
        row < a.Nk ? a.positions_k + row * a.rope.axes : a.positions_q + (row - a.Nk) * a.rope.axes;
    float* cos = data + 2 * row * of_k.stride;
    fill_turns(cos, cos + of_k.stride, position, a.rope);
  }
};

inline int64_t longest(const int32_t* ends, int64_t S) {
  int64_t most = 0;
  for (int64_t s = 0; s < S; ++s) most = ends[s + 1] - ends[s] > most ? ends[s + 1] - ends[s] : most;
  return most;
}

// A (sequence, head) packs what streams by once for all its tiles, unless threads would stand idle.
inline int64_t groups_of(int64_t longest_rows, int64_t units, int64_t threads) {
  const int64_t tiles = (longest_rows + kTileLanes - 1) / kTileLanes;
  const int64_t wanted = units == 0 ? 1 : (4 * threads + units - 1) / units;
  return wanted < tiles ? wanted : tiles;
}

// --- tiles of 32 rows in fp32 ---------------------------------------------------------------------------------

// Turns rows first .. first + n in place by sign * their angles.
inline void turn_rows(float* rows, int64_t stride, int64_t n, const Rope& rope, const Turns& turns, int64_t first,
                      float sign) {
  const int64_t pairs = rope.pairs;
  for (int64_t r = 0; r < n; ++r) {
    float *low = rows + r * stride, *high = low + pairs;
    const float *cos = turns.cos(first + r), *sin = turns.sin(first + r);
    each_stretch(pairs, [&](int64_t j, int64_t m) {
      const f32x16 a = load(low + j, m), b = load(high + j, m), c = load(cos + j, m), s = load(sin + j, m) * sign;
      store(low + j, a * c - b * s, m);
      store(high + j, b * c + a * s, m);
    });
  }
}

// n <= 32 rows of a head; the others, and what lies beyond D, become 0. Meanwhile as many rows from `later` on, of
// what the thread reads next, come to L2 (none: null): rows of one head lie a row of all heads apart, where hardware
// does not look, but the next head's are on the same pages. Reading them then takes half the time.
template <class T>
void read_rows(float* rows, int64_t stride, const Heads& x, int64_t head, int64_t first, int64_t n, int64_t D,
               const T* later = nullptr) {
  for (int64_t r = 0; r < 32; ++r) {
    const T* from = static_cast<const T*>(x.data) + (first + r) * x.row + head * x.head;
    if (later != nullptr) {
      for (int64_t i = 0; i < D; i += 64 / static_cast<int64_t>(sizeof(T))) fetch_later(later + r * x.row + i);
      fetch_later(later + r * x.row + D - 1);
    }
    for (int64_t i = 0; i < stride; i += kLanes)
      store(rows + r * stride + i, r < n && i < D ? load(from + i, D - i) : f32x16{});
  }
}

template <class T>
void write_heads(const Heads& x, int64_t head, int64_t first, int64_t n, int64_t D, const float* rows, int64_t stride) {
  for (int64_t r = 0; r < n; ++r) {
    T* to = static_cast<T*>(x.data) + (first + r) * x.row + head * x.head;
    each_stretch(D, [&](int64_t i, int64_t m) { store(to + i, load(rows + r * stride + i), m); });
  }
}

// A product [D, 32] to rows.
inline void read_product(float* rows, int64_t stride, const float* product, int64_t D) {
  for (int64_t d = 0; d < D; d += 16)
    for (int64_t lane = 0; lane < kTileLanes; lane += 16)
      transpose(words(rows + lane * stride + d), stride, words(product + d * kTileLanes + lane), kTileLanes, 16);
}

// --- operands ---------------------------------------------------------------------------------------------------

HK_INLINE u32x16 bf16_bits(f32x16 x) {
  alignas(32) bf16 part[kLanes];
  store(part, x);
  u16x16 y;
  memcpy(&y, part, sizeof y);
  return __builtin_convertvector(y, u32x16);
}

#ifdef __AVX512BF16__
// Two rows to pairs: 32 bf16, the second row's in the upper half, then word i and 16 + i side by side.
HK_INLINE __m512i to_pairs(f32x16 low, f32x16 high) {
  const __m512i both =
      reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}
#endif

inline void put_rows(float* out, const Depth<float>& depth, const float* rows) {
  for (int64_t r = 0; r < 32; ++r)
    memcpy(out + r * depth.D, rows + r * depth.stride(), static_cast<size_t>(depth.D) * sizeof(float));
}
inline void put_rows(Pair* out, const Depth<Pair>& depth, const float* rows) {
  for (int64_t r = 0; r < 32; ++r) {
    bf16* to = reinterpret_cast<bf16*>(out + r * depth.row_units());
    each_stretch(2 * depth.row_units(),
                 [&](int64_t i, int64_t n) { store(to + i, load(rows + r * depth.stride() + i), n); });
  }
}

inline void put_columns(float* out, const Depth<float>& depth, const float* rows) {
  for (int64_t d = 0; d < depth.D; d += 16)
    for (int64_t r = 0; r < 32; r += 16)
      transpose(words(out + d * 32 + r), 32, words(rows + r * depth.stride() + d), depth.stride(),
                depth.D - d < 16 ? depth.D - d : 16);
  for (int64_t i = depth.D * 32; i < depth.rows * 32; ++i) out[i] = 0;
}
inline void put_columns(Pair* out, const Depth<Pair>& depth, const float* rows) {
  uint32_t pairs[16 * 16];  // two rows' values side by side
  for (int64_t d = 0; d < depth.D; d += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      const float* two = rows + 2 * r * depth.stride() + d;
      const u32x16 unit = bf16_bits(load(two)) | bf16_bits(load(two + depth.stride())) << 16;
      memcpy(pairs + r * 16, &unit, sizeof unit);
    }
    transpose(words(out + d * 16), 16, pairs, 16, depth.D - d < 16 ? depth.D - d : 16);
  }
  memset(out + depth.D * 16, 0, static_cast<size_t>(depth.rows - depth.D) * 16 * sizeof(Pair));
}

inline void put_lanes(float* out, const Depth<float>& depth, const float* rows, float*) {
  for (int64_t d = 0; d < depth.D; d += 16)
    for (int64_t r = 0; r < 32; r += 16)
      transpose(words(out + d * 32 + r), 32, words(rows + r * depth.stride() + d), depth.stride(),
                depth.D - d < 16 ? depth.D - d : 16);
}
// `spare` holds 32 rows of bf16.
inline void put_lanes(Pair* out, const Depth<Pair>& depth, const float* rows, float* spare) {
  const int64_t stride = depth.stride() / 2, units = depth.row_units(), whole = round_up(stride, 16);
  Pair* pairs = reinterpret_cast<Pair*>(spare);
  for (int64_t r = 0; r < 32; ++r) {
    bf16* to = reinterpret_cast<bf16*>(pairs + r * whole);
    for (int64_t i = 0; i < depth.stride(); i += kLanes) store(to + i, load(rows + r * depth.stride() + i));
  }
  for (int64_t u = 0; u < units; u += 16)
    for (int64_t r = 0; r < 32; r += 16)
      transpose(words(out + u * 32 + r), 32, words(pairs + r * whole + u), whole, units - u < 16 ? units - u : 16);
}

// 32 rows as B, contracted over the rows: [K, stride] lanes of D.
inline void put_across(float* out, int64_t stride, const float* rows) {
  memcpy(out, rows, static_cast<size_t>(32 * stride) * sizeof(float));
}
#ifdef __AVX512BF16__
inline void put_across(Pair* out, int64_t stride, const float* rows) {
  for (int64_t r = 0; r < 32; r += 2)
    for (int64_t i = 0; i < stride; i += 16)
      _mm512_storeu_si512(out + r / 2 * stride + i,
                          to_pairs(load(rows + r * stride + i), load(rows + (r + 1) * stride + i)));
}
#endif

}  // namespace
