// Packed reads: kBytes adjacent bytes (16, 8, 4, 2 or 1) by one instruction, as 32-bit words.
// Packs narrower than a word fill its upper bytes with zeros, so that arithmetic sees whole words.
#pragma once

#include <stdint.h>

namespace hk {

template <int kBytes>
struct Pack {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "one load instruction");
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t words[kWords];
};

// `from` must be aligned to kBytes. The memory must not change while the kernel runs.
template <int kBytes>
__device__ __forceinline__ Pack<kBytes> load_pack(const unsigned char* from) {
  if constexpr (kBytes == 16) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kBytes == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    return {{v.x, v.y}};
  } else if constexpr (kBytes == 4) {
    return {{__ldg(reinterpret_cast<const unsigned int*>(from))}};
  } else if constexpr (kBytes == 2) {
    return {{__ldg(reinterpret_cast<const unsigned short*>(from))}};
  } else {
    return {{__ldg(from)}};
  }
}

template <int kBytes>
__device__ __forceinline__ Pack<kBytes> zero_pack() {
  return {};
}

}  // namespace hk
