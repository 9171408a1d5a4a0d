#include "dispatch.h"

#include "checks.h"

namespace aligner {
namespace {

std::string cpu_isa_op(std::optional<std::string> force) {
  if (force) {
    STD_TORCH_CHECK(
        force_cpu_isa(force->c_str()),
        "cpu_isa: force must be portable, avx2 or avx512 (where the machine has them) or empty (detect), got ", *force);
  }
  return cpu_isa_name();
}

}  // namespace
}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) { m.def("cpu_isa(str? force=None) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&aligner::cpu_isa_op)); }
