// What every .cu needs: launch, shared memory, global loads and stores, 16-byte vectors, reductions, the entry point.
// Kernels touch global memory only through load() and store() and shared memory only through ALIGNER_SHARED, so that
// the same source also compiles with g++ on tests/csrc/cuda_on_cpu.h, which runs it, checks it and counts its traffic.
//
// Reductions never use atomics on results: the grid of a kernel depends on its sizes alone, a block leaves its part in
// the workspace and a second kernel of one block adds the parts in a fixed order. The same input gives the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_workspace.h"
#include "dtype.h"

#ifdef ALIGNER_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ALIGNER_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define ALIGNER_SHARED(T, name, count) __shared__ T name[count]
#define ALIGNER_COUNT_LOAD(pointer, line) ((void)(line))
#define ALIGNER_COUNT_STORE(pointer, line) ((void)(line))
#define ALIGNER_COUNT_SKIPPED_LOAD(line) ((void)(line))
#define ALIGNER_COUNT_SKIPPED_STORE(line) ((void)(line))
#endif

// The C entry of a kernel: `params` is the Params struct of its CPU twin holding device pointers, `workspace` has
// CUDA_WORKSPACE_BYTES. Returns cudaGetLastError(). Calls the function `name` defined above it.
#define ALIGNER_CUDA_KERNEL(name, Params)                                                                          \
  extern "C" __attribute__((visibility("default"))) int aligner_##name##_cuda(const void* params, void* workspace, \
                                                                              void* stream) {                      \
    aligner::name(*static_cast<const aligner::Params*>(params), static_cast<double*>(workspace),                   \
                  static_cast<cudaStream_t>(stream));                                                              \
    return int(cudaGetLastError());                                                                                \
  }

namespace aligner {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;  // of a block
constexpr unsigned ALL_LANES = ~0u;
constexpr int TOKEN_BLOCK = 256;  // threads of a block in kernels that walk over tokens
constexpr int TOKENS_PER_THREAD = 4;
constexpr int MAX_BLOCKS = 1024;  // of a kernel that walks over tokens: eight on each of 128 multiprocessors
constexpr int MAX_SUMS = CUDA_WORKSPACE_BYTES / sizeof(double) / MAX_BLOCKS;

template <class T>
__device__ __forceinline__ T load(const T* p, int line = __builtin_LINE()) {
  ALIGNER_COUNT_LOAD(p, line);
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T x, int line = __builtin_LINE()) {
  ALIGNER_COUNT_STORE(p, line);
  *p = x;
}

// Predicated: touches memory only where `condition` holds, as one instruction of the whole warp.
template <class T>
__device__ __forceinline__ T load_if(bool condition, const T* p, T otherwise, int line = __builtin_LINE()) {
  if (condition) return load(p, line);
  ALIGNER_COUNT_SKIPPED_LOAD(line);
  return otherwise;
}
template <class T>
__device__ __forceinline__ void store_if(bool condition, T* p, T x, int line = __builtin_LINE()) {
  if (condition) return store(p, x, line);
  ALIGNER_COUNT_SKIPPED_STORE(line);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// 2^y, and 0 below float's normal range: one instruction, where exp2f spends four on denormal results.
__device__ __forceinline__ float exp2_or_zero(float y) {
#ifdef ALIGNER_CUDA_ON_CPU
  return y < -126.f ? 0.f : exp2f(y);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#endif
}

// f(zero of the type that a dtype names).
template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(0.f);
    case Dtype::bfloat16:
      return f(__nv_bfloat16{});
    case Dtype::float16:
      return f(__half{});
  }
}

// Sixteen bytes: what one thread moves in one instruction.
template <class T>
constexpr int VECTOR = 16 / sizeof(T);

// `p` on a 16-byte boundary.
template <class T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[VECTOR<T>], int line = __builtin_LINE()) {
  const uint4 bits = load(reinterpret_cast<const uint4*>(p), line);
  T values[VECTOR<T>];
  memcpy(static_cast<void*>(values), &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < VECTOR<T>; ++i) x[i] = to_float(values[i]);
}
template <class T>
__device__ __forceinline__ void store_vector(T* p, const float (&x)[VECTOR<T>], int line = __builtin_LINE()) {
  T values[VECTOR<T>];
#pragma unroll
  for (int i = 0; i < VECTOR<T>; ++i) values[i] = from_float<T>(x[i]);
  uint4 bits;
  memcpy(&bits, values, sizeof bits);
  store(reinterpret_cast<uint4*>(p), bits, line);
}

// `x` of the lane whose number differs by the bits of `distance`; T is any struct of 4-byte words.
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int distance) {
  unsigned words[sizeof(T) / 4];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; ++i) words[i] = __shfl_xor_sync(ALL_LANES, words[i], distance);
  memcpy(&x, words, sizeof x);
  return x;
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// All lanes get the result, the same bits when `combine` is commutative to the bit.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, const Combine& combine) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x = combine(x, shuffle_xor(x, distance));
  return x;
}

// Called by every thread of a block of whole warps; `neutral` changes nothing when combined.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T x, T neutral, const Combine& combine) {
  ALIGNER_SHARED(T, parts, MAX_WARPS);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  x = warp_reduce(x, combine);
  __syncthreads();  // an earlier call may still be reading `parts`
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  x = lane < warps ? parts[lane] : neutral;
  return warp_reduce(x, combine);
}

template <int K>
struct Sums {
  double value[K];
};
template <int K>
__device__ __forceinline__ Sums<K> block_sum(const Sums<K>& sums) {
  return block_reduce(sums, Sums<K>{}, [](Sums<K> a, const Sums<K>& b) {
#pragma unroll
    for (int k = 0; k < K; ++k) a.value[k] += b.value[k];
    return a;
  });
}

// How many blocks of TOKEN_BLOCK threads walk over `count` tokens; never 0, so that results are written for no tokens.
inline int token_blocks(int64_t count) {
  const int64_t blocks = (count + TOKEN_BLOCK * TOKENS_PER_THREAD - 1) / (TOKEN_BLOCK * TOKENS_PER_THREAD);
  return int(blocks < 1 ? 1 : blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS);
}
// body(i) for the tokens of this thread.
template <class Body>
__device__ __forceinline__ void for_each_token(int64_t count, const Body& body) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) body(i);
}

// A block leaves its sums in the workspace ...
template <int K>
__device__ __forceinline__ void store_part(double* workspace, const Sums<K>& thread_sums) {
  static_assert(K <= MAX_SUMS, "the workspace holds MAX_SUMS doubles of each block");
  const Sums<K> sums = block_sum(thread_sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) store(workspace + k * gridDim.x + blockIdx.x, sums.value[k]);
  }
}
// ... and a second kernel of one block adds the parts of all `blocks`.
template <int K>
__device__ __forceinline__ Sums<K> sum_parts(const double* workspace, int blocks) {
  Sums<K> sums{};
  for (int block = threadIdx.x; block < blocks; block += blockDim.x) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums.value[k] += load(workspace + k * blocks + block);
  }
  return block_sum(sums);
}

}  // namespace aligner
