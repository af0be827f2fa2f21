// JMPTokenReduce, the plain version: nine small kernels, one step of the definition each (README.md).
//
// It is the specification that the tuned version is held to, so clarity comes before speed, and it
// runs what the tuned one does not take. What it promises: everything in float32; the same bits for
// a sample alone and in any batch (no sum runs across samples, every order of summation is fixed,
// no atomics); no index depends on a comparison that a NaN could upset, so a NaN stays in its sample
// and every access stays in its buffer.
#ifndef JMP_TOKEN_REDUCE_REFERENCE_CUH
#define JMP_TOKEN_REDUCE_REFERENCE_CUH

#include "token_reduce_common.cuh"

#ifndef JMP_PLAIN_THREADS  // tests on a CPU take fewer
#define JMP_PLAIN_THREADS 128
#endif

namespace {
namespace plain {

constexpr int kPlainThreads = JMP_PLAIN_THREADS;

// --- Steps shared by several kernels -----------------------------------------------------------

// Attention logit of one query row for one key token, one head.
template <typename T>
__device__ float attention_logit(const Params& p, const T* qkv, const T* size, int sample, int row,
                                 int token, int head) {
  const T* q = query_of(p, qkv, sample, row, head);
  const T* k = key_of(p, qkv, sample, token, head);
  float dot = 0.0f;
  for (int c = 0; c < p.head_dim; ++c) dot += to_float(q[c]) * to_float(k[c]);
  const float logit = p.scale * dot;
  return p.proportional ? logit + logf(to_float(size_of(p, size, sample, token))) : logit;
}

// Sum of one value per thread, in the order of the threads; every thread gets it. Once per kernel:
// a second call would write `values` while others still read it.
__device__ float block_sum(float value) {
  __shared__ float values[kPlainThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned t = 0; t < blockDim.x; ++t) sum += values[t];
  return sum;
}

// --- 1. Importance -----------------------------------------------------------------------------

// One block per (sample, query row, head): maximum and denominator of that row's softmax.
// stats: [B, rows, H, 2]
template <typename T>
__global__ void softmax_stats_kernel(Params p, const T* qkv, const T* size, float* stats) {
  const int head = static_cast<int>(blockIdx.x) % p.num_heads;
  const int row = static_cast<int>(blockIdx.x) / p.num_heads % query_rows(p);
  const int sample = static_cast<int>(blockIdx.x) / p.num_heads / query_rows(p);

  // Each thread runs over its own keys and rescales its sum whenever it meets a larger logit.
  // The maximum starts at -FLT_MAX, not -inf: inf - inf would be a NaN that is not in the data.
  float top = -FLT_MAX;
  float sum = 0.0f;
  for (int t = static_cast<int>(threadIdx.x); t < p.tokens; t += static_cast<int>(blockDim.x)) {
    const float logit = attention_logit(p, qkv, size, sample, row, t, head);
    if (logit > top) {
      sum = sum * expf(top - logit) + 1.0f;
      top = logit;
    } else {
      sum += expf(logit - top);
    }
  }

  __shared__ float tops[kPlainThreads];
  tops[threadIdx.x] = top;
  __syncthreads();
  float row_top = -FLT_MAX;
  for (unsigned t = 0; t < blockDim.x; ++t) row_top = fmaxf(row_top, tops[t]);

  const float row_sum = block_sum(sum * expf(top - row_top));
  if (threadIdx.x == 0) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 2;
    stats[at] = row_top;
    stats[at + 1] = row_sum;
  }
}

// One thread per patch token: softmax weight as a key, mean over heads and query rows.
// importance: [B, M]
template <typename T>
__global__ void importance_kernel(Params p, const T* qkv, const T* size, const float* stats,
                                  float* importance) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int patches = patch_tokens(p);
  if (at >= static_cast<int64_t>(p.batch) * patches) return;
  const int sample = static_cast<int>(at / patches);
  const int token = p.num_prefix + static_cast<int>(at % patches);

  float sum = 0.0f;
  for (int row = 0; row < query_rows(p); ++row) {
    for (int head = 0; head < p.num_heads; ++head) {
      const int64_t stat =
          ((static_cast<int64_t>(sample) * query_rows(p) + row) * p.num_heads + head) * 2;
      const float logit = attention_logit(p, qkv, size, sample, row, token, head);
      sum += expf(logit - stats[stat]) / stats[stat + 1];
    }
  }
  importance[at] = sum / (static_cast<float>(p.num_heads) * static_cast<float>(query_rows(p)));
}

// --- 2. Metric: what similarity is measured in -------------------------------------------------

