// The few CUDA words of the kernels, for a C++17 host compiler on Linux.
//
// A launch runs the blocks one after the other (JMP_HOST_ORDER=SEED in the environment: in another
// order), shared memory full of 0xff before each, and the threads of a block in one of two ways:
//   fibers (the default): all on one CPU thread, switched at every barrier and warp operation. Fast
//     and the same every time, with the GPU's own block size. Threads that wait at different
//     barriers are an error.
//   JMP_HOST_THREADS: one real thread each, for ThreadSanitizer and AddressSanitizer. A barrier is
//     a pthread barrier, which ThreadSanitizer understands: two threads of a block that touch the
//     same element without a barrier between them are a data race there, whatever the timing.
// In both, a warp operation is an exchange of values and a barrier of 32 threads, all of which must
// have come to the same one; and an asynchronous copy wipes its target at once and fills it when
// it is waited for. -DJMP_HOST_ARCH=750 is a GPU before 8.0: matrix products in two halves, copies
// at once. The blocks of a cluster run at the same time, as fibers only: a cluster barrier that is
// missing shows in what they compute, and a block gets as many bytes as it waits for, or that is an
// error. What this cannot show: other races between blocks or between
// launches, memory coalescing, speed, the rounding of a GPU's expf and logf and of its matrix units.
#ifndef JMP_CUDA_ON_HOST_H
#define JMP_CUDA_ON_HOST_H

#undef _FORTIFY_SOURCE  // its longjmp takes a switch of stacks for an attack
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One block runs at a time, so one copy serves them all; all of it in one place, to be filled and, in
// clusters, changed for another block's. (GCC: AddressSanitizer leaves a section of its own alone
// without -fsanitize-sections=jmp_shared.)
#define __shared__ static __attribute__((section("jmp_shared")))

#ifndef JMP_HOST_ARCH
#define JMP_HOST_ARCH 800
#endif

extern "C" {  // of the linker; null without any static shared memory
extern char __start_jmp_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_jmp_shared[] __attribute__((weak, visibility("hidden")));
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// --- Errors and streams --------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMisalignedAddress: return "misaligned address";
    default: return "unspecified launch failure";
  }
}

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kSlot = 64;  // bytes that a thread hands to its warp in one operation

// JMP_SKIP=FILE:LINE takes the barrier, or the wait for copies, of that line out: a planted bug, to
// prove that the tests notice.
inline bool skipped(const char* file, int line) {
  static const std::string planted = [] {
    const char* text = getenv("JMP_SKIP");
    return std::string(text == nullptr ? "" : text);
  }();
  if (planted.empty()) return false;
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) == planted;
}

// JMP_SKIP_CLUSTER=N takes the N-th cluster barrier of each kernel out, from 1 on.
inline bool skips_cluster(int nth) {
  const char* const text = getenv("JMP_SKIP_CLUSTER");
  return text != nullptr && atoi(text) == nth;
}

// JMP_HOST_LOG=FILE: a line for each launch, blocks, threads of one, bytes of dynamic shared memory,
// blocks of a cluster.
inline void log_launch(int64_t blocks, int threads, size_t shared_bytes, int cluster) {
  const char* const path = getenv("JMP_HOST_LOG");
  FILE* const file = path == nullptr ? nullptr : fopen(path, "a");
  if (file == nullptr) return;
  fprintf(file, "%lld %d %zu %d\n", static_cast<long long>(blocks), threads, shared_bytes, cluster);
  fclose(file);
}

// 0, 1, ... in the order in which they are to run.
inline std::vector<int64_t> order_of(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  const char* const seed = getenv("JMP_HOST_ORDER");
  if (seed == nullptr) return order;
  std::mt19937_64 random(strtoull(seed, nullptr, 10));
  for (size_t left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[random() % left]);
  }
  return order;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda_on_host: %s\n", what);
  abort();
}

// --- Barriers: of real threads, of fibers -----------------------------------------------------------

#ifdef JMP_HOST_THREADS

