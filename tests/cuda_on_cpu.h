// Runs CUDA kernels on the CPU, for tests: the very .cuh that nvcc compiles, compiled by g++ instead.
//
//   #include "cuda_on_cpu.h"  // first: it stands in for cuda_runtime.h, cuda_bf16.h and cuda_fp16.h
//   #include "cuda/<op>.cuh"
//   cuda_on_cpu::Guarded x("x", data, bytes);  // a copy that ends where nothing can be read
//   std::string error = cuda_on_cpu::launch(grid, block, shared_bytes, order, [&] { kernel(x.data()); });
//
// Blocks run one after the other; the threads of a block are ucontext fibers, resumed in turn until each
// waits at a barrier, a shuffle or a vote, or has returned. `launch` gives "" or what went wrong, and where:
//   - __syncthreads that not every thread of the block reaches, or that they reach at different lines;
//   - __syncwarp, shuffles and votes that a thread named in the mask does not reach;
//   - accesses past the end of shared memory or of a Guarded array, and writes before its start;
//   - with the flags of cuda_sources.py, misaligned accesses and indices outside of arrays like float[8];
//   - stack overflow.
//
// Shared memory is NaN (every bit set) before each block, and so is what lies before it: what nobody wrote
// reads as NaN, for the test to see in the output. A missing barrier shows in this way when the reader runs
// before the writer; so run each kind of case in all orders. Order 0 runs warp after warp, each as far as it
// gets, 1 does so backwards, 2 mixes all threads (the same way every time).
//
// Not found: races without effect in these orders, and bank conflicts. Multiply-adds round twice here.
//
// Kernels declare shared memory with FASTSSL_DYNAMIC_SHARED(type, name) or FASTSSL_SHARED(type, name, count),
// see csrc/cuda/common.cuh; plain __shared__ does not compile here. One launch at a time in a process.
#pragma once

#define FASTSSL_CUDA_ON_CPU

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define FASTSSL_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(cuda_on_cpu::dynamic_shared())
#define FASTSSL_SHARED(type, name, count) \
  static char name##_site;                \
  type* const name =                      \
      static_cast<type*>(cuda_on_cpu::static_shared(&name##_site, #name, sizeof(type) * (count)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
using std::max;
using std::min;
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }

namespace cuda_on_cpu {

constexpr size_t kGuard = size_t{1} << 24, kStack = size_t{1} << 18;

// Memory that ends where nothing can be read or written, and is NaN from the start of its first page.
class Guarded {
 public:
  Guarded(std::string name, const void* data, size_t bytes) : name_(std::move(name)), bytes_(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), rounded = (bytes + 15) / 16 * 16;
    const size_t inside = (rounded + page - 1) / page * page;
    length_ = inside + 2 * kGuard;
    map_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + kGuard, inside, PROT_READ | PROT_WRITE) != 0) abort();
    data_ = map_ + kGuard + inside - rounded;
    poison();
    if (data != nullptr) memcpy(data_, data, bytes);
    all().push_back(this);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    all().erase(std::find(all().begin(), all().end(), this));
    munmap(map_, length_);
  }
  void* data() const { return data_; }
  // The whole of the pages, so that what lies before the array reads as NaN too.
  void poison() { memset(map_ + kGuard, 0xff, length_ - 2 * kGuard); }
  bool holds(const void* p) const { return p >= map_ && p < map_ + length_; }
  bool rim_written() const {
    const char *begin = map_ + kGuard, *end = map_ + length_ - kGuard;
    const auto written = [](char c) { return c != char(0xff); };
    return std::any_of<const char*>(begin, data_, written) ||
           std::any_of<const char*>(data_ + bytes_, end, written);
  }
  std::string out_of_bounds(const void* p) const {
    return "out of bounds of " + name_ + ": byte " + std::to_string(static_cast<const char*>(p) - data_) +
           " of " + std::to_string(bytes_);
  }
  std::string name() const { return name_; }
  static std::vector<Guarded*>& all() {
    static std::vector<Guarded*> list;
    return list;
  }

 private:
  std::string name_;
  size_t bytes_, length_;
  char *map_, *data_;
};

enum class State { ready, barrier, warp, done };
enum class Kind { sync, shuffle, vote };

// What a thread waits for, and what it brings along.
struct Wait {
  State state;
  Kind kind;
  unsigned mask;
  uint64_t value;
  int source;  // the thread whose value a shuffle wants
  const char* file;
  int line;
};

struct Fiber : Wait {
  ucontext_t context;
  uint64_t result;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::function<void()> body;
  std::unique_ptr<Guarded> dynamic;
  std::map<const void*, std::unique_ptr<Guarded>> statics;
  ucontext_t scheduler;
  char* stacks = nullptr;
  unsigned current = 0;
  std::string error;
  struct sigaction previous_fault, previous_trap;
};
inline Machine*& machine() {
  static Machine* one = nullptr;
  return one;
}

