// Tuned version, step 4: every output token gathers what was merged into it.
#ifndef JMP_TOKEN_REDUCE_MERGE_CUH
#define JMP_TOKEN_REDUCE_MERGE_CUH

#include "token_reduce_measure.cuh"

namespace {

constexpr int kPieces = 2;  // of 16 bytes, that a lane has under way at once
// Per multiprocessor, so that a thread has 85 registers; with the 64 that four blocks leave it, some
// architectures spill. 24 warps keep 24 KB of loads under way, more than a latency's worth.
constexpr int kMergeBlocks = 3;

// JMP_PER_SAMPLE: whether the mean similarity of a sample reaches tau. By a whole warp.
__device__ inline bool sample_merges(const Params& p, const Scratch& w, int sample, int rest) {
  const float* similarity = w.similarity + product(sample, rest);
  float sum = 0.0f;
  for (int i = lane_index(); i < rest; i += kWarpSize) sum += similarity[i];
  sum = sum_lanes<kWarpSize>(sum);
  return sum / static_cast<float>(rest) >= p.tau;  // false for a NaN
}

// Whether anything goes to `slot`, and the sizes of all that does together. By a whole warp.
template <typename T>
__device__ inline bool takes_in(const Params& p, const T* size, const uint32_t* source, int sample,
                                int rest, int slot, float* sizes) {
  float mine = 0.0f;
  bool any = false;
  for (int i = lane_index(); i < rest; i += kWarpSize) {
    if (source[i] >> 16 != static_cast<uint32_t>(slot)) continue;
    const int token = p.num_prefix + static_cast<int>(source[i] & 0xffffu);
    mine += to_float(size_of(p, size, sample, token));
    any = true;
  }
  *sizes = sum_lanes<kWarpSize>(mine);
  return __ballot_sync(kAll, any) != 0u;
}

// Adds a row of x to the sums of this lane's pieces.
template <typename T>
__device__ inline void add_row(const T* row, float weight, int piece, int pieces,
                               float (&sums)[kPieces][kPerLoad<T>]) {
  uint4 raw[kPieces];
  JMP_UNROLL
  for (int k = 0; k < kPieces; ++k) {
    const int at = piece + k * kWarpSize;
    raw[k] = at < pieces ? load_16(row + at * kPerLoad<T>) : uint4{0u, 0u, 0u, 0u};
  }
  JMP_UNROLL
  for (int k = 0; k < kPieces; ++k) {
    float values[kPerLoad<T>];
    unpack<T>(raw[k], values);
    JMP_UNROLL
    for (int i = 0; i < kPerLoad<T>; ++i) sums[k][i] += weight * values[i];
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

// One warp per output token, 16 bytes per lane and access, two accesses at once. It finds the
// token's sources by ballots over the sample's list, so they come in ascending order, and needs no
// barrier. A token that takes no content in is copied bit for bit.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMergeBlocks)
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
  const uint32_t* source = w.source + product(sample, rest);
  const int self =
      slot < 0 ? place : p.num_prefix + w.kept[product(sample, p.num_keep) + slot];
  const T own_size = size_of(p, size, sample, self);
  const bool merges = slot >= 0 && rest > 0 &&
                      (p.granularity == JMP_PER_TOKEN || sample_merges(p, w, sample, rest));

  if (index != nullptr && slot >= 0) {
    record(p, source, rest, merges, self, slot, index + product(sample, patch_tokens(p)));
  }

  const int64_t own_row = token_row(p, sample, self);
  const int64_t first_row = token_row(p, sample, p.num_prefix);
  const int pieces = p.channels / kPerLoad<T>;
  bool mixes = false;    // else the token is copied
  float content = 1.0f;  // what the sums weigh in all
  for (int base = 0; base < pieces; base += kPieces * kWarpSize) {
    const int piece = base + lane_index();
    uint4 own[kPieces];
    JMP_UNROLL
    for (int k = 0; k < kPieces; ++k) {
      own[k] = uint4{0u, 0u, 0u, 0u};
      const int at = piece + k * kWarpSize;
      if (at < pieces) own[k] = load_16(x + own_row * p.channels + at * kPerLoad<T>);
    }
    if (base == 0) {  // while the row comes
      float taken_in = 0.0f;
      const bool any = merges && takes_in(p, size, source, sample, rest, slot, &taken_in);
      mixes = any && p.merge_weight != 0.0f;
      if (mixes) content = to_float(own_size) + p.merge_weight * taken_in;
      if (lane_index() == 0) {
        const float total = to_float(own_size) + taken_in;
        out_size[out] = any ? from_float<T>(total) : own_size;
        log_size[out] = from_float<T>(logf(total));
      }
    }
    if (mixes) {
      float sums[kPieces][kPerLoad<T>];
      JMP_UNROLL
      for (int k = 0; k < kPieces; ++k) {
        unpack<T>(own[k], sums[k]);
        JMP_UNROLL
        for (int i = 0; i < kPerLoad<T>; ++i) sums[k][i] *= to_float(own_size);
      }
      for (int first = 0; first < rest; first += kWarpSize) {
        const int at = first + lane_index();
        const uint32_t word = at < rest ? source[at] : kNobody << 16;
        unsigned hits = __ballot_sync(kAll, word >> 16 == static_cast<uint32_t>(slot));
        if (hits == 0u) continue;
        const int patch = static_cast<int>(word & 0xffffu);
        const float my_size =
            at < rest ? to_float(size_of(p, size, sample, p.num_prefix + patch)) : 0.0f;
        while (hits != 0u) {
          const int from = __ffs(static_cast<int>(hits)) - 1;
          hits &= hits - 1u;
          const int64_t row = first_row + __shfl_sync(kAll, patch, from);
          const float weight = p.merge_weight * __shfl_sync(kAll, my_size, from);
          add_row(x + row * p.channels, weight, piece, pieces, sums);
        }
      }
      JMP_UNROLL
      for (int k = 0; k < kPieces; ++k) {
        JMP_UNROLL
        // Divided, not multiplied by an inverse: that is infinite for sizes of 1e-40.
        for (int i = 0; i < kPerLoad<T>; ++i) sums[k][i] /= content;
        own[k] = pack<T>(sums[k]);
      }
    }
    JMP_UNROLL
    for (int k = 0; k < kPieces; ++k) {
      const int at = piece + k * kWarpSize;
      if (at < pieces) store_16(y + out * p.channels + at * kPerLoad<T>, own[k]);
    }
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_MERGE_CUH