// Two, taken in turns: a pthread barrier is one synchronization object to ThreadSanitizer, so a
// thread that already waits for the next barrier would seem ordered before one that has yet to
// leave this one, and their races would go unreported.
class Barrier {
 public:
  explicit Barrier(unsigned threads) {
    for (pthread_barrier_t& b : barriers_) pthread_barrier_init(&b, nullptr, threads);
  }
  Barrier(const Barrier&) = delete;
  ~Barrier() {
    for (pthread_barrier_t& b : barriers_) pthread_barrier_destroy(&b);
  }
  void wait(unsigned& passed) { pthread_barrier_wait(&barriers_[passed++ % 2]); }

 private:
  pthread_barrier_t barriers_[2];
};

#else

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  const unsigned* gate = nullptr;  // waits until this is no longer `closed`
  unsigned closed = 0;
  bool started = false;
  bool done = false;
};
constexpr size_t kStack = 128 << 10;

struct Scheduler {
  jmp_buf home;
  std::vector<Fiber> fibers;
  size_t current = 0;
};
inline Scheduler scheduler;

inline void to_scheduler() {
  if (_setjmp(scheduler.fibers[scheduler.current].at) == 0) _longjmp(scheduler.home, 1);
}

class Barrier {
 public:
  explicit Barrier(unsigned threads) : expected_(threads) {}
  void wait(unsigned& passed) {
    ++passed;
    if (++arrived_ == expected_) {
      arrived_ = 0;
      ++generation_;
      return;
    }
    Fiber& fiber = scheduler.fibers[scheduler.current];
    fiber.gate = &generation_;
    fiber.closed = generation_;
    to_scheduler();
  }

 private:
  unsigned expected_;
  unsigned arrived_ = 0;
  unsigned generation_ = 0;
};

#endif

// --- A block and its threads --------------------------------------------------------------------------

struct Index {
  unsigned x;
};

struct Warp {
  explicit Warp(unsigned threads) : barrier(threads) {}
  Barrier barrier;
  alignas(16) char slots[2][kWarp][kSlot];  // in turns: who reads one may not have to wait
  int lines[2][kWarp];
};

inline size_t static_bytes() {
  return static_cast<size_t>(__stop_jmp_shared - __start_jmp_shared);
}

// Plain bytes, behind the sanitizers' back: between variables are AddressSanitizer's red zones.
__attribute__((no_sanitize("address", "thread"))) inline void copy_bytes(volatile char* to,
                                                                         const volatile char* from,
                                                                         size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = from == nullptr ? static_cast<char>(0xff) : from[i];
}

struct Block {
  Block(unsigned threads, size_t shared_bytes)
      : barrier(threads),
        shared(shared_bytes == 0 ? nullptr : malloc(shared_bytes), &free),
        dynamic_bytes(shared_bytes),
        statics(static_bytes()) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      const unsigned rest = threads - first;
      warps.push_back(std::make_unique<Warp>(rest < kWarp ? rest : kWarp));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<void, void (*)(void*)> shared;  // of its exact size: an overrun is seen
  size_t dynamic_bytes;
  std::vector<char> statics;  // static shared memory while another block of the cluster runs

  void poison() {
    if (dynamic_bytes > 0) memset(shared.get(), 0xff, dynamic_bytes);
    copy_bytes(__start_jmp_shared, nullptr, static_bytes());
  }
};

// Blocks that run at the same time: of a cluster, or one.
struct Cluster {
  Cluster(unsigned blocks_in_it, unsigned threads, size_t shared_bytes)
      : barrier(blocks_in_it * threads) {
    for (unsigned b = 0; b < blocks_in_it; ++b) {
      blocks.push_back(std::make_unique<Block>(threads, shared_bytes));
    }
    running = blocks[0].get();
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  Block* running;  // whose static shared memory is in place

  void bring_in(Block* block) {
    if (block == running) return;
    copy_bytes(running->statics.data(), __start_jmp_shared, static_bytes());
    copy_bytes(__start_jmp_shared, block->statics.data(), static_bytes());
    running = block;
  }
};

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  Index thread{0};
  Index block{0};
  Index size{0};
  Block* shared = nullptr;
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // of the block in its cluster
  int waited = 0;     // cluster barriers of this kernel
  unsigned cluster_barriers = 0;
  unsigned block_barriers = 0;
  unsigned warp_barriers = 0;
  std::vector<std::vector<Copy>> copies{1};  // the last group is not committed yet
};
inline thread_local Thread* self = nullptr;

