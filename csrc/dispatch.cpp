#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace aligner {
namespace {

CpuIsa detect() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::avx2;
#endif
  return CpuIsa::portable;
}

std::atomic<CpuIsa> current{detect()};

}  // namespace

CpuIsa cpu_isa() { return current.load(std::memory_order_relaxed); }

const char* cpu_isa_name() { return cpu_isa() == CpuIsa::avx2 ? "avx2" : "portable"; }

bool force_cpu_isa(const char* name) {
  if (std::strcmp(name, "") == 0) {
    current = detect();
  } else if (std::strcmp(name, "portable") == 0) {
    current = CpuIsa::portable;
  } else if (std::strcmp(name, "avx2") == 0 && detect() == CpuIsa::avx2) {
    current = CpuIsa::avx2;
  } else {
    return false;
  }
  return true;
}

}  // namespace aligner
