// Shared memory, seen through views that the simulator can check: bounds, alignment, reads of what was never
// written, and races. On a device a view is a pointer.
#pragma once

#include <stdint.h>

#include "device/vec.cuh"

namespace hk {

// `size` elements of T. Indices count elements.
template <class T>
struct Shared {
#ifdef HK_SIM
  sim::SharedMemory* memory;
  int64_t begin;  // bytes
  int64_t size;

  int64_t byte(int64_t i, int64_t bytes, const char* what, At at) const {
    if (i < 0 || i * static_cast<int64_t>(sizeof(T)) + bytes > size * static_cast<int64_t>(sizeof(T)))
      sim::fault(at, "out-of-bounds %s of %lld bytes at element %lld of %lld in shared memory", what,
                 static_cast<long long>(bytes), static_cast<long long>(i), static_cast<long long>(size));
    return begin + i * static_cast<int64_t>(sizeof(T));
  }
  T get(int i, At at = here()) const {
    T x;
    memcpy(&x, memory->read(byte(i, sizeof(T), "read", at), sizeof(T), at), sizeof(T));
    return x;
  }
  void set(int i, T x, At at = here()) const {
    memcpy(memory->write(byte(i, sizeof(T), "write", at), sizeof(T), at), &x, sizeof(T));
  }
  template <int kBytes>
  Pack<kBytes> get_pack(int i, At at = here()) const {
    Pack<kBytes> pack = {};
    memcpy(pack.words, memory->read(byte(i, kBytes, "read", at), kBytes, at), kBytes);
    return pack;
  }
  template <int kBytes>
  void set_pack(int i, const Pack<kBytes>& pack, At at = here()) const {
    memcpy(memory->write(byte(i, kBytes, "write", at), kBytes, at), pack.words, kBytes);
  }
  // Part of it.
  Shared part(int first, int count, At at = here()) const {
    return {memory, byte(first, count * static_cast<int64_t>(sizeof(T)), "view", at), count};
  }
#else
  T* data;

  __device__ __forceinline__ T get(int i, At = here()) const { return data[i]; }
  __device__ __forceinline__ void set(int i, T x, At = here()) const { data[i] = x; }
  template <int kBytes>
  __device__ __forceinline__ Pack<kBytes> get_pack(int i, At = here()) const {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "whole words");
    if constexpr (kBytes == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(data + i);
      return {{v.x, v.y, v.z, v.w}};
    } else if constexpr (kBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(data + i);
      return {{v.x, v.y}};
    } else {
      return {{*reinterpret_cast<const uint32_t*>(data + i)}};
    }
  }
  template <int kBytes>
  __device__ __forceinline__ void set_pack(int i, const Pack<kBytes>& pack, At = here()) const {
    store_pack<kBytes>(data + i, pack);
  }
  __device__ __forceinline__ Shared part(int first, int, At = here()) const { return {data + first}; }
#endif
};

// `__shared__ SharedArray<T, n> name;` in a kernel, then name.view().
template <class T, int kSize>
struct SharedArray {
#ifdef HK_SIM
  T data[kSize];
  sim::SharedMemory memory;
  Shared<T> view() {
    memory.begin(reinterpret_cast<char*>(data), sizeof data);
    return {&memory, 0, kSize};
  }
#else
  T data[kSize];
  __device__ __forceinline__ Shared<T> view() { return {data}; }
#endif
};

// The part of the launch's dynamic shared memory that begins at `byte`; 16-byte aligned.
#ifdef HK_SIM
template <class T>
inline Shared<T> dynamic_shared(int byte, int size) {
  return {&sim::dynamic_shared(), byte, size};
}
#else
extern __shared__ uint4 hk_dynamic_shared[];
template <class T>
__device__ __forceinline__ Shared<T> dynamic_shared(int byte, int) {
  return {reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(hk_dynamic_shared) + byte)};
}
#endif

}  // namespace hk
