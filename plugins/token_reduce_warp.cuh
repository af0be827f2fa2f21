// Warps of the tuned kernels: reductions, asynchronous copies, matrix units, overlapping launches.
#ifndef JMP_TOKEN_REDUCE_WARP_CUH
#define JMP_TOKEN_REDUCE_WARP_CUH

#include "token_reduce_common.cuh"

#ifndef JMP_BLOCK_THREADS  // a multiple of 64; tests with a real thread each take fewer
#define JMP_BLOCK_THREADS 256
#endif

namespace {

#if defined(JMP_CUDA_ON_HOST)
#define JMP_ARCH JMP_HOST_ARCH
#elif defined(__CUDA_ARCH__)
#define JMP_ARCH __CUDA_ARCH__
#else
#define JMP_ARCH 0
#endif

constexpr int kThreads = JMP_BLOCK_THREADS;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kThreads % 64 == 0, "two warps share a row tile");

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ inline unsigned lanes_below() { return (1u << lane_index()) - 1u; }

// --- Reductions. The order is fixed, and every lane gets the same bits -----------------------------

// Over groups of kLanes neighbouring lanes, a power of two.
template <int kLanes>
__device__ inline float sum_lanes(float v) {
  JMP_UNROLL
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

template <int kLanes>
__device__ inline float max_lanes(float v) {  // a NaN loses
  JMP_UNROLL
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kAll, v, offset));
  }
  return v;
}

// Sum of the values of this lane and those below it.
__device__ inline int inclusive_sum(int v) {
  JMP_UNROLL
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int below = __shfl_up_sync(kAll, v, offset);
    if (lane_index() >= offset) v += below;
  }
  return v;
}

// --- Launches that overlap (compute capability 9.0 and newer; elsewhere they do nothing) -----------

// From here on, everything that the launches before this one wrote can be read.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may fill multiprocessors that this one no longer needs. It waits for our results.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// --- Clusters: blocks that run at the same time (compute capability 9.0 and newer) ------------------

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define JMP_HAS_CLUSTERS 1
#else
#define JMP_HAS_CLUSTERS 0
#endif

__device__ inline unsigned shared_address(const void* at) {
#ifdef JMP_CUDA_ON_HOST
  return static_cast<void>(at), 0u;
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
#endif
}

// What is at `mine` in this block's shared memory, in that of another.
template <typename V>
__device__ inline V* in_block(V* mine, int rank) {
#if defined(JMP_CUDA_ON_HOST)
  return cuda_on_host::in_block(mine, rank);
#elif JMP_HAS_CLUSTERS
  asm("mapa.u64 %0, %0, %1;" : "+l"(mine) : "r"(rank));
#else
  static_cast<void>(rank);
#endif
  return mine;
}

// Others will send this block so many bytes, once. By one thread, before the cluster begins.
__device__ inline void expect_bytes(uint64_t* arrivals, int bytes) {
#if defined(JMP_CUDA_ON_HOST)
  *arrivals = static_cast<uint64_t>(bytes);
#elif JMP_HAS_CLUSTERS
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals)),
      "r"(bytes)
      : "memory");
#endif
}

// Sends four bytes to `at` in a block of the cluster, which counts them in its `arrivals`.
__device__ inline void send(uint32_t* at, uint32_t value, uint64_t* arrivals, int rank) {
#if defined(JMP_CUDA_ON_HOST)
  *in_block(at, rank) = value;
  *in_block(arrivals, rank) -= sizeof value;
#elif JMP_HAS_CLUSTERS
  asm volatile(
      "{\n.reg .b32 at, arrivals;\n"
      "mapa.shared::cluster.u32 at, %0, %2;\n"
      "mapa.shared::cluster.u32 arrivals, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [at], %3, [arrivals];\n}" ::"r"(
          shared_address(at)),
      "r"(shared_address(arrivals)), "r"(rank), "r"(value)
      : "memory");
#else
  static_cast<void>(at), static_cast<void>(value), static_cast<void>(arrivals);
  static_cast<void>(rank);
#endif
}

// Until all that was expected has come. Cheaper than a barrier of the cluster, which has all that a block
// ever wrote reach the second level cache first.
__device__ inline void wait_for_bytes(uint64_t* arrivals) {
#if defined(JMP_CUDA_ON_HOST)
  cuda_on_host::wait_for_bytes(arrivals);
#elif JMP_HAS_CLUSTERS
  unsigned come = 0u;
  while (come == 0u) {
    asm volatile(
        "{\n.reg .pred come;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 come, [%1], 0;\n"
        "selp.u32 %0, 1, 0, come;\n}"
        : "=r"(come)
        : "r"(shared_address(arrivals))
        : "memory");
  }
#endif
}