inline std::string at(const Fiber& f) {
  const char* base = strrchr(f.file, '/');
  return std::string(base != nullptr ? base + 1 : f.file) + ":" + std::to_string(f.line);
}
inline std::string thread_name(unsigned t) { return "thread " + std::to_string(t); }

inline void* dynamic_shared() { return machine()->dynamic->data(); }
inline void* static_shared(const void* site, const char* name, size_t bytes) {
  auto& memory = machine()->statics[site];
  if (!memory) memory = std::make_unique<Guarded>(std::string("shared array ") + name, nullptr, bytes);
  return memory->data();
}

// The current thread waits; the scheduler returns here once all that it waits for have come.
inline uint64_t wait(const Wait& what) {
  Machine& m = *machine();
  Fiber& f = m.fibers[m.current];
  static_cast<Wait&>(f) = what;
  swapcontext(&f.context, &m.scheduler);
  return f.result;
}

inline void run_fiber() {
  Machine& m = *machine();
  m.body();
  m.fibers[m.current].state = State::done;
  setcontext(&m.scheduler);
}

inline void on_fault(int signal, siginfo_t* info, void*) {
  Machine& m = *machine();
  if (signal == SIGILL) {
    m.error = thread_name(m.current) + ": misaligned access, or index outside of an array";
    setcontext(&m.scheduler);
  }
  const char* p = static_cast<const char*>(info->si_addr);
  for (const Guarded* g : Guarded::all()) {
    if (g->holds(p)) m.error = thread_name(m.current) + " " + g->out_of_bounds(p);
  }
  if (p >= m.stacks && p < m.stacks + m.fibers.size() * 2 * kStack)
    m.error = thread_name(m.current) + " overflows its stack";
  if (m.error.empty()) {
    sigaction(SIGSEGV, &m.previous_fault, nullptr);  // not ours: fault again, for the handler before this one
    return;
  }
  setcontext(&m.scheduler);
}

// Lets go the threads that wait for each other in one warp operation; false while some are still to come.
inline bool release_warp(Machine& m, unsigned first) {
  const unsigned threads = m.fibers.size(), begin = first / 32 * 32, end = std::min(begin + 32, threads);
  const Fiber& f = m.fibers[first];
  if (!(f.mask >> (first - begin) & 1)) {
    m.error = "the mask leaves out " + thread_name(first) + " itself at " + at(f);
    return false;
  }
  unsigned votes = 0;
  for (unsigned t = begin; t < end; ++t) {
    if (!(f.mask >> (t - begin) & 1)) continue;
    const Fiber& g = m.fibers[t];
    const bool same = g.state == State::warp && g.kind == f.kind && g.mask == f.mask && g.line == f.line &&
                      strcmp(g.file, f.file) == 0;
    if (g.state == State::done)
      m.error = thread_name(first) + " waits for " + thread_name(t) + " of its warp at " + at(f) +
                ", but it has returned";
    if (!same) return false;
    votes |= unsigned(g.value != 0) << (t - begin);
  }
  for (unsigned t = begin; t < end; ++t) {
    if (!(f.mask >> (t - begin) & 1)) continue;
    Fiber& g = m.fibers[t];
    const bool heard = unsigned(g.source) < threads && (f.mask >> (g.source - begin) & 1);
    g.result = g.kind == Kind::vote ? votes : heard ? m.fibers[g.source].value : ~uint64_t{0};
    g.state = State::ready;
  }
  return true;
}

// Lets go what can be let go among waiting warps of the group; false if nothing.
inline bool release_warps(Machine& m, const std::vector<unsigned>& group) {
  bool released = false;
  for (const unsigned t : group) {
    if (m.fibers[t].state == State::warp && m.error.empty()) released = release_warp(m, t) || released;
  }
  return released && m.error.empty();
}

// Every thread waits or is done, and no warp can go on: opens the block's barrier, or says who is missing.
inline void release_block(Machine& m) {
  const auto first = std::find_if(m.fibers.begin(), m.fibers.end(),
                                  [](const Fiber& f) { return f.state == State::barrier; });
  for (unsigned t = 0; t < m.fibers.size() && m.error.empty(); ++t) {
    const Fiber& f = m.fibers[t];
    const std::string name = thread_name(t);
    if (first == m.fibers.end()) {
      if (f.state == State::warp) m.error = name + " waits in vain for others of its warp at " + at(f);
      continue;
    }
    const std::string waits =
        thread_name(first - m.fibers.begin()) + " waits at __syncthreads, " + at(*first);
    if (f.state == State::done) m.error = waits + ", but " + name + " has returned";
    if (f.state == State::warp) m.error = waits + ", but " + name + " for its warp at " + at(f);
    if (f.state == State::barrier && at(f) != at(*first)) m.error = waits + ", but " + name + " at " + at(f);
  }
  if (m.error.empty()) {
    for (Fiber& f : m.fibers) f.state = State::ready;
  }
}

