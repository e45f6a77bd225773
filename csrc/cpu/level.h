// CPU levels: each *_cpu.cpp is compiled once per level into its own namespace and chosen once per
// call, above all loops. Such files include only C headers: an inline library function compiled with
// AVX-512 and kept by the linker would crash an older CPU.
#pragma once

namespace hk {

enum class CpuLevel { baseline, avx2, avx512, avx512_bf16, amx, invalid };

// Chosen once per process: the CPU's best, or what HULUKERN_CPU_LEVEL asks for.
CpuLevel cpu_level();
// As above, but reports an unusable HULUKERN_CPU_LEVEL through hk::fail.
int check_cpu_level(const char* op);

}  // namespace hk

// AMX knows products only: ops without them stop at avx512_bf16, whose conversions to bf16 are one instruction.
#ifdef HK_CPU_X86_LEVELS
#define HK_DECLARE_CPU(function, Args) \
  namespace hk::baseline {             \
  int function(const Args&);           \
  }                                    \
  namespace hk::avx2 {                 \
  int function(const Args&);           \
  }                                    \
  namespace hk::avx512 {               \
  int function(const Args&);           \
  }                                    \
  namespace hk::avx512_bf16 {          \
  int function(const Args&);           \
  }
#define HK_DISPATCH_CPU(function, args)                                                                     \
  hk::with_memory(#function, hk::cpu_level() >= hk::CpuLevel::avx512_bf16 ? hk::avx512_bf16::function(args) \
                             : hk::cpu_level() == hk::CpuLevel::avx512    ? hk::avx512::function(args)      \
                             : hk::cpu_level() == hk::CpuLevel::avx2      ? hk::avx2::function(args)        \
                                                                          : hk::baseline::function(args))
#define HK_DECLARE_CPU_PRODUCTS(function, Args) \
  HK_DECLARE_CPU(function, Args)                \
  namespace hk::amx {                           \
  int function(const Args&);                    \
  }
#define HK_DISPATCH_CPU_PRODUCTS(function, args)                                              \
  (hk::cpu_level() == hk::CpuLevel::amx ? hk::with_memory(#function, hk::amx::function(args)) \
                                        : HK_DISPATCH_CPU(function, args))
#else
#define HK_DECLARE_CPU(function, Args) \
  namespace hk::baseline {             \
  int function(const Args&);           \
  }
#define HK_DISPATCH_CPU(function, args) hk::with_memory(#function, hk::baseline::function(args))
#define HK_DECLARE_CPU_PRODUCTS HK_DECLARE_CPU
#define HK_DISPATCH_CPU_PRODUCTS HK_DISPATCH_CPU
#endif

// The CUDA launcher behind an op's arguments: checks what only it needs, launches, returns an hk_status.
#define HK_DECLARE_CUDA(function, Args)                \
  namespace hk {                                       \
  int function##_cuda(const Args& args, void* stream); \
  }

// On the device that `exec` names; check_device has said whether it may.
#ifdef HK_WITH_CUDA
#define HK_DISPATCH(function, args) \
  (exec->device == HK_CUDA ? hk::function##_cuda(args, exec->stream) : HK_DISPATCH_CPU(function, args))
#define HK_DISPATCH_PRODUCTS(function, args) \
  (exec->device == HK_CUDA ? hk::function##_cuda(args, exec->stream) : HK_DISPATCH_CPU_PRODUCTS(function, args))
#else
#define HK_DISPATCH HK_DISPATCH_CPU
#define HK_DISPATCH_PRODUCTS HK_DISPATCH_CPU_PRODUCTS
#endif
