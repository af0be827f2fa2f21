// JMPTokenReduce: keep the K most attended or most distinct patch tokens, merge or prune the rest.
//
//   nvcc -O3 -std=c++17 -arch=native -shared -Xcompiler -fPIC token_reduce_kernel.cu -o libjmp.so
//   g++  -O2 -std=c++17 -pthread -DJMP_CUDA_ON_HOST -x c++ token_reduce_kernel.cu ...   (no GPU)
//
// This file is the host side: it checks, counts scratch memory, chooses and launches. Two versions
// of the same definition (README.md):
//   tuned  one launch where a sample fits shared memory (token_reduce_resident.cuh), else measure,
//          rate, match, merge: three launches, four for JMP_DISTINCT (token_reduce_*.cuh)
//   plain  nine small kernels, to be read, for whatever the tuned one does not take
//          (token_reduce_reference.cuh)
#include "token_reduce_kernel.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <initializer_list>

#include "token_reduce_match.cuh"
#include "token_reduce_merge.cuh"
#include "token_reduce_received.cuh"
#include "token_reduce_reference.cuh"
#include "token_reduce_resident.cuh"

#ifndef JMP_TEST_SUBSET  // 1: float32 and float16, heads of up to 32 columns; compiles in half the time
#define JMP_TEST_SUBSET 0
#endif

namespace {

// --- Checks --------------------------------------------------------------------------------------

int refuse(char* message, size_t message_size, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
int refuse(char* message, size_t message_size, const char* format, ...) {
  if (message != nullptr && message_size > 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, message_size, format, arguments);
    va_end(arguments);
  }
  return 1;
}

size_t element_bytes(const Params& p) { return p.dtype == JMP_FLOAT32 ? 4 : 2; }

int check_tuned(const Params& p, char* message, size_t message_size) {
  constexpr int kWidest = JMP_TEST_SUBSET ? 32 : kMaxHeadDim;
  const int access = static_cast<int>(16 / element_bytes(p));  // elements
  if (p.head_dim % 8 != 0 || p.head_dim > kWidest)
    return refuse(message, message_size, "head_dim: expected a multiple of 8 up to %d, found %d",
                  kWidest, p.head_dim);
  if (p.num_heads > kMaxHeads || p.num_heads * p.head_dim > kMaxInner)
    return refuse(message, message_size,
                  "expected at most %d heads and num_heads*head_dim <= %d, found %d heads of %d",
                  kMaxHeads, kMaxInner, p.num_heads, p.head_dim);
  if (patch_tokens(p) > kMaxPatches)
    return refuse(message, message_size, "x: expected at most %d patch tokens, found %d",
                  kMaxPatches, patch_tokens(p));
  if (p.channels % access != 0 || p.qkv_width % access != 0)
    return refuse(message, message_size,
                  "expected widths of x and qkv that are multiples of %d, found %d and %d", access,
                  p.channels, p.qkv_width);
  return 0;
}

bool is_tuned(const Params& p) { return check_tuned(p, nullptr, 0) == 0; }

bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// What is wrong with the memory of a call.
cudaError_t check_memory(std::initializer_list<const void*> tensors, const void* workspace) {
  for (const void* tensor : tensors) {
    if (tensor == nullptr) return cudaErrorInvalidValue;
  }
  if (workspace == nullptr) return cudaErrorInvalidValue;
  return is_aligned(workspace) ? cudaSuccess : cudaErrorMisalignedAddress;
}

// --- Launches of the tuned version -----------------------------------------------------------------

// What launches have to know of the device that is current.
struct Device {
  bool overlap;          // our launches may overlap
  bool clusters;         // blocks may wait for each other
  bool steps;            // or each step may be a launch
  int enough_blocks;     // that fill it: two per multiprocessor
  uint32_t shared_bytes; // that a block may be allowed
  int number;            // negative: not known
};

#if defined(JMP_CUDA_ON_HOST)
// The tests choose: "BLOCKS,BYTES" or, with clusters, "BLOCKS,BYTES,1".
Device this_device() {
  Device found{false, false, true, 256, 101376, 0};
  int clusters = 0;
  const char* const wish = getenv("JMP_HOST_DEVICE");
  if (wish != nullptr) {
    sscanf(wish, "%d,%u,%d", &found.enough_blocks, &found.shared_bytes, &clusters);
  }
  found.clusters = clusters != 0;
  return found;
}
#else

// Launches that overlap cut the gaps between our kernels, and clusters make them one. What decides
// is the code that runs: the wait for the launch before, and for the other blocks, is in kernels
// compiled for 9.0 and newer alone, while PTX of 8.x, which a driver translates for any newer GPU,
// lacks it and would read what is not there yet. A driver older than CUDA 12.3 cannot capture
// launches that overlap into a graph.
int code_version() {  // 90, say; 0: not known
  cudaFuncAttributes code{};
  return cudaFuncGetAttributes(&code, match_kernel<2>) == cudaSuccess ? code.ptxVersion : 0;
}

bool switched_off(const char* name) {
  const char* const wish = getenv(name);
  return wish != nullptr && strcmp(wish, "0") == 0;
}

bool may_overlap() {
#if CUDART_VERSION < 12030
  return false;
#else
  int driver = 0;
  return !switched_off("JMP_DEPLOY_OVERLAP") && cudaDriverGetVersion(&driver) == cudaSuccess &&
         driver >= 12030 && code_version() >= 90;
#endif
}

int ask(cudaDeviceAttr what, int device, int otherwise) {
  int found = 0;
  return cudaDeviceGetAttribute(&found, what, device) == cudaSuccess ? found : otherwise;
}

Device ask_device(int device) {
  const int version = code_version();
#if defined(JMP_NO_CLUSTERS)  // tests of the other way on a GPU that has them
  const bool clusters = false;
  const bool steps = version > 0;
#else
  const bool clusters = version >= 90 && !switched_off("JMP_DEPLOY_CLUSTERS");
  const bool steps = version > 0 && version < 90;
#endif
  const int multiprocessors = ask(cudaDevAttrMultiProcessorCount, device, 128);
  const int shared = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, 0);
  return {may_overlap(), clusters, steps, 2 * multiprocessors, static_cast<uint32_t>(shared), device};
}

