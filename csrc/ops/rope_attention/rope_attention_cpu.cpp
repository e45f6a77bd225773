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

// Keys: 128 is 13 % slower, 512 the same (D = 72, 256 to 4096 tokens, AMX). Two to eight tiles of queries that share a
// block while it is in the caches are as fast as one, at 4096 tokens too (Zen 4): hardware fetches what streams by.
// Products, at the multipliers' rate, are 75 % of the time for 8 x 1024 tokens on Zen 4. Logits of 64 or 128 keys at a
// time, hot in L1, under a maximum that is raised by 2^2 or 2^6 at once: the same, and 2 to 7 % slower at 256 tokens.
// Fetching the next rows between products instead of while packing: 1 % faster and not worth its code.
constexpr int64_t kBlock = 256;
constexpr int64_t kNextBytes = 1 << 19;  // of L2 for the rows of what a thread takes next

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

// Maxima of n keys, and sums: finite unless one is not (or their sum is beyond fp32).
// Four rows at a time: a maximum has 4 cycles of latency. The sums are free, the loads set the pace.
HK_INLINE void column_maxima(const float* logits, int64_t n, f32x16* most, f32x16* sum) {
  const f32x16 least = splat(-__builtin_inff());
  f32x16 x[4][2] = {{least, least}, {least, least}, {least, least}, {least, least}}, s[4][2] = {};
  const auto take = [&](int r, int h, const float* at) {
    const f32x16 v = load(at);
    x[r][h] = larger(v, x[r][h]);
    s[r][h] += v;
  };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int r = 0; r < 4; ++r)
      for (int h = 0; h < 2; ++h) take(r, h, logits + (i + r) * kTileLanes + 16 * h);
  for (; i < n; ++i)
    for (int h = 0; h < 2; ++h) take(0, h, logits + i * kTileLanes + 16 * h);
  for (int h = 0; h < 2; ++h) {
    most[h] = larger(larger(x[0][h], x[1][h]), larger(x[2][h], x[3][h]));
    sum[h] = (s[0][h] + s[1][h]) + (s[2][h] + s[3][h]);
  }
}

// exp2((logits - most) c) of n keys to weights, their sum to `sum`. The difference first: of large logits the products
// with c differ by more than their exponents do.
HK_INLINE void weigh(float* weights, const float* logits, int64_t n, float c, const f32x16* most, f32x16* sum,
                     const f32x16*) {
  for (int64_t i = 0; i < n; ++i)
    for (int h = 0; h < 2; ++h) {
      const f32x16 p = exp2<6>((load(logits + i * kTileLanes + 16 * h) - most[h]) * c);
      sum[h] += p;
      store(weights + i * kTileLanes + 16 * h, p);
    }
  memset(weights + n * kTileLanes, 0, static_cast<size_t>((round_up(n, 32) - n) * kTileLanes) * sizeof(float));
}

#ifdef __AVX512BF16__
// The same of two keys at once in words of fixed point, exact to the rounding to bf16: half the time of exp2<3>
// and a conversion. An exponent x in [-31, 0] is (x + 15) 2^11 as a signed word, less than that is -31; its low
// 11 bits are the fraction f, and 2^f = 1 + f - f (1 - f) (k0 + k1 f) within 2e-4. A bf16 is the same with 7 bits of
// fraction, apart from the bias of its exponent.
struct WordExp2 {
  static constexpr float kUnit = 0x1p11f, kMagic = 0x1.8p23f;  // adding kMagic leaves an integer in the low bits
  static constexpr float kMost = 1000.0f;                      // of |most c|: beyond it fp32 has no 2^-11 of it
  float c;
  f32x16 low_base[2], high_base[2];

