#include <dlfcn.h>

#include "checks.h"
#include "cuda_workspace.h"

namespace aligner {
namespace {

using CudaKernel = int (*)(const void* params, void* workspace, void* stream);

void* library = nullptr;
std::string library_path;

CudaKernel find(const Call& call, const char* kernel) {
  STD_TORCH_CHECK(library, call.op,
                  ": impl cuda needs the CUDA kernels, which this build does not have; build with nvcc",
                  " and a CUDA torch, or pass impl='reference'");
  const std::string symbol = std::string("aligner_") + kernel + "_cuda";
  void* found = dlsym(library, symbol.c_str());
  STD_TORCH_CHECK(found, call.op, ": ", library_path, " has no ", symbol, "; build the library again");
  return reinterpret_cast<CudaKernel>(found);
}

void load_cuda_kernels(std::string path) {
  void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(opened, "load_cuda_kernels: ", dlerror());
  library = opened;
  library_path = path;
}

}  // namespace

void run_cuda(const Call& call, const char* kernel, const void* params) {
  const CudaKernel function = find(call, kernel);
  int code;
  if (call.is_cpu) {
    std::vector<char> workspace(CUDA_WORKSPACE_BYTES);
    code = function(params, workspace.data(), nullptr);
  } else {
    const auto index = call.like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    const Tensor workspace = torch::stable::new_empty(call.like, {CUDA_WORKSPACE_BYTES}, ScalarType::Byte);
    void* stream = torch::stable::accelerator::getCurrentStream(index).nativeHandle();
    code = function(params, workspace.mutable_data_ptr(), stream);
  }
  STD_TORCH_CHECK(code == 0, call.op, ": launching ", kernel, " failed with CUDA error ", code);
}

}  // namespace aligner

STABLE_TORCH_LIBRARY_FRAGMENT(aligner, m) { m.def("load_cuda_kernels(str path) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(aligner, CompositeExplicitAutograd, m) {
  m.impl("load_cuda_kernels", TORCH_BOX(&aligner::load_cuda_kernels));
}
