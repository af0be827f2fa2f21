// The few CUDA words of token_reduce_kernel.cu, for a C++17 host compiler and pthreads.
//
// A launch starts one real thread per CUDA thread of a block and runs the blocks one after the
// other. __syncthreads() is a pthread barrier, which ThreadSanitizer understands: two threads of
// a block that touch the same shared or global element without a barrier between them are a data
// race there, whatever the timing. What this cannot show: races between blocks, memory coalescing,
// speed, and the rounding of a GPU's expf/logf.
#ifndef JMP_CUDA_ON_HOST_H
#define JMP_CUDA_ON_HOST_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time, so one copy serves them all

// --- Errors and streams --------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

namespace cuda_on_host {

inline cudaError_t last_error = cudaSuccess;

struct Index {
  unsigned x;
};
inline thread_local Index thread_index{0};
inline thread_local Index block_index{0};
inline thread_local Index block_size{0};

// --- Launch and barrier ---------------------------------------------------------------------------

// Two, taken in turns: a pthread barrier is one synchronization object to ThreadSanitizer, so a
// thread that already waits for the next barrier would seem ordered before one that has yet to
// leave this one, and their races would go unreported.
inline pthread_barrier_t block_barriers[2];
inline thread_local unsigned barriers_passed = 0;

inline void wait_for_block() { pthread_barrier_wait(&block_barriers[barriers_passed++ % 2]); }

// JMP_SKIP_BARRIER=LINE takes the __syncthreads() of that line out: a planted bug, to prove that
// ThreadSanitizer notices.
inline int skipped_line() {
  static const int line = [] {
    const char* text = getenv("JMP_SKIP_BARRIER");
    return text == nullptr ? 0 : atoi(text);
  }();
  return line;
}

inline void barrier(int line) {
  if (line != skipped_line()) wait_for_block();
}

template <typename Body>
void launch(int64_t blocks, int threads, Body body) {
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  skipped_line();
  for (pthread_barrier_t& b : block_barriers) {
    pthread_barrier_init(&b, nullptr, static_cast<unsigned>(threads));
  }
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t) {
    team.emplace_back([=] {
      thread_index.x = static_cast<unsigned>(t);
      block_size.x = static_cast<unsigned>(threads);
      for (int64_t block = 0; block < blocks; ++block) {
        block_index.x = static_cast<unsigned>(block);
        body();
        wait_for_block();  // a block ends before the next begins
      }
    });
  }
  for (std::thread& member : team) member.join();
  for (pthread_barrier_t& b : block_barriers) pthread_barrier_destroy(&b);
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::thread_index)
#define blockIdx (::cuda_on_host::block_index)
#define blockDim (::cuda_on_host::block_size)
#define __syncthreads() ::cuda_on_host::barrier(__LINE__)
#define JMP_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), ::cuda_on_host::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }))

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_host::last_error;
  cuda_on_host::last_error = cudaSuccess;
  return error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    default: return "unspecified launch failure";
  }
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

#endif  // JMP_CUDA_ON_HOST_H