// Asked once for each device.
Device this_device() {
  constexpr int kDevices = 64;
  // Bit 0: asked; 1: overlap; 2: clusters; 3: steps; from 4 and 32 on: the numbers.
  static std::atomic<uint64_t> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {false, false, false, 256, 0, -1};
  if (device < 0 || device >= kDevices) return ask_device(device);
  uint64_t packed = known[device].load(std::memory_order_relaxed);
  if (packed == 0) {
    const Device found = ask_device(device);
    packed = 1u | (found.overlap ? 2u : 0u) | (found.clusters ? 4u : 0u) |
             (found.steps ? 8u : 0u) | static_cast<uint32_t>(found.enough_blocks) << 4 |
             static_cast<uint64_t>(found.shared_bytes) << 32;
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {(packed & 2u) != 0, (packed & 4u) != 0, (packed & 8u) != 0,
          static_cast<int>(packed >> 4 & 0xfffffffu), static_cast<uint32_t>(packed >> 32), device};
}
#endif

// Lets a kernel have as much shared memory as the device has for a block. Once for each device.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, std::atomic<uint64_t>& allowed, const Device& device) {
#if defined(JMP_CUDA_ON_HOST)
  static_cast<void>(kernel), static_cast<void>(allowed), static_cast<void>(device);
  return cudaSuccess;
#else
  const uint64_t bit = device.number >= 0 && device.number < 64 ? uint64_t{1} << device.number : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaFuncAttributes code{};
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(device.shared_bytes - code.sharedSizeBytes));
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
#endif
}

// --- A sample in shared memory ---------------------------------------------------------------------

bool is_resident(const Params& p, const Device& device) {
  if (p.head_dim > kResidentHeadDim || patch_tokens(p) > kResidentPatches) return false;
  return static_cast<uint32_t>(ResidentLayout(p).bytes + kStaticShared) <= device.shared_bytes;
}

