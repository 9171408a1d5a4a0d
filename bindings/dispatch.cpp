#include "dispatch.h"

#include "checks.h"

namespace aligner {
namespace {

bool emulated = false;

// "emulated-cuda" sends CPU tensors to the CUDA kernels that load_cuda_kernels opened, which must be compiled for the
// CPU: how tests run them where there is no GPU.
std::string cpu_isa_op(std::optional<std::string> force) {
  if (!force) return emulated ? "emulated-cuda" : cpu_isa_name();
  emulated = *force == "emulated-cuda";
  STD_TORCH_CHECK(
      emulated || force_cpu_isa(force->c_str()),
      "cpu_isa: force must be portable, avx2 or avx512 (where the machine has them), emulated-cuda or empty",
      " (detect), got ", *force);
  return emulated ? "emulated-cuda" : cpu_isa_name();
}

}  // namespace

bool cuda_is_emulated() { return emulated; }

}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) { m.def("cpu_isa(str? force=None) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&aligner::cpu_isa_op)); }
