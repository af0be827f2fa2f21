// Tuned version, step 1: one pass over the keys. And the softmax that its readers finish.
#ifndef JMP_TOKEN_REDUCE_MEASURE_CUH
#define JMP_TOKEN_REDUCE_MEASURE_CUH

#include "token_reduce_warp.cuh"

namespace {

constexpr int kMaxHeads = 64;
constexpr int kMaxInner = 8192;   // H*d: the query row lies in shared memory as float32
constexpr int kMaxPatches = 2048;
constexpr int kMaxHeadDim = 128;
constexpr uint32_t kNobody = 0xffffu;
constexpr uint32_t kFar = 0x8000u;  // beside the slot of the nearest: too unlike, so pruned

// Importance is the class token's row of attention, which these kernels compute on the way. Else it
// is there already (token_reduce_received.cuh).
__device__ inline bool asks_one_row(const Params& p) { return p.importance == JMP_CLASS_ROW; }

// Matrix units take 16 columns at a time. One kernel for each of 2, 4, 6 and 8 such steps.
__host__ __device__ inline int matrix_steps(int head_dim) {
  return static_cast<int>(divide_up(head_dim, 32)) * 2;
}

// Of the softmax of one row of attention, to base 2.
struct RowStats {
  float top;      // its largest logit
  float inverse;  // 1 / denominator
};

// What the kernels hand to each other, in device memory.
struct Scratch {
  float* logits;         // [B, H, N] attention logits of the class token; or attention received
  RowStats* rows;        // [B, H, N] JMP_ATTENTION_RECEIVED
  __half* metric;        // [B, M, 2, 16*steps] unit vectors, rounded to half; and what that lost
  uint32_t* redundancy;  // [B, M] JMP_DISTINCT: as `ordered` bits, 0 for none
  float* importance;     // [B, M] JMP_DISTINCT
  int32_t* kept;         // [B, K] patch index of each critical token, ascending
  uint32_t* source;      // [B, M-K] every other token, ascending: index | nearest slot << 16
  float* similarity;     // [B, M-K] to that nearest critical token
  size_t bytes;

