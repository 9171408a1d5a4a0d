// Splits work over OpenMP threads, whose number torch.set_num_threads controls. All static: no instruction set's build
// shares a copy with another's.
#pragma once
#include <stdint.h>
#ifdef ALIGNER_PTHREADS
#include <pthread.h>
#else
#include <omp.h>
#endif

namespace aligner {

constexpr int MAX_PARTS = 64;

// run(context, part) for each part, each on a thread; max_threads() is how many there are, 1 inside of run.
#ifdef ALIGNER_PTHREADS  // for the thread sanitizer, which does not see that OpenMP's threads wait for each other
static thread_local bool in_parts = false;
static inline int64_t max_threads() { return in_parts ? 1 : 2; }

struct Part {
  void (*run)(const void* context, int part);
  const void* context;
  int index;
};
static inline void* start_part(void* argument) {
  const Part& part = *static_cast<const Part*>(argument);
  in_parts = true;
  part.run(part.context, part.index);
  return nullptr;
}
static inline void run_parts(int parts, void (*run)(const void*, int), const void* context) {
  pthread_t threads[MAX_PARTS];
  Part work[MAX_PARTS];
  for (int i = 0; i < parts; ++i) {
    work[i] = {run, context, i};
    if (pthread_create(&threads[i], nullptr, start_part, &work[i]) != 0) __builtin_trap();
  }
  for (int i = 0; i < parts; ++i) pthread_join(threads[i], nullptr);
}
#else
static inline int64_t max_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

static inline void run_parts(int parts, void (*run)(const void*, int), const void* context) {
#pragma omp parallel for schedule(static, 1) num_threads(parts)
  for (int i = 0; i < parts; ++i) run(context, i);
}
#endif

// body(begin, end, part) for contiguous parts of [0, count), none smaller than `grain` but the only one. The same count
// and thread number always give the same parts, so a sum over parts in order is deterministic. Returns how many parts.
template <class Body>
static inline int parallel_parts(int64_t count, int64_t grain, const Body& body) {
  int64_t parts = count / grain;
  const int64_t limit = max_threads();
  parts = parts > limit ? limit : parts;
  parts = parts > MAX_PARTS ? MAX_PARTS : parts;
  if (parts <= 1) {
    body(int64_t(0), count, 0);
    return 1;
  }
  struct Work {
    const Body& body;
    int64_t count, parts;
  };
  const Work work{body, count, parts};
  const auto run = [](const void* context, int i) {
    const Work& w = *static_cast<const Work*>(context);
    w.body(w.count * i / w.parts, w.count * (i + 1) / w.parts, i);
  };
  run_parts(int(parts), run, &work);
  return int(parts);
}

}  // namespace aligner
