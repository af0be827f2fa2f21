// The few CUDA words of the kernels, for a C++17 host compiler on Linux.
//
// A launch runs the blocks one after the other, and the threads of a block in one of two ways:
//   fibers (the default): all on one CPU thread, switched at every barrier and warp operation. Fast
//     and the same every time, with the GPU's own block size. Threads that wait at different
//     barriers are an error.
//   JMP_HOST_THREADS: one real thread each, for ThreadSanitizer and AddressSanitizer. A barrier is
//     a pthread barrier, which ThreadSanitizer understands: two threads of a block that touch the
//     same element without a barrier between them are a data race there, whatever the timing.
// In both, a warp operation is an exchange of values and a barrier of 32 threads, all of which must
// have come to the same one; and an asynchronous copy wipes its target at once and fills it when
// it is waited for. What this cannot show: races between blocks or between launches, memory
// coalescing, speed, the rounding of a GPU's expf and logf and of its matrix units.
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
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, so one copy serves them all

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

struct Block {
  Block(unsigned threads, size_t shared_bytes)
      : barrier(threads), shared(shared_bytes == 0 ? nullptr : malloc(shared_bytes), &free) {
    for (unsigned first = 0; first < threads; first += kWarp) {
      const unsigned rest = threads - first;
      warps.push_back(std::make_unique<Warp>(rest < kWarp ? rest : kWarp));
    }
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<void, void (*)(void*)> shared;  // of its exact size: an overrun is seen
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
  unsigned block_barriers = 0;
  unsigned warp_barriers = 0;
  std::vector<std::vector<Copy>> copies{1};  // the last group is not committed yet
};
inline thread_local Thread* self = nullptr;

inline void block_barrier() { self->shared->barrier.wait(self->block_barriers); }
inline void barrier(const char* file, int line) {
  if (!skipped(file, line)) block_barrier();
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

template <typename Body>
void run_thread(Thread& me, int64_t blocks, size_t shared_bytes, const Body& body) {
  for (int64_t block = 0; block < blocks; ++block) {
    me.block.x = static_cast<unsigned>(block);
    if (me.thread.x == 0 && shared_bytes > 0) memset(me.shared->shared.get(), 0xff, shared_bytes);
    self = &me;
    block_barrier();
    body();
    self = &me;
    block_barrier();  // a block ends before the next begins
  }
}

#ifdef JMP_HOST_THREADS

template <typename Body>
void run_team(std::vector<Thread>& team, int64_t blocks, size_t shared_bytes, const Body& body) {
  std::vector<std::thread> threads;
  for (Thread& member : team) {
    threads.emplace_back([&] { run_thread(member, blocks, shared_bytes, body); });
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
  if (_setjmp(scheduler.home) != 0) return;
  Fiber& fiber = scheduler.fibers[scheduler.current];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

template <typename Body>
void run_team(std::vector<Thread>& team, int64_t blocks, size_t shared_bytes, const Body& body) {
  static std::vector<Thread>* the_team;
  static int64_t the_blocks;
  static size_t the_bytes;
  static const Body* the_body;
  the_team = &team;
  the_blocks = blocks;
  the_bytes = shared_bytes;
  the_body = &body;
  fiber_body = [](size_t at) { run_thread((*the_team)[at], the_blocks, the_bytes, *the_body); };
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
  for (bool all_done = false, progress = true; !all_done;) {
    if (!progress) fail("threads of a block wait at different barriers, or some have left");
    all_done = true;
    progress = false;
    for (size_t at = 0; at < team.size(); ++at) {
      Fiber& fiber = scheduler.fibers[at];
      if (fiber.done) continue;
      all_done = false;
      if (fiber.gate != nullptr && *fiber.gate == fiber.closed) continue;
      fiber.gate = nullptr;
      progress = true;
      resume(at, team[at]);
    }
    if (all_done) break;
  }
}

#endif

template <typename Body>
cudaError_t launch(int64_t blocks, int threads, size_t shared_bytes, const Body& body) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024) {
    return cudaErrorInvalidValue;
  }
  if (shared_bytes > (99u << 10)) return cudaErrorInvalidValue;  // what the smallest GPUs have
  skipped("", 0);
  Block block(static_cast<unsigned>(threads), shared_bytes);
  std::vector<Thread> team(static_cast<size_t>(threads));
  for (size_t t = 0; t < team.size(); ++t) {
    team[t].thread.x = static_cast<unsigned>(t);
    team[t].size.x = static_cast<unsigned>(threads);
    team[t].shared = &block;
  }
  run_team(team, blocks, shared_bytes, body);
  return cudaSuccess;
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::self->thread)
#define blockIdx (::cuda_on_host::self->block)
#define blockDim (::cuda_on_host::self->size)
#define __syncthreads() ::cuda_on_host::barrier(__FILE__, __LINE__)
#define JMP_DYNAMIC_SHARED(name) \
  char* const name = static_cast<char*>(::cuda_on_host::self->shared->shared.get())
#define JMP_WAIT_COPIES(pending) ::cuda_on_host::async_wait(pending, __FILE__, __LINE__)

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

struct Fragment {
  uint32_t a[4];
  uint32_t b[2];
};

inline float half_of(uint32_t pair, int which) {
  return __half2float(__half{static_cast<uint16_t>(which == 0 ? pair & 0xffffu : pair >> 16)});
}

// mma.sync.m16n8k16: lane 4g+q holds A's rows g, g+8 and B's column g at k = 2q, 2q+1, 2q+8, 2q+9;
// and C at rows g, g+8, columns 2q, 2q+1.
inline void mma_16x8x16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, int line) {
  const Fragment mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Fragment* all = exchange(mine, line);
  const int lane = static_cast<int>(self->thread.x % kWarp);
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4;
    const int column = lane % 4 * 2 + e % 2;
    float sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const int q = k % 8 / 2;
      const Fragment& of_row = all[row * 4 + q];
      const Fragment& of_column = all[column * 4 + q];
      sum += half_of(of_row.a[e / 2 + k / 8 * 2], k % 2) * half_of(of_column.b[k / 8], k % 2);
    }
    c[e] = sum;
  }
}

}  // namespace cuda_on_host

#define JMP_MMA_16X8X16(c, a, b0, b1) ::cuda_on_host::mma_16x8x16(c, a, b0, b1, __LINE__)

#endif  // JMP_CUDA_ON_HOST_H
