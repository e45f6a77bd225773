// rope_attention on the CPU, backward. One pass over (sequence, head) where there are enough of them, or two, the
// same code with the roles swapped:
//   of queries  tiles of 32 queries, keys stream by in blocks:   dQ
//   of keys     tiles of 32 keys, queries stream by in blocks:   dK, dV
//   of both     as of keys, and what a tile adds to all dQ of its head: 5 products instead of 7, half the exponentials
// Each recomputes the weights from the saved log-sum-exp. Nothing is atomic: two passes share no sum between tiles, and
// one pass keeps a head on one thread. Which it is depends on the shape alone, so that the bits do not depend on the
// number of threads.
#include "ops/rope_attention/tiles.h"

namespace {

using hk::RopeAttentionArgs;
using hk::RopeAttentionBackwardArgs;

constexpr int64_t kBlock = 128;  // shared by four to eight tiles: 2 % faster and not worth its code (Zen 4)
constexpr float kLog2e = 1.44269504f;
// Heads of all sequences from which one pass pays, up to as many threads (1.3 times as fast on two).
constexpr int64_t kEnough = 32;
enum Pass { kOfQueries, kOfKeys, kOfBoth };

// One side of the attention: queries with the upstream gradient, or keys with values. `turned` takes part in
// the logits, `plain` in the gradient of the weights.
struct Side {
  Heads turned, plain, grad_turned, grad_plain;
  const int32_t* ends;
  Turns turns;
};

template <class Unit>
struct Scratch {
  Unit *rows[2], *columns[2], *lanes[2];  // of turned and plain
  Unit *weights, *slopes;
  float *logits, *grad_weights, *sums[2], *tile, *spare;
  // Of one pass: slopes as rows of queries, keys as lanes of D, dQ [longest, stride].
  Unit *slope_rows, *keys;
  float* of_queries;

  Scratch(const Depth<Unit>& depth, int64_t longest, bool one_pass) {
    for (int i = 0; i < 2; ++i) {
      rows[i] = allocate<Unit>(depth.rows_size(longest));
      columns[i] = allocate<Unit>(depth.columns_size(longest));
      lanes[i] = allocate<Unit>(depth.lanes_size());
      sums[i] = allocate<float>(depth.product_size());
    }
    weights = allocate<Unit>(kBlock * kTileLanes);
    slopes = allocate<Unit>(kBlock * kTileLanes);
    logits = allocate<float>(kBlock * kTileLanes);
    grad_weights = allocate<float>(kBlock * kTileLanes);
    tile = allocate<float>(32 * depth.stride());
    spare = allocate<float>(32 * (depth.stride() + 32));
    slope_rows = allocate<Unit>(one_pass ? kBlock * kTileLanes : 0);
    keys = allocate<Unit>(one_pass ? kTileLanes * depth.stride() : 0);
    of_queries = allocate<float>(one_pass ? round_up(longest, 32) * depth.stride() : 0);
  }
  ~Scratch() {
    for (int i = 0; i < 2; ++i) {
      free(rows[i]);
      free(columns[i]);
      free(lanes[i]);
      free(sums[i]);
    }
    free(weights);
    free(slopes);
    free(logits);
    free(grad_weights);
    free(tile);
    free(spare);
    free(slope_rows);
    free(keys);
    free(of_queries);
  }
  Scratch(const Scratch&) = delete;
  bool complete() const {
    return rows[0] && rows[1] && columns[0] && columns[1] && lanes[0] && lanes[1] && sums[0] && sums[1] && weights &&
           slopes && logits && grad_weights && tile && spare && slope_rows && keys && of_queries;
  }
};

// Weights of row i and half h, and the gradient of its logits. lse and delta belong to queries: to the rows
// where keys are the lanes.
template <bool of_keys, int degree>
HK_INLINE void weigh(const float* logits, const float* grad_weights, int64_t i, int64_t h, float scale,
                     const float* lse, const float* delta, f32x16* weight, f32x16* slope) {
  const int64_t at = i * kTileLanes + 16 * h;
  const f32x16 l = of_keys ? splat(lse[i]) : load(lse + 16 * h), d = of_keys ? splat(delta[i]) : load(delta + 16 * h);
  // A weight is at most 1, even where lse, or its rounding, is too small for large logits.
  const f32x16 exponent = multiply_add(load(logits + at), splat(scale), -l) * kLog2e;
  *weight = exp2<degree>(smaller(f32x16{}, exponent));
  *slope = *weight * (load(grad_weights + at) - d) * scale;
}

// Lanes beyond the tile's last key hold anything; here they would meet those keys' zeros in one sum.
HK_INLINE f32x16 first_of(f32x16 x, int64_t h, int64_t n_lanes) {
  i32x16 lane;
  for (int i = 0; i < 16; ++i) lane[i] = i;
  return pick(lane < static_cast<int32_t>(n_lanes - 16 * h), x, f32x16{});
}

// The weights and slopes of n rows, n_lanes of whose lanes count.
template <Pass pass>
void weigh_block(const Scratch<float>& s, int64_t n, int64_t n_lanes, float scale, const float* lse,
                 const float* delta) {
  for (int64_t i = 0; i < round_up(n, 32); ++i)
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t at = i * kTileLanes + 16 * h;
      f32x16 weight = {}, slope = {};
      if (i < n) weigh<pass != kOfQueries, 6>(s.logits, s.grad_weights, i, h, scale, lse, delta, &weight, &slope);
      store(s.weights + at, weight);
      store(s.slopes + at, slope);
      if (pass == kOfBoth) store(s.slope_rows + at, first_of(slope, h, n_lanes));
    }
}