// The others' shared memory may be written to once all have begun.
__device__ inline void begin_cluster() {
#if JMP_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void cluster_has_begun() {
#if JMP_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// All blocks wait for each other, and see what the others wrote, to device memory too.
__device__ inline void wait_for_cluster() {
#if defined(JMP_CUDA_ON_HOST)
  cuda_on_host::cluster_barrier();
#elif JMP_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A line of 128 bytes on its way into the second level cache.
__device__ inline void prefetch(const void* at) {
#ifdef JMP_CUDA_ON_HOST
  static_cast<void>(at);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// --- Copies of 16 bytes from global to shared memory -----------------------------------------------

__device__ inline void copy_16(void* shared, const void* global) {
#if JMP_ARCH < 800
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#elif defined(JMP_CUDA_ON_HOST)
  cuda_on_host::async_copy(shared, global);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
#endif
}

__device__ inline void commit_copies() {
#ifdef JMP_CUDA_ON_HOST
  cuda_on_host::async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most `pending` of this thread's groups are under way; a literal. A barrier has to follow
// before other threads may read.
#ifndef JMP_CUDA_ON_HOST
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define JMP_WAIT_COPIES(pending) asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory")
#else
#define JMP_WAIT_COPIES(pending)
#endif
#define JMP_DYNAMIC_SHARED(name)       \
  extern __shared__ uint4 jmp_shared[]; \
  char* const name = reinterpret_cast<char*>(jmp_shared)
#endif

// --- Matrix units ------------------------------------------------------------------------------------

// c += a * b for a 16x16 tile of halves and 16x8 halves, with float32 sums. Lane 4g+q holds a's rows
// g and g+8 at columns 2q, 2q+1 (a[0], a[1]) and 2q+8, 2q+9 (a[2], a[3]); b's column g at the same
// (b0, b1); c's rows g (c[0], c[1]) and g+8 at columns 2q, 2q+1.
// Before 8.0 in two halves of 8 columns of a.
__device__ inline void multiply_half_tile(float* c, uint32_t a0, uint32_t a1, uint32_t b) {
#ifdef JMP_CUDA_ON_HOST
  JMP_MMA_16X8X8(c, a0, a1, b);
#elif JMP_ARCH >= 750
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
#else
  static_cast<void>(c), static_cast<void>(a0), static_cast<void>(a1), static_cast<void>(b);
#endif
}

__device__ inline void multiply_tile(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
#if JMP_ARCH < 800
  multiply_half_tile(c, a[0], a[1], b0);
  multiply_half_tile(c, a[2], a[3], b1);
#elif defined(JMP_CUDA_ON_HOST)
  JMP_MMA_16X8X16(c, a, b0, b1);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ inline uint32_t word_at(const char* at) {
  return *reinterpret_cast<const uint32_t*>(at);
}

// Four 8x8 matrices of halves: lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], const char* row) {
#ifdef JMP_CUDA_ON_HOST
  const char* const* rows = cuda_on_host::exchange(row, __LINE__);
  for (int m = 0; m < 4; ++m) {
    to[m] = word_at(rows[m * 8 + lane_index() / 4] + lane_index() % 4 * 4);
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
#endif
}

// --- 16 bytes of T -----------------------------------------------------------------------------------

template <typename T>
constexpr int kPerLoad = static_cast<int>(16 / sizeof(T));

template <typename T>
__device__ inline void unpack(const uint4& raw, float* values) {
  T typed[kPerLoad<T>];
  memcpy(typed, &raw, sizeof raw);
  JMP_UNROLL
  for (int i = 0; i < kPerLoad<T>; ++i) values[i] = to_float(typed[i]);
}

template <typename T>
__device__ inline uint4 pack(const float* values) {
  T typed[kPerLoad<T>];
  JMP_UNROLL
  for (int i = 0; i < kPerLoad<T>; ++i) typed[i] = from_float<T>(values[i]);
  uint4 raw;
  memcpy(&raw, typed, sizeof raw);
  return raw;
}

__device__ inline uint4 load_16(const void* at) { return *static_cast<const uint4*>(at); }
__device__ inline void store_16(void* at, const uint4& raw) { *static_cast<uint4*>(at) = raw; }

}  // namespace

#endif  // JMP_TOKEN_REDUCE_WARP_CUH
