// Kernels that break a rule of CUDA, each by its name: cuda_on_cpu.cpp or a sanitizer must stop them. And one that does
// not, two_sums.
#include <cstdio>
#include <cstdlib>

#include "cuda_kernel.cuh"

namespace {

using aligner::ALL_LANES;

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void missing_at_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __shfl_sync(ALL_LANES, 1, 0);
  if (threadIdx.x >= 40) __syncthreads();
  __syncwarp();
}
__global__ void half_warp(float* x) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(ALL_LANES, x[threadIdx.x], 1);
}
__global__ void unnamed_lane(float* x) { x[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 1); }
__global__ void different_operations(float* x) {
  if (threadIdx.x % 2 == 0) {
    x[threadIdx.x] = __shfl_sync(ALL_LANES, x[threadIdx.x], 0);
  } else {
    x[threadIdx.x] = __shfl_sync(ALL_LANES, x[threadIdx.x], 1);
  }
}
__global__ void beyond_shared(float* x) {
  ALIGNER_SHARED(float, s, 64);
  s[threadIdx.x + 1] = x[threadIdx.x];
}
__global__ void beyond_global(float* x) { x[threadIdx.x + 1] = 1.f; }
__global__ void unset_shared(float* x) {
  ALIGNER_SHARED(float, s, 64);
  if (threadIdx.x > 0) s[threadIdx.x] = 0.f;
  __syncthreads();
  x[threadIdx.x] = s[(threadIdx.x + 1) % 64];
  if (x[threadIdx.x] != x[threadIdx.x]) abort();  // a NaN
}
__global__ void blocks_write_one_place(float* x) {
  if (threadIdx.x == 0) x[0] = float(blockIdx.x);
}
__global__ void two_sums(float* x) {
  const aligner::Sums<1> mine{{1.0}};
  const double first = aligner::block_sum(mine).value[0];
  const double second = aligner::block_sum(mine).value[0];
  if (blockIdx.x == 0) x[threadIdx.x] = float(first + second);
  if (first + second != 128) abort();
}

struct Kernel {
  const char* name;
  void (*kernel)(float*);
};
#define KERNEL(name) {#name, name}
constexpr Kernel KERNELS[] = {KERNEL(divergent_barrier),     KERNEL(missing_at_barrier),   KERNEL(half_warp),
                              KERNEL(unnamed_lane),          KERNEL(different_operations), KERNEL(beyond_shared),
                              KERNEL(beyond_global),         KERNEL(unset_shared),         KERNEL(two_sums),
                              KERNEL(blocks_write_one_place)};

}  // namespace

int main(int, char** arguments) {
  float* x = new float[64]();
  for (const Kernel& k : KERNELS) {
    if (strcmp(k.name, arguments[1]) == 0) ALIGNER_LAUNCH(k.kernel, 2, 64, nullptr, x);
  }
  delete[] x;
}
