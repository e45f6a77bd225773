// rope_attention on the CPU, backward. Two passes over (sequence, head), the same code with the roles swapped:
//   of queries  tiles of 32 queries, keys stream by in blocks:   dQ
//   of keys     tiles of 32 keys, queries stream by in blocks:   dK, dV
// Each recomputes the weights from the saved log-sum-exp: 7 products instead of the 5 of a single pass, but no
// sum is shared between tiles, so nothing is atomic and the bits are the same for any number of threads.
#include "ops/rope_attention/tiles.h"

namespace {

using hk::RopeAttentionArgs;
using hk::RopeAttentionBackwardArgs;

constexpr int64_t kBlock = 128;
constexpr float kLog2e = 1.44269504f;

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

  Scratch(const Depth<Unit>& depth, int64_t longest) {
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
  }
  Scratch(const Scratch&) = delete;
  bool complete() const {
    return rows[0] && rows[1] && columns[0] && columns[1] && lanes[0] && lanes[1] && sums[0] && sums[1] && weights &&
           slopes && logits && grad_weights && tile && spare;
  }
};

// Weights of row i and half h, and the gradient of its logits. lse and delta belong to queries: to the rows
// where keys are the lanes.
template <bool of_keys, int degree>
HK_INLINE void weigh(const float* logits, const float* grad_weights, int64_t i, int64_t h, float scale,
                     const float* lse, const float* delta, f32x16* weight, f32x16* slope) {
  const int64_t at = i * kTileLanes + 16 * h;
  const f32x16 l = of_keys ? splat(lse[i]) : load(lse + 16 * h), d = of_keys ? splat(delta[i]) : load(delta + 16 * h);
  *weight = exp2<degree>(multiply_add(load(logits + at), splat(scale * kLog2e), -kLog2e * l));
  *slope = *weight * (load(grad_weights + at) - d) * scale;
}

template <bool of_keys>
void weigh_block(const Scratch<float>& s, int64_t n, float scale, const float* lse, const float* delta) {
  for (int64_t i = 0; i < round_up(n, 32); ++i)
    for (int64_t h = 0; h < 2; ++h) {
      f32x16 weight = {}, slope = {};
      if (i < n) weigh<of_keys, 6>(s.logits, s.grad_weights, i, h, scale, lse, delta, &weight, &slope);
      store(s.weights + i * kTileLanes + 16 * h, weight);
      store(s.slopes + i * kTileLanes + 16 * h, slope);
    }
}

#ifdef __AVX512BF16__
template <bool of_keys>
void weigh_block(const Scratch<Pair>& s, int64_t n, float scale, const float* lse, const float* delta) {
  for (int64_t i = 0; i < round_up(n, 32); i += 2)
    for (int64_t h = 0; h < 2; ++h) {
      f32x16 weight[2] = {}, slope[2] = {};
      for (int64_t j = 0; j < 2 && i + j < n; ++j)
        weigh<of_keys, 3>(s.logits, s.grad_weights, i + j, h, scale, lse, delta, weight + j, slope + j);
      _mm512_storeu_si512(s.weights + i / 2 * kTileLanes + 16 * h, to_pairs(weight[0], weight[1]));
      _mm512_storeu_si512(s.slopes + i / 2 * kTileLanes + 16 * h, to_pairs(slope[0], slope[1]));
    }
}
#endif

template <class T, class Unit, bool of_keys>
void tile_gradients(const RopeAttentionArgs& a, const Depth<Unit>& depth, Scratch<Unit>& s, const Side& side,
                    int64_t head, int64_t first, int64_t n, int64_t n_streamed, const float* lse, const float* delta) {
  const int64_t stride = depth.stride();
  read_rows<T>(s.tile, stride, side.turned, head, first, n, a.D);
  turn_rows(s.tile, stride, n, a.rope, side.turns, first, 1.0f);
  put_lanes(s.lanes[0], depth, s.tile, s.spare);
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
    weigh_block<of_keys>(s, block, a.scale, of_keys ? lse + at : lse_of_lanes, of_keys ? delta + at : delta_of_lanes);
    product<true>(s.sums[0], depth.rows, depth.height, depth.columns_from(s.columns[0], at, block), s.slopes);
    if (of_keys)
      product<true>(s.sums[1], depth.rows, depth.height, depth.columns_from(s.columns[1], at, block), s.weights);
  }
  read_product(s.tile, stride, s.sums[0], a.D);
  turn_rows(s.tile, stride, n, a.rope, side.turns, first, -1.0f);
  write_heads<T>(side.grad_turned, head, first, n, a.D, s.tile, stride);
  if (!of_keys) return;
  read_product(s.tile, stride, s.sums[1], a.D);
  write_heads<T>(side.grad_plain, head, first, n, a.D, s.tile, stride);
}

// All tiles of one side, one group of one (sequence, head) after another.
template <class T, class Unit, bool of_keys>
void pass(const RopeAttentionBackwardArgs& b, const Depth<Unit>& depth, Scratch<Unit>& s, const Side& side,
          const Side& streamed, int64_t unit, int64_t groups) {
  const RopeAttentionArgs& a = b.forward;
  const int64_t sequence = unit / groups / a.A, head = unit / groups % a.A, group = unit % groups;
  const int64_t tile0 = side.ends[sequence], n_tile = side.ends[sequence + 1] - tile0;
  const int64_t row0 = streamed.ends[sequence], n_rows = streamed.ends[sequence + 1] - row0;
  const int64_t each = round_up((n_tile + groups - 1) / groups, kTileLanes);
  const int64_t begin = group * each, end = begin + each < n_tile ? begin + each : n_tile;
  if (begin >= end) return;
  for (int64_t row = 0; row < n_rows; row += 32) {
    const int64_t n = n_rows - row < 32 ? n_rows - row : 32;
    for (int i = 0; i < 2; ++i) {
      read_rows<T>(s.tile, depth.stride(), i ? streamed.plain : streamed.turned, head, row0 + row, n, a.D);
      if (i == 0) turn_rows(s.tile, depth.stride(), n, a.rope, streamed.turns, row0 + row, 1.0f);
      put_rows(s.rows[i] + row * depth.row_units(), depth, s.tile);
      if (i == 0 || of_keys) put_columns(s.columns[i] + depth.columns_size(row), depth, s.tile);
    }
  }
  const int64_t queries = head * a.Nq + (of_keys ? row0 : 0);
  for (int64_t row = begin; row < end; row += kTileLanes) {
    const int64_t n = end - row < kTileLanes ? end - row : kTileLanes;
    tile_gradients<T, Unit, of_keys>(a, depth, s, side, head, tile0 + row, n, n_rows, a.lse + queries,
                                     b.delta + queries);
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
  int out_of_memory = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(| : out_of_memory)
  {
    Scratch<Unit> s(depth, longest_q > longest_k ? longest_q : longest_k);
    out_of_memory = !s.complete();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < table.rows; ++row) table.fill(a, row);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.Nq; ++row) sum_products<T>(b, row);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t unit = 0; unit < units * groups_q; ++unit)
      if (!out_of_memory) pass<T, Unit, false>(b, depth, s, queries, keys, unit, groups_q);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units * groups_k; ++unit)
      if (!out_of_memory) pass<T, Unit, true>(b, depth, s, keys, queries, unit, groups_k);
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
