#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace aligner {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512"};

CpuIsa detect() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) return avx512 ? CpuIsa::avx512 : CpuIsa::avx2;
#endif
  return CpuIsa::portable;
}

std::atomic<CpuIsa> current{detect()};

}  // namespace

CpuIsa cpu_isa() { return current.load(std::memory_order_relaxed); }

const char* cpu_isa_name() { return NAMES[int(cpu_isa())]; }

bool force_cpu_isa(const char* name) {
  const CpuIsa best = detect();
  if (std::strcmp(name, "") == 0) {
    current = best;
    return true;
  }
  for (int isa = 0; isa <= int(best); ++isa) {
    if (std::strcmp(name, NAMES[isa]) != 0) continue;
    current = CpuIsa(isa);
    return true;
  }
  return false;
}

}  // namespace aligner
