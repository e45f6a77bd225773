// Tensor-core products of one warp: D = A B + D with fp32 sums, and the loads that feed them.
//
// Lane l holds, with g = l / 4 and t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A [16, k]   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  and for k = 16 a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   B [k, 8]    b0 (2t.., g)    and for k = 16 b1 (2t + 8.., g)
//   D [16, 8]   d[0], d[1] (g, 2t), (g, 2t + 1)     d[2], d[3] (g + 8, 2t), (g + 8, 2t + 1)
// where "2t.." are the two 16-bit floats 2t and 2t + 1 of a register.
// So D of one product, packed in pairs, is half an A of the next: two neighbouring D make one k = 16 A.
//
// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, 8 values of 16 bits; register i of lane l
// then holds values 2t, 2t + 1 of row g of matrix i; transposed, values (2t, g) and (2t + 1, g).
// A row is 16 bytes = 4 banks; 8 rows of a matrix are read together and are free of conflicts when their
// addresses / 16 differ modulo 8: with an odd row stride in units of 16 bytes they always do (kTileStride).
#pragma once

#include "device/shared.cuh"

namespace hk {

// Values from one row of a tile in shared memory to the next: D rounded up to an odd number of 16-byte units.
// D = 72 is 9 units and needs no padding.
template <int kD>
constexpr int kTileStride = ((kD / 8) | 1) * 8;

#ifdef HK_SIM

namespace sim {

template <int kMatrices, bool kTransposed>
inline void ldmatrix(uint32_t (&r)[kMatrices], const Shared<uint16_t>& from, int i, At at) {
  struct Row {
    uint16_t value[8];
  };
  Row row = {};
  const int lane = threadIdx.x % kLanes;
  if (lane < 8 * kMatrices) memcpy(&row, from.memory->read(from.byte(i, 16, "ldmatrix", at), 16, at), 16);
  const int64_t address = from.begin + 2 * static_cast<int64_t>(i);
  struct Operand {
    Row row;
    int64_t address;
  } operand = {row, address};
  const Slot* slots = exchange("ldmatrix", &operand, sizeof operand, nullptr, at);
  for (int m = 0; m < kMatrices; ++m) {
    unsigned units = 0;
    for (int l = 8 * m; l < 8 * m + 8; ++l)
      units |= 1u << (reinterpret_cast<const Operand*>(&slots[l])->address / 16 % 8);
    if (units != 0xff) fault(at, "bank conflict: the 8 rows of matrix %d share banks", m);
    const int g = lane / 4, t = lane % 4;
    const auto value = [&](int row_of, int column) {
      return static_cast<uint32_t>(reinterpret_cast<const Operand*>(&slots[8 * m + row_of])->row.value[column]);
    };
    r[m] = kTransposed ? value(2 * t, g) | value(2 * t + 1, g) << 16 : value(g, 2 * t) | value(g, 2 * t + 1) << 16;
  }
}

// All lanes' fragments at once.
template <int kDtype, int kK>
inline void multiply(Slot* slots) {
  float a[16][kK], b[kK][8];
  struct Fragments {
    uint32_t a[kK / 4], b[kK / 8];
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Fragments& f = *reinterpret_cast<const Fragments*>(&slots[lane]);
    for (int i = 0; i < kK / 4; ++i) {
      const float2 v = unpack2<kDtype>(f.a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = v.x;
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = v.y;
    }
    for (int i = 0; i < kK / 8; ++i) {
      const float2 v = unpack2<kDtype>(f.b[i]);
      b[2 * t + i * 8][g] = v.x;
      b[2 * t + i * 8 + 1][g] = v.y;
    }
  }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kK; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float out[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
    memcpy(slots[lane].bytes, out, sizeof out);
  }
}

template <int kDtype, int kK>
inline void mma(float (&d)[4], const uint32_t (&a)[kK / 4], const uint32_t (&b)[kK / 8], At at) {
  uint32_t operand[kK / 4 + kK / 8];
  memcpy(operand, a, sizeof a);
  memcpy(operand + kK / 4, b, sizeof b);
  float product[4];
  memcpy(product, exchange("mma", operand, sizeof operand, multiply<kDtype, kK>, at)[threadIdx.x % kLanes].bytes, 16);
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

}  // namespace sim

#endif

// Matrices of 8 x 8 from shared memory; `i` is the element where this lane's row begins. kMatrices 1, 2 or 4.
template <int kMatrices>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[kMatrices], const Shared<uint16_t>& from, int i,
                                              At at = here()) {
#ifdef HK_SIM
  sim::ldmatrix<kMatrices, false>(r, from, i, at);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from.data + i));
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  }
#endif
}
template <int kMatrices>
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[kMatrices], const Shared<uint16_t>& from, int i,
                                                         At at = here()) {
#ifdef HK_SIM
  sim::ldmatrix<kMatrices, true>(r, from, i, at);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(from.data + i));
  if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(kMatrices == 2, "2 or 4");
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// d += a b
template <int kDtype>
__device__ __forceinline__ void mma_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                        At at = here()) {
#ifdef HK_SIM
  sim::mma<kDtype, 16>(d, a, {b0, b1}, at);
#else
  if constexpr (kDtype == HK_BF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}
template <int kDtype>
__device__ __forceinline__ void mma_k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0, At at = here()) {
#ifdef HK_SIM
  sim::mma<kDtype, 8>(d, a, {b0}, at);
#else
  if constexpr (kDtype == HK_BF16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
  }
#endif
}

}  // namespace hk
