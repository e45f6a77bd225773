// What this CPU can run, what the environment asks for, and what was built in.
#include "cpu/level.h"

#ifdef HK_CPU_X86_LEVELS
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <cstdlib>
#include <cstring>

#include "cpu/build_config.h"
#include "cpu/status.h"

namespace hk {

static const char* const kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef HK_CPU_X86_LEVELS
// Tiles must be asked for: their 8 KB of state make Linux grow the process's signal frames.
static bool tiles_granted() {
#ifdef __linux__
  const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

static CpuLevel best_level() {
#ifdef HK_CPU_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return CpuLevel::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuLevel::avx512;
  // Leaf 7: EDX bit 22 is AMX-BF16, bit 24 AMX-TILE.
  unsigned a, b, c, d;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  return tiles && tiles_granted() ? CpuLevel::amx : CpuLevel::avx512_bf16;
#else
  return CpuLevel::baseline;
#endif
}

static CpuLevel choose_level() {
  const CpuLevel best = best_level();
  const char* wanted = std::getenv("HULUKERN_CPU_LEVEL");
  if (wanted == nullptr || wanted[0] == '\0') return best;
  for (int i = 0; i <= static_cast<int>(best); ++i)
    if (std::strcmp(wanted, kLevelNames[i]) == 0) return static_cast<CpuLevel>(i);
  return CpuLevel::invalid;
}

CpuLevel cpu_level() {
  static const CpuLevel level = choose_level();
  return level;
}

int check_cpu_level(const char* op) {
  if (cpu_level() != CpuLevel::invalid) return HK_OK;
  return fail(
      HK_INVALID_ARGUMENT,
      "%s: HULUKERN_CPU_LEVEL has \"%s\", expected baseline, avx2, avx512, avx512_bf16 or amx, at most %s on this CPU",
      op, std::getenv("HULUKERN_CPU_LEVEL"), kLevelNames[static_cast<int>(best_level())]);
}

}  // namespace hk

extern "C" {
const char* hk_version(void) {
  return HK_VERSION;
}
int hk_abi_version(void) {
  return HK_ABI_VERSION;
}
const char* hk_cpu_level(void) {
  if (hk::check_cpu_level("hk_cpu_level")) return nullptr;
  return hk::kLevelNames[static_cast<int>(hk::cpu_level())];
}
int hk_openmp(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
#ifdef HK_SIM
const char* hk_cuda_archs(void) {
  return "simulated";
}
const char* hk_cuda_absent_reason(void) {
  return "";
}
#else
const char* hk_cuda_archs(void) {
  return HK_CUDA_ARCHS;
}
const char* hk_cuda_absent_reason(void) {
  return HK_CUDA_ABSENT;
}
#endif
}