inline void block_barrier() { self->shared->barrier.wait(self->block_barriers); }
inline void barrier(const char* file, int line) {
  if (!skipped(file, line)) block_barrier();
}
inline void whole_cluster() { self->cluster->barrier.wait(self->cluster_barriers); }
inline void cluster_barrier() {
  if (!skips_cluster(++self->waited)) whole_cluster();
}

// Where `mine`, of this block's dynamic shared memory, lies in another block of the cluster.
template <typename V>
V* in_block(V* mine, int rank) {
  char* const here = static_cast<char*>(self->shared->shared.get());
  char* const there = static_cast<char*>(self->cluster->blocks[static_cast<size_t>(rank)]->shared.get());
  return reinterpret_cast<V*>(there + (reinterpret_cast<char*>(mine) - here));
}

inline void wait_for_bytes(const uint64_t* arrivals) {
  cluster_barrier();
  if (skips_cluster(self->waited)) return;
  if (*arrivals != 0) fail("a block got more or less than it expected");
}

// Hands `mine` to the warp and returns what all its threads gave, by lane.
template <typename V>
const V* exchange(const V& mine, int line) {
  static_assert(sizeof(V) <= kSlot, "larger than a slot");
  Warp& warp = *self->shared->warps[self->thread.x / kWarp];
  const unsigned turn = self->warp_barriers % 2;
  const unsigned lane = self->thread.x % kWarp;
  // One after the other, so that lane k's value is where `slots` as an array of V has it.
  memcpy(&warp.slots[turn][0][0] + lane * sizeof(V), &mine, sizeof(V));
  warp.lines[turn][lane] = line;
  warp.barrier.wait(self->warp_barriers);
  if (warp.lines[turn][0] != line) fail("threads of a warp are at different warp operations");
  return reinterpret_cast<const V*>(&warp.slots[turn][0][0]);
}

