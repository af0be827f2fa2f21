// Tuned version, step 4: every output token gathers what was merged into it.
#ifndef JMP_TOKEN_REDUCE_MERGE_CUH
#define JMP_TOKEN_REDUCE_MERGE_CUH

#include "token_reduce_measure.cuh"

namespace {

// JMP_PER_SAMPLE: whether the mean similarity of a sample reaches tau. By a whole warp.
__device__ inline bool sample_merges(const Params& p, const Scratch& w, int sample, int rest) {
  const float* similarity = w.similarity + product(sample, rest);
  float sum = 0.0f;
  for (int i = lane_index(); i < rest; i += kWarpSize) sum += similarity[i];
  sum = sum_lanes<kWarpSize>(sum);
  return sum / static_cast<float>(rest) >= p.tau;  // false for a NaN
}

// Whether anything goes to `slot`. By a whole warp.
__device__ inline bool takes_in(const uint32_t* source, int rest, int slot) {
  bool any = false;
  for (int i = lane_index(); i < rest; i += kWarpSize) {
    any |= source[i] >> 16 == static_cast<uint32_t>(slot);
  }
  return __ballot_sync(kAll, any) != 0u;
}

// The output of `slot`, which takes others in. `source`: of every other token index | slot << 16,
// ascending; with kFar, a pruned one. By a whole warp.
template <typename T>
__device__ inline void mix_output(const Params& p, const T* x, const T* sizes, int sample, int self,
                                  int slot, const uint32_t* source, int rest, T* y, T* out_size,
                                  T* log_size) {
  constexpr int kPieces = 2;
  constexpr int kAhead = 3;  // rows whose loads are under way at once
  const int pieces = p.channels / kPerLoad<T>;
  const T* const from = x + token_row(p, sample, p.num_prefix) * p.channels;
  const int64_t out = product(sample, p.num_prefix + p.num_keep) + p.num_prefix + slot;
  const bool mixes = p.merge_weight != 0.0f;  // else only the size grows
  JMP_NO_UNROLL
  for (int base = lane_index(); base < pieces + lane_index(); base += kPieces * kWarpSize) {
    float sums[kPieces][kPerLoad<T>];
    JMP_UNROLL
    for (int k = 0; k < kPieces; ++k) {
      JMP_UNROLL
      for (int i = 0; i < kPerLoad<T>; ++i) sums[k][i] = 0.0f;
    }
    // Its own token first, then what it takes in.
    int rows[kAhead] = {self};
    int count = 1;
    bool is_own = true;
    float own_size = 0.0f;
    float taken_in = 0.0f;  // sizes
    const auto add_rows = [&] {
      uint4 raw[kAhead][kPieces];
      float weights[kAhead];
      JMP_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        weights[u] = u < count ? to_float(sizes[p.num_prefix + rows[u]]) : 0.0f;
        JMP_UNROLL
        for (int k = 0; k < kPieces; ++k) {
          raw[u][k] = uint4{0u, 0u, 0u, 0u};
          const int piece = base + k * kWarpSize;
          if (mixes && u < count && piece < pieces) {
            raw[u][k] = load_16(from + product(rows[u], p.channels) + piece * kPerLoad<T>);
          }
        }
      }
      JMP_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        if (u >= count) break;
        if (is_own) {
          is_own = false;
          own_size = weights[u];
        } else {
          taken_in += weights[u];
          weights[u] *= p.merge_weight;
        }
        JMP_UNROLL
        for (int k = 0; k < kPieces; ++k) {
          float values[kPerLoad<T>];
          unpack<T>(raw[u][k], values);
          JMP_UNROLL
          for (int i = 0; i < kPerLoad<T>; ++i) sums[k][i] += weights[u] * values[i];
        }
      }
      count = 0;
    };
    JMP_NO_UNROLL
    for (int first = 0; first < rest; first += kWarpSize) {
      const int mine = first + lane_index();
      const uint32_t word = mine < rest ? source[mine] : kNobody << 16;
      unsigned hits = __ballot_sync(kAll, word >> 16 == static_cast<uint32_t>(slot));
      JMP_NO_UNROLL
      while (hits != 0u) {
        const int lane = __ffs(static_cast<int>(hits)) - 1;
        hits &= hits - 1u;
        const int token = static_cast<int>(__shfl_sync(kAll, word, lane) & 0xffffu);
        JMP_UNROLL
        for (int u = 0; u < kAhead; ++u) rows[u] = u == count ? token : rows[u];
        if (++count == kAhead) add_rows();
      }
    }
    if (count != 0) add_rows();
    const float content = own_size + p.merge_weight * taken_in;
    const float inverse = 1.0f / content;
    const bool tiny = inverse > FLT_MAX;  // content is 1e-40, say
    JMP_UNROLL
    for (int k = 0; k < kPieces; ++k) {
      JMP_UNROLL
      for (int i = 0; i < kPerLoad<T>; ++i) {
        sums[k][i] *= tiny ? 1e20f : inverse;
        if (tiny) sums[k][i] *= 1.0f / (1e20f * content);
      }
      const int piece = base + k * kWarpSize;
      if (mixes && piece < pieces) {
        store_16(y + out * p.channels + piece * kPerLoad<T>, pack<T>(sums[k]));
      }
    }
    if (base == 0) {  // the first lane
      out_size[out] = from_float<T>(own_size + taken_in);
      log_size[out] = from_float<T>(logf(own_size + taken_in));
    }
  }
}