// Cosine of two rows of the metric, in [-1, 1] or NaN.
__device__ float cosine(const Params& p, const float* a, const float* b) {
  float dot = 0.0f;
  for (int c = 0; c < p.head_dim; ++c) dot += a[c] * b[c];
  if (is_nan(dot)) return dot;  // the clamp would turn it into a number
  return fminf(fmaxf(dot, -1.0f), 1.0f);
}

// One block per patch token: its keys, mean over heads, scaled to length 1. metric: [B, M, d]
template <typename T>
__global__ void metric_kernel(Params p, const T* qkv, float* metric) {
  const int sample = static_cast<int>(blockIdx.x) / patch_tokens(p);
  const int token = p.num_prefix + static_cast<int>(blockIdx.x) % patch_tokens(p);
  float* out = metric + static_cast<int64_t>(blockIdx.x) * p.head_dim;

  float squares = 0.0f;
  for (int c = static_cast<int>(threadIdx.x); c < p.head_dim; c += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int h = 0; h < p.num_heads; ++h) sum += to_float(key_of(p, qkv, sample, token, h)[c]);
    const float mean = sum / static_cast<float>(p.num_heads);
    out[c] = mean;
    squares += mean * mean;
  }
  const float length = fmaxf(sqrtf(block_sum(squares)), 1e-12f);
  for (int c = static_cast<int>(threadIdx.x); c < p.head_dim; c += static_cast<int>(blockDim.x)) {
    out[c] /= length;  // the thread's own elements: no barrier needed
  }
}

// --- 3. Critical set ---------------------------------------------------------------------------

// Total order of the patch tokens: larger value first, then lower index; NaN behind all.
__device__ bool comes_before(float a, int i, float b, int j) {
  if (is_nan(a) != is_nan(b)) return is_nan(b);
  if (a > b) return true;
  if (a < b) return false;
  return i < j;
}

// One block per patch token, for JMP_DISTINCT: rated by its largest cosine to a token that comes
// before it by importance, -inf if there is none. A NaN never wins. rating: [B, M]
__global__ void distinct_kernel(Params p, const float* importance, const float* metric,
                                float* rating) {
  const int patches = patch_tokens(p);
  const int me = static_cast<int>(blockIdx.x) % patches;
  const int64_t first = static_cast<int64_t>(blockIdx.x) - me;
  const float* mine = metric + static_cast<int64_t>(blockIdx.x) * p.head_dim;
  const float* row = importance + first;

  float best = -INFINITY;
  for (int i = static_cast<int>(threadIdx.x); i < patches; i += static_cast<int>(blockDim.x)) {
    if (!comes_before(row[i], i, row[me], me)) continue;
    const float dot = cosine(p, mine, metric + (first + i) * p.head_dim);
    if (dot > best) best = dot;  // false for a NaN
  }

  __shared__ float bests[kPlainThreads];
  bests[threadIdx.x] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned t = 1; t < blockDim.x; ++t) best = fmaxf(best, bests[t]);
  rating[blockIdx.x] = distinct_rating(row[me], best);
}

// One thread per patch token: critical if fewer than K tokens come before it by their rating,
// which is the importance itself or distinct_kernel's.
// critical: [B, M], 1 or 0. Exactly K ones in a row, whatever the values.
__global__ void select_kernel(Params p, const float* rating, int32_t* critical) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int patches = patch_tokens(p);
  if (at >= static_cast<int64_t>(p.batch) * patches) return;
  const int me = static_cast<int>(at % patches);
  const float* row = rating + (at - me);

  int before = 0;
  for (int i = 0; i < patches; ++i) before += comes_before(row[i], i, row[me], me) ? 1 : 0;
  critical[at] = before < p.num_keep ? 1 : 0;
}

// One thread per token: prefix tokens keep their place, critical tokens follow in their order.
// kept: [B, K] patch index of each critical token; destination: [B, N] its output position, -1 for
// all others.
__global__ void place_kernel(Params p, const int32_t* critical, int32_t* kept,
                             int32_t* destination) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= static_cast<int64_t>(p.batch) * p.tokens) return;
  const int sample = static_cast<int>(at / p.tokens);
  const int token = static_cast<int>(at % p.tokens);
  if (token < p.num_prefix) {
    destination[at] = token;
    return;
  }
  const int me = token - p.num_prefix;
  const int32_t* row = critical + static_cast<int64_t>(sample) * patch_tokens(p);
  if (!row[me]) {
    destination[at] = -1;
    return;
  }
  int slot = 0;
  for (int i = 0; i < me; ++i) slot += row[i];
  kept[static_cast<int64_t>(sample) * p.num_keep + slot] = me;
  destination[at] = p.num_prefix + slot;
}

