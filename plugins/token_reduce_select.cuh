// Tuned version: the K largest of up to 2048 ratings, without a sort and without atomics.
#ifndef JMP_TOKEN_REDUCE_SELECT_CUH
#define JMP_TOKEN_REDUCE_SELECT_CUH

#include "token_reduce_rate.cuh"

namespace {

constexpr int kMaxWords = kMaxPatches / kWarpSize;

// Key of a rating: larger rating, larger key; equal for -0 and +0; 0 for a NaN, behind all others.
__device__ inline uint32_t sort_key(float rating) {
  return is_nan(rating) ? 0u : ordered(rating + 0.0f);
}

// Which tokens are critical, 32 to a word, and how many of them lie in the words before.
struct Selection {
  uint32_t critical[kMaxWords];
  int before[kMaxWords];

  __device__ bool is_critical(int token) const {
    return (critical[token / kWarpSize] >> (token % kWarpSize) & 1u) != 0u;
  }
  // Position of a critical token among the critical ones; of another: how many come before it.
  __device__ int slot(int token) const {
    const uint32_t lower = critical[token / kWarpSize] & ((1u << token % kWarpSize) - 1u);
    return before[token / kWarpSize] + __popc(lower);
  }
};

// `keys` [patches] in shared memory: token t is read by thread t % kThreads alone. Finds the K-th
// largest key four bits at a time: a warp counts the 16 digits of 32 keys by ballots, lane d the
// digit d. Ties go to the lower index. Ends with a barrier.
__device__ inline void select_largest(const uint32_t* keys, int patches, int keep,
                                      Selection* selection) {
  __shared__ int counts[2][kWarps][16];
  __shared__ uint32_t larger_words[kMaxWords];
  __shared__ uint32_t equal_words[kMaxWords];
  const int words = static_cast<int>(divide_up(patches, kWarpSize));
  const int lane = lane_index();
  uint32_t found = 0u;  // the upper bits of the K-th largest key
  uint32_t mask = 0u;   // which bits these are
  int wanted = keep;    // its position among the keys that agree in these
  for (int shift = 28; shift >= 0; shift -= 4) {
    int count = 0;
    for (int word = warp_index(); word < words; word += kWarps) {
      const int token = word * kWarpSize + lane;
      const uint32_t key = token < patches ? keys[token] : 0u;
      unsigned match = __ballot_sync(kAll, token < patches && (key & mask) == found);
      JMP_UNROLL
      for (int bit = 0; bit < 4; ++bit) {
        const unsigned plane = __ballot_sync(kAll, (key >> (shift + bit) & 1u) != 0u);
        match &= (lane >> bit & 1) != 0 ? plane : ~plane;
      }
      count += __popc(match);
    }
    const int turn = shift / 4 % 2;
    if (lane < 16) counts[turn][warp_index()][lane] = count;
    __syncthreads();
    int total = 0;
    if (lane < 16) {
      for (int warp = 0; warp < kWarps; ++warp) total += counts[turn][warp][lane];
    }
    int at_least = total;  // keys whose digit is this lane's or larger
    JMP_UNROLL
    for (int offset = 1; offset < 16; offset *= 2) {
      const int above = __shfl_down_sync(kAll, at_least, offset);
      if (lane + offset < 16) at_least += above;
    }
    const unsigned enough = __ballot_sync(kAll, lane < 16 && at_least >= wanted);
    const int digit = 31 - __clz(static_cast<int>(enough));  // digit 0 always has enough
    wanted -= __shfl_sync(kAll, at_least - total, digit);
    found |= static_cast<uint32_t>(digit) << shift;
    mask |= 15u << shift;
  }

  for (int word = warp_index(); word < words; word += kWarps) {
    const int token = word * kWarpSize + lane;
    const uint32_t key = token < patches ? keys[token] : 0u;
    const unsigned larger = __ballot_sync(kAll, token < patches && key > found);
    const unsigned equal = __ballot_sync(kAll, token < patches && key == found);
    if (lane == 0) {
      larger_words[word] = larger;
      equal_words[word] = equal;
    }
  }
  __syncthreads();
  if (warp_index() == 0) {
    int equal_before = 0;
    int critical_before = 0;
    for (int first = 0; first < words; first += kWarpSize) {
      const int word = first + lane;
      uint32_t equal = word < words ? equal_words[word] : 0u;
      int count = __popc(equal);
      const int equal_sum = inclusive_sum(count);
      // The first `wanted` of the equal ones are critical.
      for (int take = wanted - (equal_before + equal_sum - count); count > take && count > 0;
           --count) {
        equal &= ~(0x80000000u >> __clz(static_cast<int>(equal)));
      }
      const uint32_t critical = (word < words ? larger_words[word] : 0u) | equal;
      const int critical_sum = inclusive_sum(__popc(critical));
      if (word < words) {
        selection->critical[word] = critical;
        selection->before[word] = critical_before + critical_sum - __popc(critical);
      }
      equal_before += __shfl_sync(kAll, equal_sum, kWarpSize - 1);
      critical_before += __shfl_sync(kAll, critical_sum, kWarpSize - 1);
    }
  }
  __syncthreads();
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_SELECT_CUH
