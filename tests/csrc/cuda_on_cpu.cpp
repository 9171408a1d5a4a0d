// The scheduler behind cuda_on_cpu.h. Never compiled with -fsanitize=thread itself: to the sanitizer only the kernels'
// own accesses exist, and only barriers and warp operations order them.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_traffic.h"

// Present only in a program linked with -fsanitize=thread.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace cuda_on_cpu {

Position here;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr int WARP = 32;
constexpr unsigned NO_SYNC = 1;      // a switch between fibers orders nothing
constexpr size_t MAX_FIBERS = 1024;  // the sanitizer takes its time to make one, and has 8128

// While one lives, what this fiber allocates, frees and copies is the scheduler's business, not the program's.
struct Untracked {
  Untracked() {
    if (!__tsan_create_fiber) return;
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Untracked() {
    if (!__tsan_create_fiber) return;
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
};
void acquire(void* edge) {
  if (__tsan_acquire) __tsan_acquire(edge);
}
void release(void* edge) {
  if (__tsan_release) __tsan_release(edge);
}

// Saves the callee-saved registers on the stack, swaps stacks, restores (x86-64 System V).
__attribute__((naked, noinline)) void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

enum class State { ready, at_barrier, at_warp_operation, exited };
const char* name_of(State state) {
  constexpr const char* NAMES[] = {"running", "at __syncthreads", "at a warp operation", "exited"};
  return NAMES[int(state)];
}

struct Fiber {
  char* stack;
  void* sanitizers;  // null without it
};

struct Thread {
  void* stack_pointer = nullptr;
  void* fiber = nullptr;  // the sanitizer's
  uint3 index{};
  State state = State::ready;
  int line = 0;       // of the last meeting
  unsigned mask = 0;  // of the warp operation it waits at
  uint64_t word = 0, received[WARP] = {};
  LaneCounter counter;
};

// What the sanitizer orders threads by where they meet. Two in turn: a thread that goes on late must not acquire what
// earlier ones released on arriving at the next meeting.
struct Edges {
  unsigned meetings = 0;
  char edges[2] = {};
  char* next() { return edges + meetings % 2; }
};

struct Warp {
  std::map<unsigned, Edges> edges;  // by mask
  int asleep = 0;
  WarpTraffic traffic;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
  std::map<std::string, Traffic> traffic;
  Thread* current = nullptr;
  void* stack_pointer = nullptr;  // of the caller of launch()
  void* fiber = nullptr;
  std::vector<Fiber> fibers;  // made once, since that is slow; launches are ordered, so each may use them anew
  size_t fibers_used = 0;     // by this launch: to the sanitizer one fiber in two blocks would order them
  void (*body)(const void*) = nullptr;
  const void* closure = nullptr;
  const char* kernel = "";
  uint64_t seed = getenv("ALIGNER_EMULATION_SEED") ? strtoull(getenv("ALIGNER_EMULATION_SEED"), nullptr, 10) : 0;
  uint64_t random_state = 1;
  char launch_edge = 0, end_edge = 0;
  std::unique_ptr<Edges> barrier;  // new memory for each block, since blocks are not ordered
};
Machine machine;

int number(const Thread& thread) { return int(&thread - machine.threads.data()); }
bool shuffled() { return machine.seed > 1; }  // seed 0: ascending, 1: descending
uint64_t random_below(uint64_t limit) {       // xorshift64
  uint64_t& x = machine.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x % limit;
}

[[noreturn]] void fail(const char* what, const Thread& thread) {
  const uint3 b = here.block;
  fprintf(stderr, "cuda_on_cpu: %s in %s, block (%u, %u, %u), thread %d at line %d\n", what, machine.kernel, b.x, b.y,
          b.z, number(thread), thread.line);
  for (const Thread& other : machine.threads) {
    if (&other == &thread || (other.line == thread.line && other.state == thread.state)) continue;
    fprintf(stderr, "  thread %d is %s, line %d\n", number(other), name_of(other.state), other.line);
    break;
  }
  abort();
}

void switch_to_scheduler() {
  Thread& thread = *machine.current;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(machine.fiber, NO_SYNC);
  swap_stacks(&thread.stack_pointer, machine.stack_pointer);
}

void run_thread() {
  acquire(&machine.launch_edge);
  machine.body(machine.closure);
  machine.current->state = State::exited;
  release(machine.barrier->next());
  release(&machine.end_edge);
  switch_to_scheduler();
}

void resume(Thread& thread) {
  machine.current = &thread;
  here.thread = thread.index;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(thread.fiber, NO_SYNC);
  swap_stacks(&machine.stack_pointer, thread.stack_pointer);
}

const Fiber& next_fiber() {
  const size_t i = machine.fibers_used++ % MAX_FIBERS;
  if (i < machine.fibers.size()) return machine.fibers[i];
  char* stack = static_cast<char*>(
      mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(stack, 4096, PROT_NONE);
  machine.fibers.push_back({stack, __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr});
  return machine.fibers.back();
}

void start_thread(Thread& thread) {
  const unsigned i = number(thread);
  const dim3& size = here.block_size;
  thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  thread.state = State::ready;
  thread.line = 0;
  thread.counter.clear();
  const Fiber& fiber = next_fiber();
  thread.fiber = fiber.sanitizers;
  void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES) - 2;  // as a call would leave the stack aligned
  *top = reinterpret_cast<void*>(&run_thread);
  thread.stack_pointer = top - 6;
}

// Lanes of one warp operation go on once all that its mask names are there.
bool release_warp(int first) {
  bool moved = false;
  const int end = std::min<int>(first + WARP, machine.threads.size());
  for (int i = first; i < end; ++i) {
    const Thread& leader = machine.threads[i];
    if (leader.state != State::at_warp_operation) continue;
    const unsigned mask = leader.mask;
    bool complete = true;
    for (int lane = 0; lane < WARP && complete; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= end) fail("a warp operation names a lane beyond the block", leader);
      const Thread& other = machine.threads[first + lane];
      if (other.state == State::exited) fail("a warp operation waits for an exited lane", leader);
      complete = other.state == State::at_warp_operation && other.mask == mask;
      if (complete && other.line != leader.line) fail("lanes of one mask are at different warp operations", leader);
    }
    if (!complete) continue;
    moved = true;
    ++machine.warps[first / WARP].edges[mask].meetings;
    uint64_t words[WARP] = {};
    for (int k = 0; k < end - first; ++k) words[k] = machine.threads[first + k].word;
    for (int k = 0; k < end - first; ++k) {
      if (!(mask >> k & 1)) continue;
      memcpy(machine.threads[first + k].received, words, sizeof words);
      machine.threads[first + k].state = State::ready;
    }
  }
  return moved;
}

bool release_barrier(int live) {
  const Thread* first = nullptr;
  int waiting = 0;
  for (const Thread& thread : machine.threads) {
    if (thread.state != State::at_barrier) continue;
    if (!first) first = &thread;
    ++waiting;
  }
  if (waiting == 0 || waiting < live) return false;
  for (Thread& thread : machine.threads) {
    if (thread.state != State::at_barrier) continue;
    if (thread.line != first->line) fail("divergent __syncthreads", thread);
    thread.state = State::ready;
  }
  ++machine.barrier->meetings;
  return true;
}

// Some warps stall for many rounds now and then: that is what brings out a missing barrier before a second use of
// shared memory. Returns whether one stalls now.
bool put_warps_to_sleep() {
  bool any = false;
  for (Warp& warp : machine.warps) {
    if (warp.asleep > 0)
      --warp.asleep;
    else if (random_below(16) == 0)
      warp.asleep = int(random_below(64));
    any |= warp.asleep > 0;
  }
  return any;
}

void run_block() {
  machine.shared.clear();
  machine.barrier = std::make_unique<Edges>();
  machine.warps = std::vector<Warp>((machine.threads.size() + WARP - 1) / WARP);
  if (!__tsan_create_fiber) machine.fibers_used = 0;
  std::vector<int> order;
  for (Thread& thread : machine.threads) {
    start_thread(thread);
    order.push_back(number(thread));
  }
  if (machine.seed == 1) std::reverse(order.begin(), order.end());
  int live = int(order.size());
  while (live > 0) {
    bool moved = false;
    const bool dozing = shuffled() && put_warps_to_sleep();
    if (shuffled()) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
    }
    for (int i : order) {
      Thread& thread = machine.threads[i];
      if (thread.state != State::ready || machine.warps[i / WARP].asleep > 0) continue;
      resume(thread);
      moved = true;
      live -= thread.state == State::exited;
    }
    for (size_t first = 0; first < machine.threads.size(); first += WARP) moved |= release_warp(int(first));
    moved |= release_barrier(live);
    if (live == 0 || moved || dozing) continue;
    for (const Thread& thread : machine.threads) {
      if (thread.state != State::exited) fail("deadlock", thread);
    }
  }
  for (Warp& warp : machine.warps) warp.traffic.add_to(machine.traffic[machine.kernel]);
}

}  // namespace