  Scratch(const Params& p, char* base) {
    Arena arena(base);
    const int64_t patches = product(p.batch, patch_tokens(p));
    const int64_t rest = patches - product(p.batch, p.num_keep);
    const int64_t distinct = p.selection == JMP_DISTINCT ? patches : 0;
    // Whatever way a sample goes, the last one is used to its end: the tests cut there.
    const int steps = matrix_steps(p.head_dim);
    metric = arena.take<__half>(product(patches, 32, steps < 4 ? 4 : steps));  // resident: 4
    const int64_t rows_of_heads = product(p.batch, p.tokens, p.num_heads);
    logits = arena.take<float>(rows_of_heads);
    rows = arena.take<RowStats>(p.importance == JMP_ATTENTION_RECEIVED ? rows_of_heads : 0);
    kept = arena.take<int32_t>(product(p.batch, p.num_keep));
    source = arena.take<uint32_t>(rest);
    redundancy = arena.take<uint32_t>(distinct);
    importance = arena.take<float>(distinct);
    similarity = arena.take<float>(rest);
    bytes = arena.bytes();
  }
};

__device__ inline const __half* metric_of(const Params& p, const Scratch& w, int sample) {
  return w.metric + product(sample, patch_tokens(p), 32 * matrix_steps(p.head_dim));
}

// --- The keys --------------------------------------------------------------------------------------

// One pass over the keys of tokens `begin` to `end`: logits of the class token, by `put(head * N +
// token, logit)`, and unit vectors of the head-mean keys, hi to `unit(patch)` and lo `low` bytes behind
// it. All threads call `started()` before the first `put`. kLanes neighbouring lanes take one token, each 8 columns of every head: the sum over heads needs no
// exchange between lanes, and one head's key is one line of memory. With kAhead the loads of the next
// round are under way while one is worked on: for blocks that take many tokens, since it takes
// registers. `query`: shared memory for H*d numbers.
template <typename T, int kLanes, bool kAhead, typename Put, typename Started, typename Unit>
__device__ inline void measure_tokens(const Params& p, const T* qkv, const T* size, int sample,
                                      int begin, int end, float* query, int low, Put put,
                                      Started started, Unit unit) {
  constexpr int kTokens = kThreads / kLanes;
  constexpr int kLoads = static_cast<int>(8 * sizeof(T) / 16);
  // Heads whose loads are under way at once. A lane keeps one logit of them.
  constexpr int kBatch = kLanes < 8 && kLoads == 1 ? 4 : 6 / kLoads;
  const int me = static_cast<int>(threadIdx.x);
  const int part = me % kLanes;
  const bool column = part * 8 < p.head_dim;  // lanes may outnumber the columns
  uint4 raw[kBatch][kLoads];
  const auto fetch = [&](int token, int first) {
    const bool here = column && token < end;
    const T* keys = key_of(p, qkv, sample, here ? token : 0, 0) + (here ? part * 8 : 0);
    JMP_UNROLL
    for (int u = 0; u < kBatch; ++u) {
      JMP_UNROLL
      for (int l = 0; l < kLoads; ++l) {
        raw[u][l] = uint4{0u, 0u, 0u, 0u};
        if (here && first + u < p.num_heads) {
          raw[u][l] = load_16(keys + (first + u) * p.head_dim + l * kPerLoad<T>);
        }
      }
    }
  };
  if (kAhead) fetch(begin + me / kLanes, 0);
  const auto size_at = [&](int token) {
    return to_float(size_of(p, size, sample, token < end ? token : 0));
  };
  float own_size = size_at(begin + me / kLanes);

  // The class token's query: of every head first the columns 0-3, 8-11, ... and then the others, so
  // that neighbouring lanes read neighbouring 16 bytes.
  const T* row = query_of(p, qkv, sample, 0, 0);
  const int inner = p.num_heads * p.head_dim;
  JMP_NO_UNROLL
  for (int c = me * kPerLoad<T>; c < inner; c += kThreads * kPerLoad<T>) {
    float values[kPerLoad<T>];
    unpack<T>(load_16(row + c), values);
    const int of_head = c % p.head_dim;
    float* const to = query + (c - of_head) + of_head / 8 * 4;
    JMP_UNROLL
    for (int i = 0; i < kPerLoad<T>; i += 4) {
      store_16(to + (of_head + i) % 8 / 4 * (p.head_dim / 2), pack<float>(values + i));
    }
  }
  __syncthreads();
  started();

  const float share = 1.0f / static_cast<float>(p.num_heads);
  for (int base = begin; base < end; base += kTokens) {  // the whole block
    const int token = base + me / kLanes;
    const bool there = token < end;
    const bool here = there && column;
    const float log_size = p.proportional ? logf(own_size) : 0.0f;
    own_size = size_at(token + kTokens);
    float mean[8] = {};
    for (int first = 0; first < p.num_heads; first += kBatch) {
      if (!kAhead) fetch(token, first);
      uint4 now[kBatch][kLoads];
      memcpy(now, raw, sizeof raw);
      const bool last = first + kBatch >= p.num_heads;
      if (kAhead) fetch(last ? token + kTokens : token, last ? 0 : first + kBatch);
      float logit = 0.0f;  // of head first + part
      JMP_UNROLL
      for (int u = 0; u < kBatch; ++u) {
        float dot = 0.0f;
        if (here && first + u < p.num_heads) {
          const float* at = query + (first + u) * p.head_dim + part * 4;
          float q[8];
          unpack<float>(load_16(at), q);
          unpack<float>(load_16(at + p.head_dim / 2), q + 4);
          float values[8];
          JMP_UNROLL
          for (int l = 0; l < kLoads; ++l) unpack<T>(now[u][l], values + l * kPerLoad<T>);
          JMP_UNROLL
          for (int i = 0; i < 8; ++i) {
            dot += q[i] * values[i];
            mean[i] += values[i];
          }
        }
        dot = sum_lanes<kLanes>(dot);
        if (part == u) logit = dot;
      }
      if (part < kBatch && first + part < p.num_heads && there && asks_one_row(p)) {
        put((first + part) * p.tokens + token, p.scale * logit + log_size);
      }
    }
    float squares = 0.0f;
    JMP_UNROLL
    for (int i = 0; i < 8; ++i) {
      mean[i] *= share;
      squares += mean[i] * mean[i];
    }
    const float inverse = 1.0f / fmaxf(sqrtf(sum_lanes<kLanes>(squares)), 1e-12f);
    if (!there || token < p.num_prefix || part * 16 >= low) continue;
    float lost[8];
    JMP_UNROLL
    for (int i = 0; i < 8; ++i) {
      mean[i] *= inverse;
      lost[i] = mean[i] - __half2float(__float2half_rn(mean[i]));
    }
    char* const to = unit(token - p.num_prefix) + part * 16;
    store_16(to, pack<__half>(mean));
    store_16(to + low, pack<__half>(lost));
  }
}

// Grid: tiles of kThreads / kLanes tokens of each sample.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) measure_kernel(Params p, const T* qkv, const T* size,
                                                           Scratch w) {
  JMP_DYNAMIC_SHARED(shared);
  constexpr int kTokens = kThreads / kLanes;
  const int tiles = static_cast<int>(divide_up(p.tokens, kTokens));
  const int sample = static_cast<int>(blockIdx.x) / tiles;
  const int begin = static_cast<int>(blockIdx.x) % tiles * kTokens;
  const int end = begin + kTokens < p.tokens ? begin + kTokens : p.tokens;
  let_next_start();
  if (p.selection == JMP_DISTINCT) {
    for (int t = begin + static_cast<int>(threadIdx.x); t < end; t += kThreads) {
      if (t >= p.num_prefix) w.redundancy[product(sample, patch_tokens(p)) + t - p.num_prefix] = 0u;
    }
  }
  const int width = 16 * matrix_steps(p.head_dim);
  __half* const metric = w.metric + product(sample, patch_tokens(p), 2 * width);
  float* const logits = w.logits + product(sample, p.num_heads, p.tokens);
  measure_tokens<T, kLanes, false>(
      p, qkv, size, sample, begin, end, reinterpret_cast<float*>(shared), 2 * width,
      [=](int at, float logit) { logits[at] = logit; }, [] {},
      [=](int patch) { return reinterpret_cast<char*>(metric + product(patch, 2 * width)); });
}

