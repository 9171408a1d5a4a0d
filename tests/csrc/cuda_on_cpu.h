// TEST ONLY: CUDA's device language for g++. A .cu file compiled with -x c++ -DALIGNER_CUDA_ON_CPU includes this
// instead of cuda_runtime.h, and its kernels run on the processor under the scheduler of cuda_on_cpu.cpp.
//
// Every thread of a block is a fiber. Fibers switch only where CUDA threads meet (__syncthreads, __syncwarp, shuffles,
// ballots), in an order drawn from a seed. Checked on the way: shared memory holds NaN bits when a block starts; a
// divergent barrier, a warp operation that names an exited lane, lanes of one operation at different lines, and a
// deadlock stop the program with a message. Under -fsanitize=thread each fiber is a thread to the sanitizer, a barrier
// is an edge and blocks are not ordered, so a missing barrier or two blocks writing one place is a reported race
// whatever the order was. Not modelled: asynchronous copies, bank conflicts, flush to zero, time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Position {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Position here;  // of the fiber that runs

void launch(const char* kernel, dim3 grid, dim3 block, void (*body)(const void*), const void* closure);
template <class Body>
void launch(const char* kernel, dim3 grid, dim3 block, const Body& body) {
  launch(kernel, grid, block, [](const void* closure) { (*static_cast<const Body*>(closure))(); }, &body);
}

void meet_block(int line);
// Publishes `word` to the lanes of `mask`, waits for theirs and returns them, indexed by lane.
const uint64_t* meet_warp(unsigned mask, uint64_t word, int line);
int lane();

// The block's array of the declaration that `key` stands for.
void* shared_memory(const void* key, size_t bytes);
// Counts the 32-byte sectors that a warp instruction touches in global memory; 0 bytes for a lane that it skips.
void count_access(const void* address, size_t bytes, bool is_store, int line);

template <class T>
T exchange(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  memcpy(&value, &meet_warp(mask, word, line)[source], sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

#define ALIGNER_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_on_cpu::launch(#kernel, dim3(grid), dim3(block), [=] { (kernel)(__VA_ARGS__); }))
#define ALIGNER_SHARED(T, name, count)    \
  static const char name##_declaration{}; \
  T* const name = static_cast<T*>(cuda_on_cpu::shared_memory(&name##_declaration, sizeof(T) * (count)))
#define ALIGNER_COUNT_LOAD(pointer, line) cuda_on_cpu::count_access(pointer, sizeof *(pointer), false, line)
#define ALIGNER_COUNT_STORE(pointer, line) cuda_on_cpu::count_access(pointer, sizeof *(pointer), true, line)
#define ALIGNER_COUNT_SKIPPED_LOAD(line) cuda_on_cpu::count_access(nullptr, 0, false, line)
#define ALIGNER_COUNT_SKIPPED_STORE(line) cuda_on_cpu::count_access(nullptr, 0, true, line)

#define threadIdx (cuda_on_cpu::here.thread)
#define blockIdx (cuda_on_cpu::here.block)
#define blockDim (cuda_on_cpu::here.block_size)
#define gridDim (cuda_on_cpu::here.grid_size)

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
inline unsigned atomicOr(unsigned* p, unsigned x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }
inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::meet_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { cuda_on_cpu::meet_warp(mask, 0, line); }
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const uint64_t* words = cuda_on_cpu::meet_warp(mask, predicate != 0, line);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1 && words[i]) ? 1u << i : 0u;
  return bits;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int first = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::exchange(mask, value, first | (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ bits;
  const bool later_segment = (source & ~(width - 1)) > (lane & ~(width - 1));
  return cuda_on_cpu::exchange(mask, value, later_segment ? lane : source, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_on_cpu::lane(), source = lane - int(distance);
  return cuda_on_cpu::exchange(mask, value, source < (lane & ~(width - 1)) ? lane : source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, int line = __builtin_LINE()) {
  const int lane = cuda_on_cpu::lane(), source = lane + int(distance);
  return cuda_on_cpu::exchange(mask, value, source > (lane | (width - 1)) ? lane : source, line);
}
