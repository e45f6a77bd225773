// rope_attention_rotate on the CPU: a row's angles once, then its heads.
#include "ops/rope_attention/tiles.h"

namespace {

using hk::RopeAttentionRotateArgs;

template <class T>
int rotate(const RopeAttentionRotateArgs& a) {
  const int64_t pairs = a.rope.pairs;
#pragma omp parallel for schedule(static) num_threads(a.num_threads)
  for (int64_t row = 0; row < a.N; ++row) {
    float cos[hk::kMaxHeadDim / 2], sin[hk::kMaxHeadDim / 2];
    fill_turns(cos, sin, a.positions + row * a.rope.axes, a.rope);
    for (int64_t j = 0; a.inverse && j < pairs; ++j) sin[j] = -sin[j];
    for (int64_t head = 0; head < a.A; ++head) {
      const T* x = static_cast<const T*>(a.x.data) + row * a.x.row + head * a.x.head;
      T* out = static_cast<T*>(a.out.data) + row * a.out.row + head * a.out.head;
      each_stretch(pairs, [&](int64_t j, int64_t n) {
        fetch(x + a.x.row + 2 * j);
        const f32x16 low = load(x + j, n), high = load(x + pairs + j, n), c = load(cos + j, n), s = load(sin + j, n);
        store(out + j, low * c - high * s, n);
        store(out + pairs + j, high * c + low * s, n);
      });
    }
  }
  return HK_OK;
}

}  // namespace

namespace hk::HK_CPU_LEVEL {

int rope_attention_rotate(const RopeAttentionRotateArgs& args) {
  return with_type(args.dtype, [&](auto* type) { return rotate<Pointee<decltype(type)>>(args); });
}

}  // namespace hk::HK_CPU_LEVEL