// Runs every thread of `order` that is ready, up to where it waits next; how many returned.
inline size_t resume(Machine& m, const std::vector<unsigned>& order) {
  size_t returned = 0;
  for (const unsigned t : order) {
    if (m.fibers[t].state != State::ready || !m.error.empty()) continue;
    m.current = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    swapcontext(&m.scheduler, &m.fibers[t].context);
    returned += m.fibers[t].state == State::done;
  }
  return returned;
}

// `groups` are the threads in the order in which they run: each group as far as it gets without the others.
inline void run_block(Machine& m, const std::vector<std::vector<unsigned>>& groups) {
  for (unsigned t = 0; t < m.fibers.size(); ++t) {
    Fiber& f = m.fibers[t];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = m.stacks + (2 * t + 1) * kStack;
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, run_fiber, 0);
    f.state = State::ready;
  }
  for (size_t left = m.fibers.size(); left > 0 && m.error.empty();) {
    for (const auto& group : groups) {
      do {
        left -= resume(m, group);
      } while (m.error.empty() && release_warps(m, group));
    }
    if (left > 0 && m.error.empty()) release_block(m);
  }
}

inline std::vector<unsigned> ordered(unsigned first, unsigned count, int order) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), first);
  if (order == 1) std::reverse(all.begin(), all.end());
  if (order == 2) std::shuffle(all.begin(), all.end(), std::mt19937(7));
  return all;
}

// The threads warp by warp, so that what other warps have not done yet shows; or all of them mixed.
inline std::vector<std::vector<unsigned>> groups_of(unsigned threads, int order) {
  if (order == 2) return {ordered(0, threads, order)};
  std::vector<std::vector<unsigned>> groups;
  for (const unsigned w : ordered(0, (threads + 31) / 32, order)) {
    groups.push_back(ordered(32 * w, std::min(32u, threads - 32 * w), order));
  }
  return groups;
}

// Runs body() in every thread of every block; "" or the first error.
inline std::string launch(dim3 grid, dim3 block, size_t shared_bytes, int order, std::function<void()> body) {
  Machine m;
  machine() = &m;
  gridDim = grid, blockDim = block;
  m.body = std::move(body);
  m.fibers.resize(block.x * block.y * block.z);
  m.dynamic = std::make_unique<Guarded>("dynamic shared memory", nullptr, shared_bytes);
  const size_t stacks = m.fibers.size() * 2 * kStack;  // below each, as much that cannot be touched
  m.stacks = static_cast<char*>(
      mmap(nullptr, stacks, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (size_t t = 0; t < m.fibers.size(); ++t) {
    mprotect(m.stacks + (2 * t + 1) * kStack, kStack, PROT_READ | PROT_WRITE);
  }
  std::vector<char> fault_stack(1 << 16);
  stack_t now = {}, before = {};
  now.ss_sp = fault_stack.data(), now.ss_size = fault_stack.size();
  sigaltstack(&now, &before);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &m.previous_fault);
  sigaction(SIGILL, &action, &m.previous_trap);

  for (const unsigned b : ordered(0, grid.x * grid.y * grid.z, order)) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    m.dynamic->poison();
    for (auto& [site, memory] : m.statics) memory->poison();
    run_block(m, groups_of(m.fibers.size(), order));
    for (const Guarded* g : Guarded::all()) {
      if (m.error.empty() && g->rim_written()) m.error = "written outside of " + g->name();
    }
    if (!m.error.empty()) {
      const std::string block_name =
          std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z);
      m.error = "block (" + block_name + "): " + m.error;
      break;
    }
  }
  sigaction(SIGSEGV, &m.previous_fault, nullptr);
  sigaction(SIGILL, &m.previous_trap, nullptr);
  sigaltstack(&before, nullptr);
  munmap(m.stacks, stacks);
  machine() = nullptr;
  return m.error;
}

// The value of v in thread `lane` of the warp.
template <class T>
T shuffle(unsigned mask, T v, int lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "lanes exchange at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  const int source = machine()->current / 32 * 32 + lane;
  bits = wait({State::warp, Kind::shuffle, mask, bits, source, file, line});
  memcpy(&v, &bits, sizeof(T));
  return v;
}
inline unsigned vote(unsigned mask, bool yes, const char* file, int line) {
  return static_cast<unsigned>(wait({State::warp, Kind::vote, mask, yes, 0, file, line}));
}
inline int lane_id() { return machine()->current % 32; }

}  // namespace cuda_on_cpu

#include "cuda_on_cpu_device.h"
