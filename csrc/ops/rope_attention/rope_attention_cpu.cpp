// rope_attention on the CPU, forward. A thread takes a (sequence, head), turns and packs its keys and values
// once, and then goes over tiles of 32 queries with an online softmax in blocks of 256 keys: logits transposed
// [keys, 32 queries], so that maxima, sums and rescaling run down columns; their exponentials are the next
// product's B as they lie. Nothing of size N^2 exists; a thread's scratch is the packed keys and values of one
// head and 80 KB beside.
//
// bf16 in, with vdpbf16ps or AMX tiles: products of bf16, sums in fp32, weights of the values rounded to bf16
// as every flash kernel does. Else everything is fp32, fp16 included. A tile's arithmetic knows nothing of
// threads: the same bits for any number of them.
#include "ops/rope_attention/tiles.h"

namespace {

using hk::RopeAttentionArgs;

constexpr int64_t kBlock = 256;  // keys: 128 is 13 % slower, 512 the same (D = 72, 256 to 4096 tokens, tiles)

template <class Unit>
struct Scratch {
  Unit *keys, *values, *query, *weights;
  float *logits, *out, *rows, *spare;

  Scratch(const Depth<Unit>& depth, int64_t longest) {
    keys = allocate<Unit>(depth.rows_size(longest));
    values = allocate<Unit>(depth.columns_size(longest));
    query = allocate<Unit>(depth.lanes_size());
    weights = allocate<Unit>(kBlock * kTileLanes);
    logits = allocate<float>(kBlock * kTileLanes);
    out = allocate<float>(depth.product_size());
    rows = allocate<float>(32 * depth.stride());
    spare = allocate<float>(32 * (depth.stride() + 32));
  }
  ~Scratch() {
    free(keys);
    free(values);
    free(query);
    free(weights);
    free(logits);
    free(out);
    free(rows);
    free(spare);
  }
  Scratch(const Scratch&) = delete;
  bool complete() const { return keys && values && query && weights && logits && out && rows && spare; }
};

HK_INLINE bool any_differs(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_NEQ_UQ) != 0;
#else
  return memcmp(&a, &b, sizeof a) != 0;
#endif
}

// Four rows at a time: a maximum has 4 cycles of latency.
HK_INLINE void column_maxima(const float* logits, int64_t n, f32x16* most) {
  const f32x16 least = splat(-__builtin_inff());
  f32x16 x[4][2] = {{least, least}, {least, least}, {least, least}, {least, least}};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) x[r][h] = larger(load(logits + (i + r) * kTileLanes + 16 * h), x[r][h]);
  for (; i < n; ++i)
    for (int h = 0; h < 2; ++h) x[0][h] = larger(load(logits + i * kTileLanes + 16 * h), x[0][h]);
  for (int h = 0; h < 2; ++h) most[h] = larger(larger(x[0][h], x[1][h]), larger(x[2][h], x[3][h]));
}

// exp2(logits * c - maximum * c) of n keys to weights, their sum to `sum`.
HK_INLINE void weigh(float* weights, const float* logits, int64_t n, float c, const f32x16* base, f32x16* sum) {
  for (int64_t i = 0; i < n; ++i)
    for (int h = 0; h < 2; ++h) {
      const f32x16 p = exp2<6>(multiply_add(load(logits + i * kTileLanes + 16 * h), splat(c), -base[h]));
      sum[h] += p;
      store(weights + i * kTileLanes + 16 * h, p);
    }
  memset(weights + n * kTileLanes, 0, static_cast<size_t>((round_up(n, 32) - n) * kTileLanes) * sizeof(float));
}

#ifdef __AVX512BF16__
HK_INLINE void weigh(Pair* weights, const float* logits, int64_t n, float c, const f32x16* base, f32x16* sum) {
  for (int64_t i = 0; i < n; i += 2)
    for (int h = 0; h < 2; ++h) {
      const float* at = logits + i * kTileLanes + 16 * h;
      const f32x16 p = exp2<3>(multiply_add(load(at), splat(c), -base[h]));
      f32x16 q = {};
      if (i + 1 < n) q = exp2<3>(multiply_add(load(at + kTileLanes), splat(c), -base[h]));
      sum[h] += p + q;
      _mm512_storeu_si512(weights + i / 2 * kTileLanes + 16 * h, to_pairs(p, q));
    }
  const int64_t pairs = (n + 1) / 2, whole = round_up(n, 32) / 2;
  memset(weights + pairs * kTileLanes, 0, static_cast<size_t>((whole - pairs) * kTileLanes) * sizeof(Pair));
}
#endif

