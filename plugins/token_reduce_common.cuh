// What all kernels of JMPTokenReduce share: types, values, addresses, the order of ratings, launch.
#ifndef JMP_TOKEN_REDUCE_COMMON_CUH
#define JMP_TOKEN_REDUCE_COMMON_CUH

#include <float.h>
#include <math.h>
#include <string.h>

#include "token_reduce_kernel.h"

#ifdef JMP_CUDA_ON_HOST
#include "tests/cuda_on_host.h"
#define JMP_UNROLL
#define JMP_UNROLL_2
#define JMP_UNROLL_4
#define JMP_NO_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define JMP_UNROLL _Pragma("unroll")
#define JMP_UNROLL_2 _Pragma("unroll 2")
#define JMP_UNROLL_4 _Pragma("unroll 4")
#define JMP_NO_UNROLL _Pragma("unroll 1")  // where code is dearer than a loop
#endif

namespace {

constexpr int kMerged = 1;  // fates in `index`; 0: kept
constexpr int kPruned = 2;

using Params = JmpTokenReduceParams;

__host__ __device__ inline int patch_tokens(const Params& p) { return p.tokens - p.num_prefix; }
__host__ __device__ inline int query_rows(const Params& p) {
  return p.importance == JMP_CLASS_ROW ? 1 : p.tokens;
}

__host__ __device__ constexpr int64_t product(int64_t a, int64_t b, int64_t c = 1) {
  return a * b * c;
}
__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// --- Values ------------------------------------------------------------------------------------

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ inline bool is_nan(float v) { return v != v; }

// --- Addresses (64-bit: B*N*W may exceed 2^31) ---------------------------------------------------

__device__ inline int64_t token_row(const Params& p, int sample, int token) {
  return static_cast<int64_t>(sample) * p.tokens + token;
}

template <typename T>
__device__ inline const T* query_of(const Params& p, const T* qkv, int sample, int token,
                                    int head) {
  return qkv + token_row(p, sample, token) * p.qkv_width + head * p.head_dim;
}

template <typename T>
__device__ inline const T* key_of(const Params& p, const T* qkv, int sample, int token, int head) {
  return query_of(p, qkv, sample, token, p.num_heads + head);
}

template <typename T>
__device__ inline T size_of(const Params& p, const T* size, int sample, int token) {
  return size[token_row(p, p.size_batch == 1 ? 0 : sample, token)];
}

// --- Definitions that every version shares -------------------------------------------------------

// JMP_DISTINCT: what a patch token is ranked by, larger first. `redundancy`: its largest cosine to
// a more important token, -inf if there is none. An importance that is no number counts as none.
__device__ inline float distinct_rating(float importance, float redundancy) {
  if (redundancy == -INFINITY) return INFINITY;
  return (importance > 0.0f ? sqrtf(importance) : 0.0f) * (1.0f - redundancy);
}

// --- Launch --------------------------------------------------------------------------------------

// How the blocks of a launch stand to each other and to the launch before it.
struct Grid {
  int64_t blocks;
  size_t shared_bytes;
  // The kernel may start while the one before it in the stream still runs; it then has to call
  // wait_for_previous() before it reads what that one wrote.
  bool overlap = false;
  int cluster = 1;  // blocks that run at the same time and may wait for each other
};

#ifdef JMP_CUDA_ON_HOST
template <typename... Formal, typename... Actual>
cudaError_t launch(void (*kernel)(Formal...), const Grid& grid, int threads,
                   cudaStream_t /*stream*/, Actual... arguments) {
  return cuda_on_host::launch(
      grid.blocks, threads, grid.shared_bytes, [=] { kernel(arguments...); }, grid.cluster);
}
#else
template <typename... Formal, typename... Actual>
cudaError_t launch(void (*kernel)(Formal...), const Grid& grid, int threads, cudaStream_t stream,
                   Actual... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (grid.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
#endif

// --- Scratch memory ------------------------------------------------------------------------------

// Buffers one after the other in one allocation, each aligned to 256 bytes; with a null base it
// only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename V>
  V* take(int64_t count) {
    V* at = base_ == nullptr ? nullptr : reinterpret_cast<V*>(base_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(V) + 255) / 256 * 256;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace

#endif  // JMP_TOKEN_REDUCE_COMMON_CUH
