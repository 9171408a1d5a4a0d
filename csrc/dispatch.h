// Chooses at run time which build of a kernel runs. Every *_cpu.cpp is compiled once per instruction set with
// ALIGNER_ISA naming its namespace; the code shared by both lives in headers inside that namespace and uses no
// standard-library template, so that the linker can never take one instruction set's copy for the other's.
#pragma once

namespace aligner {

enum class CpuIsa { portable, avx2, avx512 };  // in order of preference, the best last

CpuIsa cpu_isa();                      // in use: what the machine has, unless forced
const char* cpu_isa_name();            // "portable", "avx2" or "avx512"
bool force_cpu_isa(const char* name);  // one of those, or "" (detect); false when unknown or not available

}  // namespace aligner

#if defined(__x86_64__)
#define ALIGNER_CPU_KERNEL(name, Params)    \
  namespace portable {                      \
  void name(const Params& p);               \
  }                                         \
  namespace avx2 {                          \
  void name(const Params& p);               \
  }                                         \
  namespace avx512 {                        \
  void name(const Params& p);               \
  }                                         \
  inline void name(const Params& p) {       \
    if (cpu_isa() == CpuIsa::avx512) {      \
      avx512::name(p);                      \
    } else if (cpu_isa() == CpuIsa::avx2) { \
      avx2::name(p);                        \
    } else {                                \
      portable::name(p);                    \
    }                                       \
  }
#else
#define ALIGNER_CPU_KERNEL(name, Params) \
  namespace portable {                   \
  void name(const Params& p);            \
  }                                      \
  inline void name(const Params& p) { portable::name(p); }
#endif