  HK_INLINE WordExp2(float c, const f32x16* most) : c(c) {
    for (int h = 0; h < 2; ++h) {
      low_base[h] = (15.0f - most[h] * c) * kUnit + kMagic;
      high_base[h] = (15.0f - most[h] * c) * (kUnit * 0x1p16f) + 0x1p15f;  // half a word: what is cut is rounded
    }
  }
  // Logits of two keys of lanes 16 h .. to pairs of weights.
  HK_INLINE __m512i operator()(f32x16 low, f32x16 high, int h) const {
    const auto words = [](int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); };
    const f32x16 in_low = larger(splat(kMagic - 32768.0f), multiply_add(low, splat(c * kUnit), low_base[h]));
    const f32x16 in_high = multiply_add(high, splat(c * (kUnit * 0x1p16f)), high_base[h]);  // saturates at -2^31
    const __m512i x = _mm512_mask_blend_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(in_low),
                                              _mm512_cvtps_epi32(reinterpret_cast<__m512>(in_high)));
    const __m512i f = _mm512_slli_epi16(x, 5), rest = _mm512_sub_epi16(_mm512_setzero_si512(), f);  // of 2^16
    const __m512i k = _mm512_add_epi16(_mm512_mulhi_epu16(f, words(160)), words(624));              // of 2^11
    const __m512i power = _mm512_sub_epi16(x, _mm512_mulhi_epu16(_mm512_mulhi_epu16(f, rest), k));
    return _mm512_add_epi16(_mm512_mulhrs_epi16(power, words(1 << 11)), words((127 - 15) << 7));  // 11 bits to 7
  }
};

template <class Exponentials>
HK_INLINE void weigh_pairs(Pair* weights, const float* logits, int64_t n, f32x16* sum, Exponentials of) {
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  const auto put = [&](int64_t i, int h, __m512i pairs) {
    sum[h] = reinterpret_cast<f32x16>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[h]), reinterpret_cast<__m512bh>(pairs), ones));
    _mm512_storeu_si512(weights + i / 2 * kTileLanes + 16 * h, pairs);
  };
  int64_t i = 0;
  for (; i + 2 <= n; i += 2)
    for (int h = 0; h < 2; ++h) {
      const float* at = logits + i * kTileLanes + 16 * h;
      put(i, h, of(load(at), load(at + kTileLanes), h));
    }
  if (i < n)
    for (int h = 0; h < 2; ++h) {
      const f32x16 last = load(logits + i * kTileLanes + 16 * h);
      put(i, h, _mm512_maskz_mov_epi16(0x55555555u, of(last, last, h)));
    }
  const int64_t pairs = (n + 1) / 2, whole = round_up(n, 32) / 2;
  memset(weights + pairs * kTileLanes, 0, static_cast<size_t>((whole - pairs) * kTileLanes) * sizeof(Pair));
}

HK_INLINE bool all_within(const f32x16* x, float most) {
  const __m512 bound = _mm512_set1_ps(most);
  return (_mm512_cmp_ps_mask(_mm512_abs_ps(reinterpret_cast<__m512>(x[0])), bound, _CMP_LE_OQ) &
          _mm512_cmp_ps_mask(_mm512_abs_ps(reinterpret_cast<__m512>(x[1])), bound, _CMP_LE_OQ)) == 0xffff;
}

// Sums are of the rounded weights, so that rounding them shifts no mean.
HK_INLINE void weigh(Pair* weights, const float* logits, int64_t n, float c, const f32x16* most, f32x16* sum,
                     const f32x16* sum_of_logits) {
  if (c < 1e30f && all_within(most, WordExp2::kMost / c) && all_within(sum_of_logits, __FLT_MAX__)) {
    weigh_pairs(weights, logits, n, sum, WordExp2(c, most));
    return;
  }
  weigh_pairs(weights, logits, n, sum, [&](f32x16 low, f32x16 high, int h) {
    return to_pairs(exp2<3>((low - most[h]) * c), exp2<3>((high - most[h]) * c));
  });
}
#endif

