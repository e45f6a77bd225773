// 16-bit floats as bits, in operations a compiler turns into vectors at every level. Rounding is to
// nearest even; NaN stays NaN. Included by per-level files only, hence the unnamed namespace.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t as_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float as_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(uint8_t x) {
  return static_cast<float>(x);
}
inline float to_float(bf16 x) {
  return as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline float to_float(f16 x) {
  // Shift exponent and mantissa into place and scale by 2^112; 2^16 and above were inf or NaN.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  uint32_t u = as_bits(as_float(magnitude) * 0x1p112f);
  u |= magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  return as_float(u | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = as_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = as_bits(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  // Normal: rebias and round by integer addition. Subnormal: adding 0.5 makes the FPU round at 2^-24.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7c00u : half;
  half = half > 0x7c00u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | sign)};
}

}  // namespace