// --- 4. Similarity -----------------------------------------------------------------------------

// One block per patch token that is not critical: its nearest critical token, the first of equals.
// similarity: [B, M]; nearest: [B, M], a slot in 0..K-1, or -1 with a NaN if no similarity is a
// number. A NaN never wins.
__global__ void similarity_kernel(Params p, const int32_t* critical, const int32_t* kept,
                                  const float* metric, float* similarity, int32_t* nearest) {
  if (critical[blockIdx.x]) return;  // the whole block
  const int sample = static_cast<int>(blockIdx.x) / patch_tokens(p);
  const float* mine = metric + static_cast<int64_t>(blockIdx.x) * p.head_dim;
  const float* sample_metric =
      metric + static_cast<int64_t>(sample) * patch_tokens(p) * p.head_dim;
  const int32_t* sample_kept = kept + static_cast<int64_t>(sample) * p.num_keep;

  float best = NAN;
  int best_slot = -1;
  for (int s = static_cast<int>(threadIdx.x); s < p.num_keep; s += static_cast<int>(blockDim.x)) {
    const float* other = sample_metric + static_cast<int64_t>(sample_kept[s]) * p.head_dim;
    const float dot = cosine(p, mine, other);
    if (is_nan(dot)) continue;
    if (best_slot < 0 || dot > best) {
      best = dot;
      best_slot = s;
    }
  }

  __shared__ float bests[kPlainThreads];
  __shared__ int slots[kPlainThreads];
  bests[threadIdx.x] = best;
  slots[threadIdx.x] = best_slot;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned t = 1; t < blockDim.x; ++t) {
    const bool better = best_slot < 0 || bests[t] > best ||
                        (bests[t] == best && slots[t] < best_slot);
    if (slots[t] >= 0 && better) {
      best = bests[t];
      best_slot = slots[t];
    }
  }
  similarity[blockIdx.x] = best;
  nearest[blockIdx.x] = best_slot;
}

// --- 5. Decision -------------------------------------------------------------------------------

// One block per sample: who is merged gets the place of its nearest critical token. index: null, or
// [B, M] as token_reduce_kernel.h says.
__global__ void decide_kernel(Params p, const int32_t* critical, const float* similarity,
                              const int32_t* nearest, int32_t* destination, int32_t* index) {
  const int sample = static_cast<int>(blockIdx.x);
  const int patches = patch_tokens(p);
  const int64_t first = static_cast<int64_t>(sample) * patches;

  float mean = 0.0f;
  if (p.granularity == JMP_PER_SAMPLE) {  // the same branch for the whole block
    float sum = 0.0f;
    for (int i = static_cast<int>(threadIdx.x); i < patches; i += static_cast<int>(blockDim.x)) {
      if (!critical[first + i]) sum += similarity[first + i];
    }
    mean = block_sum(sum) / static_cast<float>(patches - p.num_keep);  // unused if K = M
  }
  for (int i = static_cast<int>(threadIdx.x); i < patches; i += static_cast<int>(blockDim.x)) {
    int32_t* const place = destination + token_row(p, sample, p.num_prefix + i);
    if (critical[first + i]) {
      if (index != nullptr) index[first + i] = *place - p.num_prefix;
      continue;
    }
    const float value = p.granularity == JMP_PER_SAMPLE ? mean : similarity[first + i];
    const bool any = nearest[first + i] >= 0;
    const int slot = any ? nearest[first + i] : 0;
    const bool merged = any && value >= p.tau;  // false for a NaN: pruned
    if (merged) *place = p.num_prefix + slot;
    if (index != nullptr) index[first + i] = (merged ? kMerged : kPruned) * p.num_keep + slot;
  }
}

// --- 6. Merge and gather -----------------------------------------------------------------------