// Writes what became of a critical token and of its sources; the first critical token's warp also
// writes what the pruned resemble. By a whole warp.
__device__ inline void record(const Params& p, const uint32_t* source, int rest, bool merges,
                              int self, int slot, int32_t* index) {
  if (lane_index() == 0) index[self - p.num_prefix] = slot;
  for (int i = lane_index(); i < rest; i += kWarpSize) {
    const uint32_t target = source[i] >> 16;
    const bool merged = merges && (target & kFar) == 0u;
    const int nearest = target == kNobody ? 0 : static_cast<int>(target & ~kFar);
    const int fate = merged ? kMerged : kPruned;
    if (slot == (merged ? nearest : 0)) index[source[i] & 0xffffu] = fate * p.num_keep + nearest;
  }
}

// One warp per output token, which needs no barrier.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    merge_kernel(Params p, const T* x, const T* size, Scratch w, T* y, T* out_size, T* log_size,
                 int32_t* index) {
  const int out_tokens = p.num_prefix + p.num_keep;
  const int64_t out = product(blockIdx.x, kWarps) + warp_index();
  // No let_next_start(): whatever follows us in the stream may not wait.
  if (out >= product(p.batch, out_tokens)) return;  // the whole warp
  const int sample = static_cast<int>(out / out_tokens);
  const int place = static_cast<int>(out % out_tokens);
  const int slot = place - p.num_prefix;  // < 0: a prefix token
  const int rest = patch_tokens(p) - p.num_keep;
  wait_for_previous();
  const uint32_t* const source = w.source + product(sample, rest);
  const int self =
      slot < 0 ? place : p.num_prefix + w.kept[product(sample, p.num_keep) + slot];
  const bool merges = slot >= 0 && rest > 0 &&
                      (p.granularity == JMP_PER_TOKEN || sample_merges(p, w, sample, rest));
  if (index != nullptr && slot >= 0) {
    record(p, source, rest, merges, self, slot, index + product(sample, patch_tokens(p)));
  }
  const T* const sizes = size + (p.size_batch == 1 ? 0 : token_row(p, sample, 0));
  const bool any = merges && takes_in(source, rest, slot);
  if (any) {
    mix_output(p, x, sizes, sample, self - p.num_prefix, slot, source, rest, y, out_size, log_size);
    if (p.merge_weight != 0.0f) return;
  }
  const T* const from = x + token_row(p, sample, self) * p.channels;
  JMP_UNROLL_4
  for (int i = lane_index() * kPerLoad<T>; i < p.channels; i += kWarpSize * kPerLoad<T>) {
    store_16(y + out * p.channels + i, load_16(from + i));
  }
  if (any || lane_index() != 0) return;
  out_size[out] = sizes[self];
  log_size[out] = from_float<T>(logf(to_float(sizes[self])));
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_MERGE_CUH