// --- Softmax, by every block that needs it -------------------------------------------------------------

// stats [H, 2] in shared memory: maximum of each head's logits; 1 / (denominator * H). Ends with a
// barrier. The maximum starts at -FLT_MAX, not -inf: inf - inf would be a NaN that is not in the
// data. Attention received has been through its softmax.
__device__ inline void softmax_stats(const Params& p, const float* logits, float* stats) {
  for (int head = warp_index(); head < p.num_heads && asks_one_row(p); head += kWarps) {
    const float* row = logits + product(head, p.tokens);
    float top = -FLT_MAX;
    JMP_UNROLL_4
    for (int t = lane_index(); t < p.tokens; t += kWarpSize) top = fmaxf(top, row[t]);
    top = max_lanes<kWarpSize>(top);
    float sum = 0.0f;
    JMP_UNROLL_4
    for (int t = lane_index(); t < p.tokens; t += kWarpSize) sum += expf(row[t] - top);
    sum = sum_lanes<kWarpSize>(sum);
    if (lane_index() == 0) {
      stats[2 * head] = top;
      stats[2 * head + 1] = 1.0f / (sum * static_cast<float>(p.num_heads));
    }
  }
  __syncthreads();
}

// Mean over heads, and over rows, of the softmax weight of a patch token.
__device__ inline float importance_of(const Params& p, const float* logits, const float* stats,
                                      int patch) {
  float sum = 0.0f;
  JMP_UNROLL_2
  for (int head = 0; head < p.num_heads; ++head) {
    const float logit = logits[product(head, p.tokens) + p.num_prefix + patch];
    sum += asks_one_row(p) ? expf(logit - stats[2 * head]) * stats[2 * head + 1] : logit;
  }
  return asks_one_row(p) ? sum : sum / (static_cast<float>(p.num_heads) * static_cast<float>(p.tokens));
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_MEASURE_CUH