#ifdef __AVX512BF16__
template <Pass pass>
void weigh_block(const Scratch<Pair>& s, int64_t n, int64_t n_lanes, float scale, const float* lse,
                 const float* delta) {
  const __mmask32 lanes = n_lanes < 32 ? (1u << n_lanes) - 1 : 0xffffffffu;
  for (int64_t i = 0; i < round_up(n, 32); i += 2) {
    f32x16 weight[2][2] = {}, slope[2][2] = {};
    for (int64_t j = 0; j < 2; ++j)
      for (int64_t h = 0; h < 2 && i + j < n; ++h)
        weigh<pass != kOfQueries, 3>(s.logits, s.grad_weights, i + j, h, scale, lse, delta, &weight[j][h],
                                     &slope[j][h]);
    for (int64_t h = 0; h < 2; ++h) {
      _mm512_storeu_si512(s.weights + i / 2 * kTileLanes + 16 * h, to_pairs(weight[0][h], weight[1][h]));
      _mm512_storeu_si512(s.slopes + i / 2 * kTileLanes + 16 * h, to_pairs(slope[0][h], slope[1][h]));
    }
    for (int64_t j = 0; j < 2 && pass == kOfBoth; ++j) {
      const __m512bh row =
          _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(slope[j][1]), reinterpret_cast<__m512>(slope[j][0]));
      _mm512_storeu_si512(s.slope_rows + (i + j) * kTileLanes / 2,
                          _mm512_maskz_mov_epi16(lanes, reinterpret_cast<__m512i>(row)));
    }
  }
}
#endif