void launch(const char* kernel, dim3 grid, dim3 block, void (*body)(const void*), const void* closure) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  machine.kernel = kernel;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    fprintf(stderr, "cuda_on_cpu: %s has a grid or block that CUDA refuses\n", kernel);
    abort();
  }
  Untracked untracked;
  machine.body = body;
  machine.closure = closure;
  machine.random_state = machine.seed * 0x9E3779B97F4A7C15ull + 1;
  if (__tsan_get_current_fiber) machine.fiber = __tsan_get_current_fiber();
  machine.fibers_used = 0;
  here.grid_size = grid;
  here.block_size = block;
  ++machine.traffic[kernel].launches;
  machine.threads.resize(threads);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = machine.seed == 1 ? blocks - 1 - i : i;
  if (shuffled()) {
    for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  release(&machine.launch_edge);
  for (uint64_t i : order) {
    here.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block();
  }
  acquire(&machine.end_edge);
}

void meet_block(int line) {
  Thread& thread = *machine.current;
  thread.counter.meet();
  thread.state = State::at_barrier;
  thread.line = line;
  char* edge = machine.barrier->next();
  release(edge);
  switch_to_scheduler();
  acquire(edge);
}

static Edges& edges_of(Warp& warp, unsigned mask) {
  Untracked untracked;
  return warp.edges[mask];
}