template <class T, class Unit>
void attend_tile(const RopeAttentionArgs& a, const Depth<Unit>& depth, Scratch<Unit>& s, const Turns& turns,
                 int64_t head, int64_t first, int64_t n, int64_t n_keys, const T* later) {
  read_rows<T>(s.rows, depth.stride(), a.q, head, first, n, a.D, later);
  turn_rows(s.rows, depth.stride(), n, a.rope, turns, first, 1.0f);
  put_lanes(s.query, depth, s.rows, s.spare);
  const float c = a.scale * 1.44269504f;
  f32x16 maximum[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())}, sum[2] = {};
  for (int64_t key = 0; key < n_keys; key += kBlock) {
    const int64_t keys = n_keys - key < kBlock ? n_keys - key : kBlock;
    product<false>(s.logits, round_up(keys, 16), 16, depth.rows_from(s.keys, key), s.query);
    f32x16 most[2], sum_of_logits[2], shrink[2];
    column_maxima(s.logits, keys, most, sum_of_logits);
    bool grew = false;
    for (int h = 0; h < 2; ++h) {
      most[h] = larger(most[h], maximum[h]);
      grew |= any_differs(most[h], maximum[h]);
      shrink[h] = exp2<6>((maximum[h] - most[h]) * c);
      maximum[h] = most[h];
      sum[h] *= shrink[h];
    }
    weigh(s.weights, s.logits, keys, c, most, sum, sum_of_logits);
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

// Queries begin .. end of one head of one sequence, and its keys.
struct Work {
  int64_t head, begin, end, key, n_keys;

  Work(const RopeAttentionArgs& a, int64_t unit, int64_t groups) {
    const int64_t sequence = unit / groups / a.A, group = unit % groups;
    const int64_t q = a.cu_seqlens_q[sequence], n_q = a.cu_seqlens_q[sequence + 1] - q;
    const int64_t each = round_up((n_q + groups - 1) / groups, kTileLanes);
    head = unit / groups % a.A;
    begin = q + (group * each < n_q ? group * each : n_q);
    end = begin + each < q + n_q ? begin + each : q + n_q;
    key = a.cu_seqlens_k[sequence];
    n_keys = a.cu_seqlens_k[sequence + 1] - key;
  }
};

template <class T, class Unit>
int attend(const RopeAttentionArgs& a) {
  const Depth<Unit> depth(a.D);
  const TurnTable table(a);
  if (table.data == nullptr) return HK_OUT_OF_MEMORY;
  const int64_t groups = groups_of(longest(a.cu_seqlens_q, a.S), a.S * a.A, a.num_threads), units = a.S * a.A * groups;
  int out_of_memory = 0;
#pragma omp parallel num_threads(a.num_threads) reduction(| : out_of_memory)
  {
    Scratch<Unit> s(depth, longest(a.cu_seqlens_k, a.S));
    out_of_memory = !s.complete();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < table.rows; ++row) table.fill(a, row);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      if (out_of_memory) continue;
      const Work w(a, unit, groups);
      if (w.begin >= w.end) continue;
      if (w.n_keys == 0) {
        attend_to_nothing<T>(a, w.head, w.begin, w.end - w.begin);
        continue;
      }
      // What this thread will most likely take next.
      const Work next(a, unit + a.num_threads < units ? unit + a.num_threads : unit, groups);
      const bool fits = (next.end - next.begin + 2 * next.n_keys) * a.D * static_cast<int64_t>(sizeof(T)) <= kNextBytes;
      const auto later = [&](const Heads& x, int64_t row) {
        return fits ? static_cast<const T*>(x.data) + row * x.row + next.head * x.head : nullptr;
      };
      for (int64_t row = 0; row < w.n_keys; row += 32) {
        const int64_t n = w.n_keys - row < 32 ? w.n_keys - row : 32, at = w.key + row;
        read_rows<T>(s.rows, depth.stride(), a.k, w.head, at, n, a.D, later(a.k, next.key + row));
        turn_rows(s.rows, depth.stride(), n, a.rope, table.of_k, at, 1.0f);
        put_rows(s.keys + row * depth.row_units(), depth, s.rows);
        read_rows<T>(s.rows, depth.stride(), a.v, w.head, at, n, a.D, later(a.v, next.key + row));
        put_columns(s.values + depth.columns_size(row), depth, s.rows);
      }
      for (int64_t row = w.begin; row < w.end; row += kTileLanes) {
        const int64_t n = w.end - row < kTileLanes ? w.end - row : kTileLanes;
        attend_tile<T>(a, depth, s, table.of_q, w.head, row, n, w.n_keys, later(a.q, next.begin + row - w.begin));
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