// One block per output token, one thread per channel: mean of the token and of what was merged
// into it, weighted by size (and by merge_weight what is merged), sources in ascending order. A
// token that takes no content in is copied bit for bit.
template <typename T>
__global__ void merge_kernel(Params p, const T* x, const T* size, const int32_t* kept,
                             const int32_t* destination, T* y, T* out_size, T* log_size) {
  const int out_tokens = p.num_prefix + p.num_keep;
  const int sample = static_cast<int>(blockIdx.x) / out_tokens;
  const int place = static_cast<int>(blockIdx.x) % out_tokens;
  const int32_t* places = destination + token_row(p, sample, 0);
  int self = place;
  if (place >= p.num_prefix) {
    const int64_t slot = static_cast<int64_t>(sample) * p.num_keep + (place - p.num_prefix);
    self = p.num_prefix + kept[slot];
  }
  const T own_size = size_of(p, size, sample, self);

  float total = to_float(own_size);  // the new size
  float content = total;             // what the sums weigh in all
  bool merged = false;
  for (int i = p.num_prefix; i < p.tokens; ++i) {
    if (places[i] != place || i == self) continue;
    total += to_float(size_of(p, size, sample, i));
    content += p.merge_weight * to_float(size_of(p, size, sample, i));
    merged = true;
  }

  const T* row = x + token_row(p, sample, self) * p.channels;
  T* out = y + static_cast<int64_t>(blockIdx.x) * p.channels;
  for (int c = static_cast<int>(threadIdx.x); c < p.channels; c += static_cast<int>(blockDim.x)) {
    if (!merged || p.merge_weight == 0.0f) {
      out[c] = row[c];
      continue;
    }
    float sum = to_float(own_size) * to_float(row[c]);
    for (int i = p.num_prefix; i < p.tokens; ++i) {
      if (places[i] != place || i == self) continue;
      sum += p.merge_weight * to_float(size_of(p, size, sample, i)) *
             to_float(x[token_row(p, sample, i) * p.channels + c]);
    }
    out[c] = from_float<T>(sum / content);
  }
  if (threadIdx.x == 0) {
    out_size[blockIdx.x] = merged ? from_float<T>(total) : own_size;
    log_size[blockIdx.x] = from_float<T>(logf(total));
  }
}

// --- Host side ---------------------------------------------------------------------------------

// Scratch buffers of the plain version.
struct PlainScratch {
  float* stats;
  float* importance;
  float* rating;
  int32_t* critical;
  int32_t* kept;
  float* metric;
  float* similarity;
  int32_t* nearest;
  int32_t* destination;
  size_t bytes;

  PlainScratch(const Params& p, char* base) {
    Arena arena(base);
    const int64_t patches = product(p.batch, patch_tokens(p));
    stats = arena.take<float>(product(p.batch, query_rows(p), 2) * p.num_heads);
    importance = arena.take<float>(patches);
    rating = arena.take<float>(p.selection == JMP_DISTINCT ? patches : 0);
    critical = arena.take<int32_t>(patches);
    kept = arena.take<int32_t>(product(p.batch, p.num_keep));
    metric = arena.take<float>(product(patches, p.head_dim));
    similarity = arena.take<float>(patches);
    nearest = arena.take<int32_t>(patches);
    destination = arena.take<int32_t>(product(p.batch, p.tokens));
    bytes = arena.bytes();
  }
};

template <typename T>
cudaError_t run_plain(const Params& p, const T* x, const T* qkv, const T* size, T* y, T* out_size,
                      T* log_size, int32_t* index, char* scratch, cudaStream_t stream) {
  const PlainScratch w(p, scratch);
  const int64_t patches = product(p.batch, patch_tokens(p));
  const int64_t tokens = product(p.batch, p.tokens);
  const int64_t rows = product(p.batch, query_rows(p), p.num_heads);
  const int64_t outputs = product(p.batch, p.num_prefix + p.num_keep);
  const auto blocks_for = [](int64_t threads) { return divide_up(threads, int64_t{kPlainThreads}); };
  cudaError_t error = cudaSuccess;
#define JMP_STEP(kernel, blocks, ...)                                                         \
  error = launch(kernel, Grid{(blocks), 0}, kPlainThreads, stream, p, __VA_ARGS__); \
  if (error != cudaSuccess) return error
  JMP_STEP(softmax_stats_kernel<T>, rows, qkv, size, w.stats);
  JMP_STEP(importance_kernel<T>, blocks_for(patches), qkv, size, w.stats, w.importance);
  JMP_STEP(metric_kernel<T>, patches, qkv, w.metric);
  const float* rating = w.importance;
  if (p.selection == JMP_DISTINCT) {
    JMP_STEP(distinct_kernel, patches, w.importance, w.metric, w.rating);
    rating = w.rating;
  }
  JMP_STEP(select_kernel, blocks_for(patches), rating, w.critical);
  JMP_STEP(place_kernel, blocks_for(tokens), w.critical, w.kept, w.destination);
  JMP_STEP(similarity_kernel, patches, w.critical, w.kept, w.metric, w.similarity, w.nearest);
  JMP_STEP(decide_kernel, p.batch, w.critical, w.similarity, w.nearest, w.destination, index);
  JMP_STEP(merge_kernel<T>, outputs, x, size, w.kept, w.destination, y, out_size, log_size);
#undef JMP_STEP
  return cudaSuccess;
}

}  // namespace plain
}  // namespace

#endif  // JMP_TOKEN_REDUCE_REFERENCE_CUH
