// Packed access to global memory: kBytes adjacent bytes (16, 8, 4, 2 or 1) by one instruction, as 32-bit
// words. Packs narrower than a word fill its upper bytes with zeros, so that arithmetic sees whole words.
#pragma once

#include <stdint.h>

#include "device/arith.cuh"
#include "device/at.cuh"
#ifdef HK_SIM
#include <string.h>

#include "sim/block.h"
#endif

namespace hk {

template <int kBytes>
struct Pack {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "one load instruction");
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t words[kWords];
};

template <int kBytes>
__device__ __forceinline__ Pack<kBytes> zero_pack() {
  return {};
}

// `from` must be aligned to kBytes. load_pack: the memory must not change while the kernel runs.
// load_pack_written: it may have been written by this launch, as seen after a barrier.
#ifdef HK_SIM

template <int kBytes>
inline Pack<kBytes> load_pack(const void* from, At at = here()) {
  sim::check_global_read(from, kBytes, at);
  Pack<kBytes> pack = {};
  memcpy(pack.words, from, kBytes);
  return pack;
}
template <int kBytes>
inline void store_pack(void* to, const Pack<kBytes>& pack, At at = here()) {
  sim::check_global_write(to, kBytes, at);
  memcpy(to, pack.words, kBytes);
}
template <class T>
inline T load_value(const T* from, At at = here()) {
  sim::check_global_read(from, sizeof(T), at);
  return *from;
}
template <class T>
inline void store_value(T* to, T x, At at = here()) {
  sim::check_global_write(to, sizeof(T), at);
  *to = x;
}

#else

template <int kBytes>
__device__ __forceinline__ Pack<kBytes> load_pack(const void* from, At = here()) {
  if constexpr (kBytes == 16) {
    const uint4 v = __ldg(static_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 v = __ldg(static_cast<const uint2*>(from));
    return {{v.x, v.y}};
  } else if constexpr (kBytes == 4) {
    return {{__ldg(static_cast<const unsigned int*>(from))}};
  } else if constexpr (kBytes == 2) {
    return {{__ldg(static_cast<const unsigned short*>(from))}};
  } else {
    return {{__ldg(static_cast<const unsigned char*>(from))}};
  }
}
template <int kBytes>
__device__ __forceinline__ void store_pack(void* to, const Pack<kBytes>& p, At = here()) {
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(to) = {p.words[0], p.words[1], p.words[2], p.words[3]};
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = {p.words[0], p.words[1]};
  } else if constexpr (kBytes == 4) {
    *static_cast<unsigned int*>(to) = p.words[0];
  } else if constexpr (kBytes == 2) {
    *static_cast<unsigned short*>(to) = static_cast<unsigned short>(p.words[0]);
  } else {
    *static_cast<unsigned char*>(to) = static_cast<unsigned char>(p.words[0]);
  }
}
template <class T>
__device__ __forceinline__ T load_value(const T* from, At = here()) {
  return __ldg(from);
}
template <class T>
__device__ __forceinline__ void store_value(T* to, T x, At = here()) {
  *to = x;
}

#endif

// --- packs as floats --------------------------------------------------------------------------------

template <int kDtype, int kBytes>
constexpr int kPackElements = kBytes / kElementBytes<kDtype>;

template <int kDtype, int kBytes>
__device__ __forceinline__ void unpack(float (&out)[kPackElements<kDtype, kBytes>], const Pack<kBytes>& pack) {
  static_assert(kBytes >= kElementBytes<kDtype>, "whole elements");
  if constexpr (kDtype == HK_F32) {
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) out[w] = f32_of_bits(pack.words[w]);
  } else if constexpr (kBytes == 2) {
    out[0] = unpack2<kDtype>(pack.words[0]).x;
  } else {
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) {
      const float2 v = unpack2<kDtype>(pack.words[w]);
      out[2 * w] = v.x;
      out[2 * w + 1] = v.y;
    }
  }
}

// Rounded to nearest even.
template <int kDtype, int kBytes>
__device__ __forceinline__ Pack<kBytes> pack_floats(const float (&in)[kPackElements<kDtype, kBytes>]) {
  static_assert(kBytes >= kElementBytes<kDtype>, "whole elements");
  Pack<kBytes> pack;
  if constexpr (kDtype == HK_F32) {
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) pack.words[w] = bits_of_f32(in[w]);
  } else if constexpr (kBytes == 2) {
    pack.words[0] = pack2<kDtype>(in[0], 0.0f);
  } else {
#pragma unroll
    for (int w = 0; w < kBytes / 4; ++w) pack.words[w] = pack2<kDtype>(in[2 * w], in[2 * w + 1]);
  }
  return pack;
}

// One element of a dtype known at run time: for rows that are too small to matter.
__device__ __forceinline__ float load_float(const void* data, int dtype, int64_t i, At at = here()) {
  const unsigned char* from = static_cast<const unsigned char*>(data) + i * (dtype == HK_F32 ? 4 : 2);
  if (dtype == HK_F32) return f32_of_bits(load_pack<4>(from, at).words[0]);
  const uint32_t bits = load_pack<2>(from, at).words[0];
  return dtype == HK_BF16 ? bf16x2_to_float2(bits).x : f16x2_to_float2(bits).x;
}
__device__ __forceinline__ void store_float(void* data, int dtype, int64_t i, float x, At at = here()) {
  unsigned char* to = static_cast<unsigned char*>(data) + i * (dtype == HK_F32 ? 4 : 2);
  if (dtype == HK_F32) return store_pack<4>(to, {{bits_of_f32(x)}}, at);
  store_pack<2>(to, {{dtype == HK_BF16 ? float2_to_bf16x2(x, 0.0f) : float2_to_f16x2(x, 0.0f)}}, at);
}

}  // namespace hk