const uint64_t* meet_warp(unsigned mask, uint64_t word, int line) {
  Thread& thread = *machine.current;
  Warp& warp = machine.warps[number(thread) / WARP];
  thread.line = line;
  if (!(mask >> lane() & 1)) fail("a warp operation by a lane that its mask does not name", thread);
  thread.counter.meet();
  thread.mask = mask;
  thread.word = word;
  thread.state = State::at_warp_operation;
  char* edge = edges_of(warp, mask).next();
  release(edge);
  switch_to_scheduler();
  acquire(edge);
  return thread.received;
}

int lane() { return number(*machine.current) % WARP; }

void* shared_memory(const void* key, size_t bytes) {
  Untracked untracked;
  std::unique_ptr<char[]>& memory = machine.shared[key];
  if (!memory) {
    memory.reset(new char[bytes]);
    memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

void count_access(const void* address, size_t bytes, bool is_store, int line) {
  Untracked untracked;
  Thread& thread = *machine.current;
  machine.warps[number(thread) / WARP].traffic.add(thread.counter, address, bytes, is_store, line);
}

}  // namespace cuda_on_cpu

extern "C" {

__attribute__((visibility("default"))) void aligner_emulation_set_seed(uint64_t seed) {
  cuda_on_cpu::machine.seed = seed;
}

__attribute__((visibility("default"))) void aligner_emulation_reset_traffic() { cuda_on_cpu::machine.traffic.clear(); }

// The `index`-th kernel since the last reset, by name; null past the last. Sectors are of 32 bytes.
__attribute__((visibility("default"))) const char* aligner_emulation_traffic(int index, uint64_t* launches,
                                                                             uint64_t* load_sectors,
                                                                             uint64_t* store_sectors) {
  for (const auto& [kernel, traffic] : cuda_on_cpu::machine.traffic) {
    if (index-- > 0) continue;
    *launches = traffic.launches;
    *load_sectors = traffic.load_sectors;
    *store_sectors = traffic.store_sectors;
    return kernel.c_str();
  }
  return nullptr;
}
}