// Until it is waited for, what is at `to` is neither the old nor the new. Plain stores, not memset:
// of so few bytes the compiler makes stores that ThreadSanitizer does not see.
inline void async_copy(void* to, const void* from) {
  for (int i = 0; i < 4; ++i) static_cast<volatile uint32_t*>(to)[i] = 0xffffffffu;
  self->copies.back().push_back({to, from});
}
inline void async_commit() { self->copies.emplace_back(); }
inline void async_wait(size_t pending, const char* file, int line) {
  if (skipped(file, line)) return;
  std::vector<std::vector<Copy>>& groups = self->copies;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

// --- Launch -------------------------------------------------------------------------------------------

using Order = std::vector<int64_t>;  // of clusters

template <typename Body>
void run_thread(Thread& me, const Order& order, const Body& body) {
  for (const int64_t at : order) {
    me.block.x = static_cast<unsigned>(at) * static_cast<unsigned>(me.cluster->blocks.size()) +
                 me.rank;
    me.waited = 0;
    if (me.thread.x == 0) me.shared->poison();
    self = &me;
    whole_cluster();
    body();
    self = &me;
    whole_cluster();  // a block ends before the next begins
  }
}

#ifdef JMP_HOST_THREADS

template <typename Body>
void run_team(std::vector<Thread>& team, const Order& order, const Body& body) {
  std::vector<std::thread> threads;
  for (Thread& member : team) {
    threads.emplace_back([&] { run_thread(member, order, body); });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

inline thread_local void (*fiber_body)(size_t);

inline void fiber_main() {
  fiber_body(scheduler.current);
  scheduler.fibers[scheduler.current].done = true;
  _longjmp(scheduler.home, 1);
}

// Runs a fiber until it waits or ends; the locals of the loop below are out of longjmp's reach.
inline void resume(size_t at, Thread& member) {
  scheduler.current = at;
  self = &member;
  member.cluster->bring_in(member.shared);
  if (_setjmp(scheduler.home) != 0) return;
  Fiber& fiber = scheduler.fibers[scheduler.current];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

template <typename Body>
void run_team(std::vector<Thread>& team, const Order& order, const Body& body) {
  static std::vector<Thread>* the_team;
  static const Order* the_order;
  static const Body* the_body;
  the_team = &team;
  the_order = &order;
  the_body = &body;
  fiber_body = [](size_t at) { run_thread((*the_team)[at], *the_order, *the_body); };
  if (scheduler.fibers.size() < team.size()) scheduler.fibers.resize(team.size());
  for (size_t at = 0; at < team.size(); ++at) {
    Fiber& fiber = scheduler.fibers[at];
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStack]);
    fiber.gate = nullptr;
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &fiber_main, 0);
  }
  // One block as far as it goes, then the next of the cluster: who does not wait for the others reads
  // what they have not written yet.
  bool moved = true;
  for (size_t left = team.size(); left > 0;) {
    if (!moved) fail("threads of a block wait at different barriers, or some have left");
    moved = false;
    for (size_t first = 0; first < team.size(); first += team[0].size.x) {
      for (bool progress = true; progress;) {
        progress = false;
        for (size_t at = first; at < first + team[0].size.x; ++at) {
          Fiber& fiber = scheduler.fibers[at];
          if (fiber.done || (fiber.gate != nullptr && *fiber.gate == fiber.closed)) continue;
          fiber.gate = nullptr;
          progress = moved = true;
          resume(at, team[at]);
          if (fiber.done) --left;
        }
      }
    }
  }
}

#endif

template <typename Body>
cudaError_t launch(int64_t blocks, int threads, size_t shared_bytes, const Body& body,
                   int cluster = 1) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  if (cluster < 1 || cluster > 8 || blocks % cluster != 0) return cudaErrorInvalidValue;
#ifdef JMP_HOST_THREADS
  if (cluster > 1) fail("real threads run one block at a time: no clusters");
#endif
  if (shared_bytes > (99u << 10)) return cudaErrorInvalidValue;  // what the smallest GPUs have
  skipped("", 0);
  log_launch(blocks, threads, shared_bytes, cluster);
  const auto size = static_cast<unsigned>(threads);
  Cluster together(static_cast<unsigned>(cluster), size, shared_bytes);
  std::vector<Thread> team;
  for (const int64_t rank : order_of(cluster)) {
    for (unsigned t = 0; t < size; ++t) {
      Thread& member = team.emplace_back();
      member.thread.x = t;
      member.size.x = size;
      member.rank = static_cast<unsigned>(rank);
      member.shared = together.blocks[static_cast<size_t>(rank)].get();
      member.cluster = &together;
    }
  }
  run_team(team, order_of(blocks / cluster), body);
  return cudaSuccess;
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::self->thread)
#define blockIdx (::cuda_on_host::self->block)
#define blockDim (::cuda_on_host::self->size)
#define __syncthreads() ::cuda_on_host::barrier(__FILE__, __LINE__)
#define JMP_DYNAMIC_SHARED(name) \
  char* const name = static_cast<char*>(::cuda_on_host::self->shared->shared.get())
#if JMP_HOST_ARCH >= 800
#define JMP_WAIT_COPIES(pending) ::cuda_on_host::async_wait(pending, __FILE__, __LINE__)
#else
#define JMP_WAIT_COPIES(pending)
#endif

// --- Warp operations: by all 32 threads, hence no mask ------------------------------------------------

#define __shfl_xor_sync(mask, value, lanes) \
  (::cuda_on_host::exchange(value, __LINE__)[(threadIdx.x % 32) ^ static_cast<unsigned>(lanes)])
#define __shfl_sync(mask, value, lane) \
  (::cuda_on_host::exchange(value, __LINE__)[static_cast<unsigned>(lane) % 32])
#define __shfl_up_sync(mask, value, lanes) \
  (::cuda_on_host::shift(value, -static_cast<int>(lanes), __LINE__))
#define __shfl_down_sync(mask, value, lanes) \
  (::cuda_on_host::shift(value, static_cast<int>(lanes), __LINE__))
#define __ballot_sync(mask, predicate) (::cuda_on_host::ballot(predicate, __LINE__))

