// A block's walk over a row: online softmax statistics and the gradient through them, as softmax_row.h on the CPU.
// The maximum and the logarithm of the sum are kept apart: added up, a maximum of 1e4 would swallow the other's digits.
// Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3 (online softmax).
#pragma once
#include "cuda_kernel.cuh"

namespace aligner {

constexpr float LOG2E = 1.4426950408889634f;
constexpr double LN2 = 0.6931471805599453;
constexpr float LOWEST = -127.f;  // a logarithm in base 2 whose power counts as 0: times 0 it is 0, unlike -infinity

// A row of `columns` elements as the threads of a block read it: single ones up to the first 16-byte boundary, vectors,
// single ones again.
template <class T>
struct RowSplit {
  __device__ RowSplit(const T* row, int64_t columns) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = misaligned ? VECTOR<T> - misaligned : 0;
    if (head > columns) head = columns;
    vectors = (columns - head) / VECTOR<T>;
    tail = head + vectors * VECTOR<T>;
  }
  int64_t head, vectors, tail;
};

// Threads of a block that reads a row: whole warps, no more than there are vectors.
inline int row_threads(int64_t columns, Dtype dtype, int most) {
  const int64_t warps = (columns * dtype_bytes(dtype) / 16 + WARP - 1) / WARP;
  return warps < 1 ? WARP : warps * WARP < most ? int(warps * WARP) : most;
}

// z = (x - max) * inverse_temperature over the elements seen; sum = sum e^z, weighted = sum e^z z.
struct RowStats {
  float max;
  double sum, weighted;
};

// One thread's share of a row, in base 2: sum = sum 2^y, weighted = sum 2^y y, y = (x - max) * k.
struct OnlineSoftmax {
  float k;  // inverse_temperature * LOG2E
  float max = -INFINITY, sum = 0.f, weighted = 0.f;

  __device__ explicit OnlineSoftmax(float k) : k(k) {}
  __device__ void raise_max(float larger) {
    const float y = (max - larger) * k, scale = exp2_or_zero(y);
    weighted = scale > 0.f ? scale * (weighted + sum * y) : 0.f;
    sum *= scale;
    max = larger;
  }
  __device__ void add(float x) {
    const float y = (x - (max == -INFINITY ? 0.f : max)) * k, power = exp2_or_zero(y);
    sum += power;
    weighted += power * fmaxf(y, LOWEST);
  }
  template <int COUNT>
  __device__ void add(const float (&x)[COUNT]) {
    float highest = x[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) highest = fmaxf(highest, x[i]);
    if (highest > max) raise_max(highest);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) add(x[i]);
  }
};

// Statistics of the shares of all threads of the block, the same in each.
__device__ __forceinline__ RowStats block_merge(OnlineSoftmax mine) {
  const float max = block_reduce(mine.max, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  if (mine.max < max) mine.raise_max(max);
  const Sums<2> sums = block_sum(Sums<2>{{mine.sum, mine.weighted}});
  return {max, sums.value[0], sums.value[1] * LN2};
}

// Statistics of a row, the same in all threads of the block that calls it.
template <class T>
__device__ __forceinline__ RowStats block_row_stats(const T* row, int64_t columns, float inverse_temperature) {
  const RowSplit<T> split(row, columns);
  OnlineSoftmax mine(inverse_temperature * LOG2E);
  const auto add_one = [&](int64_t i) {
    const float x[1] = {to_float(load(row + i))};
    mine.add(x);
  };
  if (threadIdx.x < split.head) add_one(threadIdx.x);
  for (int64_t i = threadIdx.x; i < split.vectors; i += blockDim.x) {
    float x[VECTOR<T>];
    load_vector(row + split.head + i * VECTOR<T>, x);
    mine.add(x);
  }
  if (split.tail + threadIdx.x < columns) add_one(split.tail + threadIdx.x);

  return block_merge(mine);
}

// Entropy in nats: log(sum) - E[z]. Both terms are >= 0, so nothing cancels.
__device__ __forceinline__ double row_entropy(const RowStats& s) { return log(s.sum) - s.weighted / s.sum; }

// What the gradient of a row needs; target is negative when it is not among the row's elements.
struct RowGradient {
  float max, log_sum, entropy;  // raw logit unit; nats; nats
  float d_logprob, d_entropy;   // upstream gradients
  float inverse_temperature;
  int64_t target;

  // ((j == target) d_logprob - p_j (d_logprob + d_entropy (log p_j + H))) / temperature for element j, which is x.
  __device__ __forceinline__ float operator()(int64_t j, float x) const {
    const float y = ((x - max) * inverse_temperature - log_sum) * LOG2E, p = exp2_or_zero(y);
    const float own = j == target ? 1.f - p : -p, log_p = fmaxf(y, LOWEST) * float(LN2);
    return inverse_temperature * (d_logprob * own - d_entropy * p * (log_p + entropy));
  }
};

// gradient(j, x_j) of the elements of `row` that this block of `blocks` per row has; dx may be the row itself.
template <class T, class Gradient>
__device__ __forceinline__ void block_row_gradient(const T* row, T* dx, int64_t columns, const Gradient& gradient,
                                                   int block, int blocks) {
  const RowSplit<T> split(row, columns);
  const int64_t first = int64_t(block) * blockDim.x + threadIdx.x, step = int64_t(blocks) * blockDim.x;
  const bool aligned = reinterpret_cast<uintptr_t>(dx + split.head) % 16 == 0;
  const auto write_one = [&](int64_t j) { store(dx + j, from_float<T>(gradient(j, to_float(load(row + j))))); };
  if (first < split.head) write_one(first);
  for (int64_t i = first; i < split.vectors; i += step) {
    const int64_t j = split.head + i * VECTOR<T>;
    float x[VECTOR<T>];
    load_vector(row + j, x);
#pragma unroll
    for (int v = 0; v < VECTOR<T>; ++v) x[v] = gradient(j + v, x[v]);
    if (aligned) {
      store_vector(dx + j, x);
      continue;
    }
#pragma unroll
    for (int v = 0; v < VECTOR<T>; ++v) store(dx + j + v, from_float<T>(x[v]));
  }
  if (split.tail + first < columns) write_one(split.tail + first);
}

// Zeroes the elements that this block of `blocks` per row has.
template <class T>
__device__ __forceinline__ void block_row_zero(T* dx, int64_t columns, int block, int blocks) {
  const RowSplit<T> split(dx, columns);
  const int64_t first = int64_t(block) * blockDim.x + threadIdx.x, step = int64_t(blocks) * blockDim.x;
  if (first < split.head) store(dx + first, from_float<T>(0.f));
  for (int64_t i = first; i < split.vectors; i += step) {
    const float zeros[VECTOR<T>] = {};
    store_vector(dx + split.head + i * VECTOR<T>, zeros);
  }
  if (split.tail + first < columns) store(dx + split.tail + first, from_float<T>(0.f));
}

}  // namespace aligner