// Blocks that a sample is divided among: while each has a multiprocessor of its own, up to a portable
// cluster; pairs of a cluster while two find room on each. Machine code for 9.0 and newer has no steps
// to launch one by one: there, without clusters, a sample has one block.
int choose_groups(const Params& p, const Device& device) {
#if defined(JMP_GROUPS)
  static_cast<void>(p), static_cast<void>(device);
  return JMP_GROUPS;
#else
  if (!device.clusters && !device.steps) return 1;
  int groups = kMostGroups;
  while (groups > 1 && 2 * product(p.batch, groups) > device.enough_blocks) groups /= 2;
  constexpr int kReserved = 1024;  // bytes of shared memory that CUDA takes for itself in each block
  const bool pairs =
      device.clusters && product(p.batch, 2) <= device.enough_blocks &&
      2 * (ResidentLayout(p).bytes + kReserved) <= static_cast<int>(device.shared_bytes);
  return groups == 1 && pairs ? 2 : groups;
#endif
}

template <typename T>
cudaError_t run_resident(const Params& p, const Device& device, const T* x, const T* qkv,
                         const T* size, T* y, T* out_size, T* log_size, int32_t* index,
                         const Scratch& w, cudaStream_t stream) {
  int groups = choose_groups(p, device);
  Grid grid{product(p.batch, groups), static_cast<size_t>(ResidentLayout(p).bytes)};
  const auto start = [&](auto kernel, std::atomic<uint64_t>& allowed) {
    const cudaError_t error = allow_shared(kernel, allowed, device);
    if (error != cudaSuccess) return error;
    return launch(kernel, grid, kThreads, stream, p, x, qkv, size, w, y, out_size, log_size,
                  index, groups);
  };
  static std::atomic<uint64_t> allowed[6];
  if (groups > 1 && device.clusters) {
    grid.cluster = groups;
    const cudaError_t error = start(resident_kernel<T, kCluster>, allowed[5]);
#if defined(JMP_CUDA_ON_HOST)
    return error;
#else
    if (error != cudaErrorInvalidClusterSize) return error;
    static_cast<void>(cudaGetLastError());  // a part of a GPU without room for eight: one block does
    groups = 1;
    grid = {p.batch, grid.shared_bytes};
#endif
  }
  if (groups == 1) return start(resident_kernel<T, kAlone>, allowed[4]);
  cudaError_t error = start(resident_kernel<T, kMeasure>, allowed[0]);
  if (error == cudaSuccess && p.selection == JMP_DISTINCT) {
    error = start(resident_kernel<T, kRate>, allowed[1]);
  }
  if (error == cudaSuccess) error = start(resident_kernel<T, kMatch>, allowed[2]);
  if (error == cudaSuccess) error = start(resident_kernel<T, kMerge>, allowed[3]);
  return error;
}

// --- Attention received ----------------------------------------------------------------------------

template <typename T, int kSteps>
cudaError_t launch_received(const Params& p, const T* qkv, const T* size, const Scratch& w,
                            cudaStream_t stream) {
  const Grid grid{product(p.batch, p.num_heads, attention_groups(p)),
                  2 * sizeof(ColumnTile<T, kSteps>)};
  const cudaError_t error =
      launch(attention_kernel<T, kSteps, false>, grid, kThreads, stream, p, qkv, size, w);
  if (error != cudaSuccess) return error;
  return launch(attention_kernel<T, kSteps, true>, grid, kThreads, stream, p, qkv, size, w);
}

// --- A sample in device memory ---------------------------------------------------------------------

template <typename T, int kLanes>
cudaError_t launch_measure(const Params& p, const T* qkv, const T* size, const Scratch& w,
                           cudaStream_t stream) {
  const int64_t blocks = p.batch * divide_up(p.tokens, kThreads / kLanes);
  const size_t shared = sizeof(float) * static_cast<size_t>(p.num_heads * p.head_dim);
  return launch(measure_kernel<T, kLanes>, Grid{blocks, shared}, kThreads, stream, p, qkv, size, w);
}