namespace cuda_on_host {

template <typename V>
V shift(const V& value, int lanes, int line) {
  const int lane = static_cast<int>(self->thread.x % kWarp);
  const V* all = exchange(value, line);
  const int from = lane + lanes;
  return all[from < 0 || from >= kWarp ? lane : from];
}

inline unsigned ballot(bool predicate, int line) {
  const int* all = exchange(static_cast<int>(predicate), line);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) bits |= all[lane] != 0 ? 1u << lane : 0u;
  return bits;
}

}  // namespace cuda_on_host

// --- Bits ----------------------------------------------------------------------------------------------

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
template <typename V>
V atomicMax(V* at, V v) {
  V old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(at, &old, v, false, __ATOMIC_RELAXED,
                                                 __ATOMIC_RELAXED)) {
  }
  return old;
}

inline unsigned atomicOr(unsigned* at, unsigned v) {
  return __atomic_fetch_or(at, v, __ATOMIC_RELAXED);
}

// --- Half precision -------------------------------------------------------------------------------

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t fraction = h.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  const uint32_t bits = sign | wide << 23 | fraction << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline __half __float2half_rn(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return __half{0x7fffu};  // the GPU's NaN
  if (magnitude >= 0x47800000u) return __half{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 2^16
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  // Below 2^-14 a half is a multiple of 2^-24: drop that many more bits of the mantissa.
  const int drop = exponent >= -14 ? 13 : 13 + (-14 - exponent);
  if (drop > 24) return __half{sign};  // below half of the smallest subnormal
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  uint32_t kept = mantissa >> drop;
  const uint32_t rest = mantissa & ((1u << drop) - 1u);
  const uint32_t tie = 1u << (drop - 1);
  if (rest > tie || (rest == tie && (kept & 1u) != 0)) ++kept;
  // For a normal number `kept` holds the hidden bit: it and a carry both add to the exponent.
  const uint32_t base = exponent >= -14 ? static_cast<uint32_t>(exponent + 14) << 10 : 0u;
  return __half{static_cast<uint16_t>(sign | (base + kept))};
}

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {  // to nearest, ties to even
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return __nv_bfloat16{0x7fffu};  // the GPU's NaN
  return __nv_bfloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// --- Matrix units ----------------------------------------------------------------------------------------

namespace cuda_on_host {

template <int kHalves>
struct Fragment {
  uint32_t a[2 * kHalves];
  uint32_t b[kHalves];
};

inline float half_of(uint32_t pair, int which) {
  return __half2float(__half{static_cast<uint16_t>(which == 0 ? pair & 0xffffu : pair >> 16)});
}

// mma.sync.m16n8k16 or, of one half, m16n8k8: lane 4g+q holds A's rows g, g+8 and B's column g at
// k = 2q, 2q+1 (of the second half 2q+8, 2q+9); and C at rows g, g+8, columns 2q, 2q+1.
template <int kHalves>
void mma(float* c, const Fragment<kHalves>& mine, int line) {
  const Fragment<kHalves>* all = exchange(mine, line);
  const int lane = static_cast<int>(self->thread.x % kWarp);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4;
    const int column = lane % 4 * 2 + e % 2;
    float sum = c[e];
    for (int k = 0; k < 8 * kHalves; ++k) {
      const int q = k % 8 / 2;
      const Fragment<kHalves>& of_row = all[row * 4 + q];
      const Fragment<kHalves>& of_column = all[column * 4 + q];
      sum += half_of(of_row.a[e / 2 + k / 8 * 2], k % 2) * half_of(of_column.b[k / 8], k % 2);
    }
    c[e] = sum;
  }
}

}  // namespace cuda_on_host

#define JMP_MMA_16X8X16(c, a, b0, b1) \
  ::cuda_on_host::mma<2>(c, {{(a)[0], (a)[1], (a)[2], (a)[3]}, {b0, b1}}, __LINE__)
#define JMP_MMA_16X8X8(c, a0, a1, b) ::cuda_on_host::mma<1>(c, {{a0, a1}, {b}}, __LINE__)

#endif  // JMP_CUDA_ON_HOST_H