template <class T, class Unit, Pass pass>
void tile_gradients(const RopeAttentionArgs& a, const Depth<Unit>& depth, Scratch<Unit>& s, const Side& side,
                    int64_t head, int64_t first, int64_t n, int64_t n_streamed, const float* lse, const float* delta) {
  constexpr bool of_keys = pass != kOfQueries;
  const int64_t stride = depth.stride();
  read_rows<T>(s.tile, stride, side.turned, head, first, n, a.D);
  turn_rows(s.tile, stride, n, a.rope, side.turns, first, 1.0f);
  put_lanes(s.lanes[0], depth, s.tile, s.spare);
  if (pass == kOfBoth) put_across(s.keys, stride, s.tile);
  read_rows<T>(s.tile, stride, side.plain, head, first, n, a.D);
  put_lanes(s.lanes[1], depth, s.tile, s.spare);
  for (float* sum : s.sums) memset(sum, 0, static_cast<size_t>(depth.product_size()) * sizeof(float));
  float lse_of_lanes[kTileLanes] = {}, delta_of_lanes[kTileLanes] = {};
  if (!of_keys) {
    memcpy(lse_of_lanes, lse + first, static_cast<size_t>(n) * sizeof(float));
    memcpy(delta_of_lanes, delta + first, static_cast<size_t>(n) * sizeof(float));
  }
  for (int64_t at = 0; at < n_streamed; at += kBlock) {
    const int64_t block = n_streamed - at < kBlock ? n_streamed - at : kBlock, whole = round_up(block, 16);
    product<false>(s.logits, whole, 16, depth.rows_from(s.rows[0], at), s.lanes[0]);
    product<false>(s.grad_weights, whole, 16, depth.rows_from(s.rows[1], at), s.lanes[1]);
    weigh_block<pass>(s, block, n, a.scale, of_keys ? lse + at : lse_of_lanes, of_keys ? delta + at : delta_of_lanes);
    product<true>(s.sums[0], depth.rows, depth.height, depth.columns_from(s.columns[0], at, block), s.slopes);
    if (of_keys)
      product<true>(s.sums[1], depth.rows, depth.height, depth.columns_from(s.columns[1], at, block), s.weights);
    if (pass == kOfBoth) {
      constexpr int64_t units = Depth<Unit>::column_units;
      product_rows<true>(s.of_queries + at * stride, stride, whole, {s.slope_rows, units, units, 1, units}, s.keys,
                         stride, stride);
    }
  }
  read_product(s.tile, stride, s.sums[0], a.D);
  turn_rows(s.tile, stride, n, a.rope, side.turns, first, -1.0f);
  write_heads<T>(side.grad_turned, head, first, n, a.D, s.tile, stride);
  if (!of_keys) return;
  read_product(s.tile, stride, s.sums[1], a.D);
  write_heads<T>(side.grad_plain, head, first, n, a.D, s.tile, stride);
}

// All tiles of one side, one group of one (sequence, head) after another.
template <class T, class Unit, Pass pass>
void gradients(const RopeAttentionBackwardArgs& b, const Depth<Unit>& depth, Scratch<Unit>& s, const Side& side,
               const Side& streamed, int64_t unit, int64_t groups) {
  constexpr bool of_keys = pass != kOfQueries;
  const RopeAttentionArgs& a = b.forward;
  const int64_t sequence = unit / groups / a.A, head = unit / groups % a.A, group = unit % groups;
  const int64_t tile0 = side.ends[sequence], n_tile = side.ends[sequence + 1] - tile0;
  const int64_t row0 = streamed.ends[sequence], n_rows = streamed.ends[sequence + 1] - row0;
  const int64_t each = round_up((n_tile + groups - 1) / groups, kTileLanes);
  const int64_t begin = group * each, end = begin + each < n_tile ? begin + each : n_tile;
  if (begin >= end && pass != kOfBoth) return;
  for (int64_t row = 0; row < n_rows; row += 32) {
    const int64_t n = n_rows - row < 32 ? n_rows - row : 32;
    for (int i = 0; i < 2; ++i) {
      read_rows<T>(s.tile, depth.stride(), i ? streamed.plain : streamed.turned, head, row0 + row, n, a.D);
      if (i == 0) turn_rows(s.tile, depth.stride(), n, a.rope, streamed.turns, row0 + row, 1.0f);
      put_rows(s.rows[i] + row * depth.row_units(), depth, s.tile);
      if (i == 0 || of_keys) put_columns(s.columns[i] + depth.columns_size(row), depth, s.tile);
    }
  }
  const int64_t queries = head * a.Nq + (of_keys ? row0 : 0), stride = depth.stride();
  if (pass == kOfBoth) memset(s.of_queries, 0, static_cast<size_t>(round_up(n_rows, 32) * stride) * sizeof(float));
  for (int64_t row = begin; row < end; row += kTileLanes) {
    const int64_t n = end - row < kTileLanes ? end - row : kTileLanes;
    tile_gradients<T, Unit, pass>(a, depth, s, side, head, tile0 + row, n, n_rows, a.lse + queries, b.delta + queries);
  }
  for (int64_t row = 0; row < n_rows && pass == kOfBoth; row += 32) {
    const int64_t n = n_rows - row < 32 ? n_rows - row : 32;
    turn_rows(s.of_queries + row * stride, stride, n, a.rope, streamed.turns, row0 + row, -1.0f);
    write_heads<T>(streamed.grad_turned, head, row0 + row, n, a.D, s.of_queries + row * stride, stride);
  }
}