// Tiles of columns that a block goes through; 0 for all. With a small batch more blocks take fewer
// each, until they fill a GPU. The result has the same bits.
template <int kSteps>
int choose_span(const Params& p, int enough_blocks) {
  for (const int span : {0, 8, 4, 2}) {
    if (p.batch * rate_units<kSteps>(patch_tokens(p), span) >= enough_blocks) return span;
  }
  return 1;
}

// Rating, selection and similarity.
template <int kSteps>
cudaError_t launch_decide(const Params& p, const Scratch& w, const Device& device,
                          cudaStream_t stream) {
  if (p.selection == JMP_DISTINCT) {
    const int span = choose_span<kSteps>(p, device.enough_blocks);
    const int units = static_cast<int>(rate_units<kSteps>(patch_tokens(p), span));
    const cudaError_t error =
        launch(rate_kernel<kSteps>,
               Grid{product(p.batch, units), rate_shared(p, kTileBytes<kSteps>), device.overlap},
               kThreads, stream, p, w, span, units);
    if (error != cudaSuccess) return error;
  }
  const Grid grid{product(p.batch, match_groups(p)), match_shared(p, kTileBytes<kSteps>),
                  device.overlap};
  return launch(match_kernel<kSteps>, grid, kThreads, stream, p, w);
}

template <typename T>
cudaError_t run_tuned(const Params& p, const T* x, const T* qkv, const T* size, T* y, T* out_size,
                      T* log_size, int32_t* index, char* scratch, cudaStream_t stream) {
  const Scratch w(p, scratch);
  const Device device = this_device();
  cudaError_t error = cudaSuccess;
  if (p.importance == JMP_ATTENTION_RECEIVED) {
#if JMP_TEST_SUBSET
    error = launch_received<T, 4>(p, qkv, size, w, stream);
#else
    error = p.head_dim <= 64 ? launch_received<T, 4>(p, qkv, size, w, stream)
                             : launch_received<T, 8>(p, qkv, size, w, stream);
#endif
    if (error != cudaSuccess) return error;
  }
  if (is_resident(p, device)) {
    return run_resident(p, device, x, qkv, size, y, out_size, log_size, index, w, stream);
  }
  if (p.head_dim <= 32) {
    error = launch_measure<T, 4>(p, qkv, size, w, stream);
    if (error == cudaSuccess) error = launch_decide<2>(p, w, device, stream);
  }
#if !JMP_TEST_SUBSET
  else if (p.head_dim <= 64) {
    error = launch_measure<T, 8>(p, qkv, size, w, stream);
    if (error == cudaSuccess) error = launch_decide<4>(p, w, device, stream);
  } else {
    error = launch_measure<T, 16>(p, qkv, size, w, stream);
    if (error != cudaSuccess) return error;
    error = p.head_dim <= 96 ? launch_decide<6>(p, w, device, stream)
                             : launch_decide<8>(p, w, device, stream);
  }
#endif
  if (error != cudaSuccess) return error;
  const int64_t blocks = divide_up(product(p.batch, p.num_prefix + p.num_keep), int64_t{kWarps});
  return launch(merge_kernel<T>, Grid{blocks, 0, device.overlap}, kThreads, stream, p, x, size, w, y,
                out_size, log_size, index);
}

// --- Both versions ---------------------------------------------------------------------------------

template <typename T>
cudaError_t run(const Params& p, bool tuned, const void* x, const void* qkv, const void* size,
                void* y, void* out_size, void* log_size, int32_t* index, void* workspace,
                void* stream) {
  const auto function = tuned ? &run_tuned<T> : &plain::run_plain<T>;
  return function(p, static_cast<const T*>(x), static_cast<const T*>(qkv),
                  static_cast<const T*>(size), static_cast<T*>(y), static_cast<T*>(out_size),
                  static_cast<T*>(log_size), index, static_cast<char*>(workspace),
                  static_cast<cudaStream_t>(stream));
}

cudaError_t run_any(const Params& p, bool tuned, const void* x, const void* qkv, const void* size,
                    void* y, void* out_size, void* log_size, int32_t* index,
                    void* workspace, void* stream) {
  auto function = p.dtype == JMP_FLOAT32 ? &run<float> : &run<__half>;
#if !JMP_TEST_SUBSET
  if (p.dtype == JMP_BFLOAT16) function = &run<__nv_bfloat16>;
#endif
  return function(p, tuned, x, qkv, size, y, out_size, log_size, index, workspace, stream);
}

}  // namespace