template <class T, class Unit>
void attend_tile(const RopeAttentionArgs& a, const Depth<Unit>& depth, Scratch<Unit>& s, const Turns& turns,
                 int64_t head, int64_t first, int64_t n, int64_t n_keys) {
  read_rows<T>(s.rows, depth.stride(), a.q, head, first, n, a.D);
  turn_rows(s.rows, depth.stride(), n, a.rope, turns, first, 1.0f);
  put_lanes(s.query, depth, s.rows, s.spare);
  const float c = a.scale * 1.44269504f;
  f32x16 maximum[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())}, sum[2] = {};
  for (int64_t key = 0; key < n_keys; key += kBlock) {
    const int64_t keys = n_keys - key < kBlock ? n_keys - key : kBlock;
    product<false>(s.logits, round_up(keys, 16), 16, depth.rows_from(s.keys, key), s.query);
    f32x16 most[2], base[2], shrink[2];
    column_maxima(s.logits, keys, most);
    bool grew = false;
    for (int h = 0; h < 2; ++h) {
      most[h] = larger(most[h], maximum[h]);
      grew |= any_differs(most[h], maximum[h]);
      base[h] = most[h] * c;
      shrink[h] = exp2<6>(maximum[h] * c - base[h]);
      maximum[h] = most[h];
      sum[h] *= shrink[h];
    }
    weigh(s.weights, s.logits, keys, c, base, sum);
    const Operand<Unit> values = depth.columns_from(s.values, key, keys);
    if (key == 0) {
      product<false>(s.out, depth.rows, depth.height, values, s.weights);
      continue;
    }
    for (int64_t d = 0; grew && d < a.D; ++d)
      for (int h = 0; h < 2; ++h) {
        float* out = s.out + d * kTileLanes + 16 * h;
        store(out, load(out) * shrink[h]);
      }
    product<true>(s.out, depth.rows, depth.height, values, s.weights);
  }
  for (int64_t d = 0; d < a.D; ++d)
    for (int h = 0; h < 2; ++h) {
      float* out = s.out + d * kTileLanes + 16 * h;
      store(out, load(out) / sum[h]);
    }
  read_product(s.rows, depth.stride(), s.out, a.D);
  write_heads<T>(a.out, head, first, n, a.D, s.rows, depth.stride());
  for (int64_t i = 0; i < n; ++i)
    a.lse[head * a.Nq + first + i] = maximum[i / 16][i % 16] * a.scale + __builtin_logf(sum[i / 16][i % 16]);
}

// Rows of queries without keys.
template <class T>
void attend_to_nothing(const RopeAttentionArgs& a, int64_t head, int64_t first, int64_t n) {
  for (int64_t row = first; row < first + n; ++row) {
    memset(static_cast<T*>(a.out.data) + row * a.out.row + head * a.out.head, 0, static_cast<size_t>(a.D) * sizeof(T));
    a.lse[head * a.Nq + row] = -__builtin_inff();
  }
}

template <class T, class Unit>
int attend(const RopeAttentionArgs& a) {
  const Depth<Unit> depth(a.D);
  const TurnTable table(a);
  if (table.data == nullptr) return HK_OUT_OF_MEMORY;
  const int64_t units = a.S * a.A, groups = groups_of(longest(a.cu_seqlens_q, a.S), units, a.num_threads);
  int out_of_memory = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(| : out_of_memory)
  {
    Scratch<Unit> s(depth, longest(a.cu_seqlens_k, a.S));
    out_of_memory = !s.complete();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < table.rows; ++row) table.fill(a, row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units * groups; ++unit) {
      if (out_of_memory) continue;
      const int64_t sequence = unit / groups / a.A, head = unit / groups % a.A, group = unit % groups;
      const int64_t q = a.cu_seqlens_q[sequence], n_q = a.cu_seqlens_q[sequence + 1] - q;
      const int64_t k = a.cu_seqlens_k[sequence], n_k = a.cu_seqlens_k[sequence + 1] - k;
      const int64_t each = round_up((n_q + groups - 1) / groups, kTileLanes);
      const int64_t begin = group * each, end = begin + each < n_q ? begin + each : n_q;
      if (begin >= end) continue;
      if (n_k == 0) {
        attend_to_nothing<T>(a, head, q + begin, end - begin);
        continue;
      }
      for (int64_t row = 0; row < n_k; row += 32) {
        const int64_t n = n_k - row < 32 ? n_k - row : 32;
        read_rows<T>(s.rows, depth.stride(), a.k, head, k + row, n, a.D);
        turn_rows(s.rows, depth.stride(), n, a.rope, table.of_k, k + row, 1.0f);
        put_rows(s.keys + row * depth.row_units(), depth, s.rows);
        read_rows<T>(s.rows, depth.stride(), a.v, head, k + row, n, a.D);
        put_columns(s.values + depth.columns_size(row), depth, s.rows);
      }
      for (int64_t row = begin; row < end; row += kTileLanes) {
        const int64_t n = end - row < kTileLanes ? end - row : kTileLanes;
        attend_tile<T>(a, depth, s, table.of_q, head, q + row, n, n_k);
      }
    }
    release_tiles();
  }
  return out_of_memory ? HK_OUT_OF_MEMORY : HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int rope_attention(const RopeAttentionArgs& args) {
  if (args.dtype == HK_F32) return attend<float, float>(args);
  if (args.dtype == HK_F16) return attend<f16, float>(args);
#ifdef __AVX512BF16__
  return attend<bf16, Pair>(args);
#else
  return attend<bf16, float>(args);
#endif
}

}  // namespace hk::HK_CPU_LEVEL