// Softmax's own term, sum_j p_j dp_j, is grad . out.
template <class T>
void sum_products(const RopeAttentionBackwardArgs& b, int64_t row) {
  const RopeAttentionArgs& a = b.forward;
  for (int64_t head = 0; head < a.A; ++head) {
    const T* grad = static_cast<const T*>(b.grad.data) + row * b.grad.row + head * b.grad.head;
    const T* out = static_cast<const T*>(a.out.data) + row * a.out.row + head * a.out.head;
    f32x16 sum = {};
    each_stretch(a.D, [&](int64_t i, int64_t n) { sum += load(grad + i, n) * load(out + i, n); });
    b.delta[head * a.Nq + row] = total(sum);
  }
}

template <class T, class Unit>
int backward(const RopeAttentionBackwardArgs& b) {
  const RopeAttentionArgs& a = b.forward;
  const Depth<Unit> depth(a.D);
  const int64_t longest_q = longest(a.cu_seqlens_q, a.S), longest_k = longest(a.cu_seqlens_k, a.S);
  const TurnTable table(a);
  if (table.data == nullptr) return HK_OUT_OF_MEMORY;
  const Side queries = {a.q, b.grad, b.grad_q, {}, a.cu_seqlens_q, table.of_q};
  const Side keys = {a.k, a.v, b.grad_k, b.grad_v, a.cu_seqlens_k, table.of_k};
  const int64_t units = a.S * a.A;
  const int64_t groups_q = groups_of(longest_q, units, a.num_threads);
  const int64_t groups_k = groups_of(longest_k, units, a.num_threads);
  // AMX keeps to two passes: dQ has no product in tiles yet.
  const bool one_pass = units >= kEnough && !(kTiles && kPairs<Unit>);
  int out_of_memory = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(| : out_of_memory)
  {
    Scratch<Unit> s(depth, longest_q > longest_k ? longest_q : longest_k, one_pass);
    out_of_memory = !s.complete();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < table.rows; ++row) table.fill(a, row);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.Nq; ++row) sum_products<T>(b, row);
    if (one_pass) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; ++unit)
        if (!out_of_memory) gradients<T, Unit, kOfBoth>(b, depth, s, keys, queries, unit, 1);
    } else {
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t unit = 0; unit < units * groups_q; ++unit)
        if (!out_of_memory) gradients<T, Unit, kOfQueries>(b, depth, s, queries, keys, unit, groups_q);
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units * groups_k; ++unit)
        if (!out_of_memory) gradients<T, Unit, kOfKeys>(b, depth, s, keys, queries, unit, groups_k);
    }
    release_tiles();
  }
  return out_of_memory ? HK_OUT_OF_MEMORY : HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int rope_attention_backward(const RopeAttentionBackwardArgs& args) {
  if (args.forward.dtype == HK_F32) return backward<float, float>(args);
  if (args.forward.dtype == HK_F16) return backward<f16, float>(args);
#ifdef __AVX512BF16__
  return backward<bf16, Pair>(args);
#else
  return backward<bf16, float>(args);
#endif
}

}  // namespace hk::HK_CPU_LEVEL