extern "C" {

int jmp_token_reduce_check_attributes(const JmpTokenReduceParams* params, char* message,
                                      size_t message_size) {
  const Params& p = *params;
  if (p.num_prefix < 0)
    return refuse(message, message_size, "num_prefix: expected >= 0, found %d", p.num_prefix);
  if (p.num_keep < 1)
    return refuse(message, message_size, "num_keep: expected >= 1, found %d", p.num_keep);
  if (p.num_heads < 1)
    return refuse(message, message_size, "num_heads: expected >= 1, found %d", p.num_heads);
  if (p.head_dim < 1)
    return refuse(message, message_size, "head_dim: expected >= 1, found %d", p.head_dim);
  if (!(p.scale > 0.0f) || p.scale > FLT_MAX)
    return refuse(message, message_size, "scale: expected a finite number > 0, found %g",
                  static_cast<double>(p.scale));
  if (p.tau != p.tau) return refuse(message, message_size, "tau: expected a number, found NaN");
  if (!(p.merge_weight >= 0.0f && p.merge_weight <= 1.0f))
    return refuse(message, message_size, "merge_weight: expected 0 to 1, found %g",
                  static_cast<double>(p.merge_weight));
  if (p.granularity != JMP_PER_TOKEN && p.granularity != JMP_PER_SAMPLE)
    return refuse(message, message_size, "granularity: expected 0 (token) or 1 (sample), found %d",
                  p.granularity);
  if (p.importance != JMP_CLASS_ROW && p.importance != JMP_ATTENTION_RECEIVED)
    return refuse(message, message_size,
                  "importance: expected 0 (class token's row) or 1 (attention received), found %d",
                  p.importance);
  if (p.importance == JMP_CLASS_ROW && p.num_prefix < 1)
    return refuse(message, message_size,
                  "importance 0 (class token's row) needs num_prefix >= 1, found %d",
                  p.num_prefix);
  if (p.proportional != 0 && p.proportional != 1)
    return refuse(message, message_size, "proportional: expected 0 or 1, found %d",
                  p.proportional);
  if (p.selection != JMP_BY_IMPORTANCE && p.selection != JMP_DISTINCT)
    return refuse(message, message_size,
                  "selection: expected 0 (importance) or 1 (distinct), found %d", p.selection);
  if (p.num_keep > INT32_MAX - p.num_prefix)
    return refuse(message, message_size,
                  "num_prefix + num_keep: expected < 2^31, found %d + %d", p.num_prefix,
                  p.num_keep);
  const int64_t inner = product(p.num_heads, p.head_dim);
  if (2 * inner > INT32_MAX)
    return refuse(message, message_size,
                  "2*num_heads*head_dim: expected < 2^31, found num_heads %d and head_dim %d",
                  p.num_heads, p.head_dim);
  return 0;
}

int jmp_token_reduce_check(const JmpTokenReduceParams* params, char* message,
                           size_t message_size) {
  if (jmp_token_reduce_check_attributes(params, message, message_size) != 0) return 1;
  const Params& p = *params;
  if (p.dtype != JMP_FLOAT32 && p.dtype != JMP_FLOAT16 && p.dtype != JMP_BFLOAT16)
    return refuse(message, message_size,
                  "dtype: expected 0 (float32), 1 (float16) or 2 (bfloat16), found %d", p.dtype);
  if (p.batch < 1)
    return refuse(message, message_size, "x: expected batch >= 1, found %d", p.batch);
  if (p.channels < 1)
    return refuse(message, message_size, "x: expected channels >= 1, found %d", p.channels);
  if (p.tokens < 1 || p.tokens - p.num_prefix < p.num_keep)
    return refuse(message, message_size,
                  "x: expected at least num_prefix + num_keep = %d + %d tokens, found %d",
                  p.num_prefix, p.num_keep, p.tokens);
  if (p.qkv_width < 2 * p.num_heads * p.head_dim)
    return refuse(message, message_size,
                  "qkv: expected a width of at least 2*num_heads*head_dim = %d, found %d",
                  2 * p.num_heads * p.head_dim, p.qkv_width);
  if (p.size_batch != 1 && p.size_batch != p.batch)
    return refuse(message, message_size, "size: expected a batch of 1 or %d (that of x), found %d",
                  p.batch, p.size_batch);
  // One block per (sample, query row, head) and one per token: a grid holds 2^31 - 1 blocks.
  // Divisions, since the product of the three could exceed 64 bits.
  const int64_t tokens = product(p.batch, p.tokens);
  const int64_t rows = product(p.batch, query_rows(p));
  if (tokens > INT32_MAX || rows > INT32_MAX / p.num_heads)
    return refuse(message, message_size,
                  "expected batch*tokens and batch*query rows*num_heads < 2^31, found batch %d, "
                  "tokens %d, num_heads %d",
                  p.batch, p.tokens, p.num_heads);
  return 0;
}

int jmp_token_reduce_check_tuned(const JmpTokenReduceParams* params, char* message,
                                 size_t message_size) {
  if (jmp_token_reduce_check(params, message, message_size) != 0) return 1;
  return check_tuned(*params, message, message_size);
}

int jmp_token_reduce_is_tuned(const JmpTokenReduceParams* params) {
  return jmp_token_reduce_check_tuned(params, nullptr, 0) == 0 ? 1 : 0;
}

void jmp_token_reduce_prepare(void) { static_cast<void>(this_device()); }

size_t jmp_token_reduce_workspace_bytes(const JmpTokenReduceParams* params) {
  if (jmp_token_reduce_check(params, nullptr, 0) != 0) return 0;
  // Where the tuned kernels run, the plain ones may yet have to: x, qkv or y may be misaligned.
  const size_t bytes = plain::PlainScratch(*params, nullptr).bytes;
  // Memory for these shapes must do for smaller ones: TensorRT asks for a profile's largest. With
  // fewer tokens the tuned kernels may run, which need more for each.
  Params fewer = *params;
  if (patch_tokens(fewer) > kMaxPatches) fewer.tokens = fewer.num_prefix + kMaxPatches;
  if (fewer.num_keep > kMaxPatches || !is_tuned(fewer)) return bytes;
  const size_t tuned_bytes = Scratch(fewer, nullptr).bytes;
  return tuned_bytes > bytes ? tuned_bytes : bytes;
}

int jmp_token_reduce(const JmpTokenReduceParams* params, const void* x, const void* qkv,
                     const void* size, void* y, void* out_size, void* log_size,
                     int32_t* index, void* workspace, void* stream) {
  if (jmp_token_reduce_check(params, nullptr, 0) != 0) return cudaErrorInvalidValue;
  const cudaError_t error = check_memory({x, qkv, size, y, out_size, log_size}, workspace);
  if (error != cudaSuccess) return error;
  const bool tuned = is_tuned(*params) && is_aligned(x) && is_aligned(qkv) && is_aligned(y);
  return run_any(*params, tuned, x, qkv, size, y, out_size, log_size, index, workspace,
                 stream);
}

size_t jmp_token_reduce_plain_workspace_bytes(const JmpTokenReduceParams* params) {
  if (jmp_token_reduce_check(params, nullptr, 0) != 0) return 0;
  return plain::PlainScratch(*params, nullptr).bytes;
}

int jmp_token_reduce_plain(const JmpTokenReduceParams* params, const void* x, const void* qkv,
                           const void* size, void* y, void* out_size, void* log_size,
                           int32_t* index, void* workspace, void* stream) {
  if (jmp_token_reduce_check(params, nullptr, 0) != 0) return cudaErrorInvalidValue;
  const cudaError_t error = check_memory({x, qkv, size, y, out_size, log_size}, workspace);
  if (error != cudaSuccess) return error;
  return run_any(*params, false, x, qkv, size, y, out_size, log_size, index, workspace,
                 stream);
}

const char* jmp_token_reduce_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // extern "C"
