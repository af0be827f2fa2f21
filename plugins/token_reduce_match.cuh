// Tuned version, step 3: the critical set, and for every other token the nearest of it.
#ifndef JMP_TOKEN_REDUCE_MATCH_CUH
#define JMP_TOKEN_REDUCE_MATCH_CUH

#include "token_reduce_select.cuh"

namespace {

// A block takes kRows of a sample's non-critical tokens (one block if there are none). Each block
// selects the critical set for itself: that is cheaper than a launch of its own.
__host__ __device__ inline int match_groups(const Params& p) {
  const int groups = static_cast<int>(divide_up(patch_tokens(p) - p.num_keep, kRows));
  return groups > 0 ? groups : 1;
}

// The keys of the selection, dead before the first tile comes, share its memory.
__host__ __device__ inline size_t match_shared(const Params& p, int tile_bytes) {
  const size_t tiles = static_cast<size_t>(2 * tile_bytes);
  const size_t keys = sizeof(uint32_t) * static_cast<size_t>(patch_tokens(p));
  return (tiles > keys ? tiles : (keys + 15) / 16 * 16) +
         sizeof(float) * static_cast<size_t>(2 * p.num_heads) +
         sizeof(uint16_t) * static_cast<size_t>(p.num_keep);
}

// The better of two candidates: larger similarity, then lower slot. None at all: -2, kNobody.
__device__ inline void take_better(float& best, uint32_t& slot, float other, uint32_t other_slot) {
  if (other > best || (other == best && other_slot < slot)) {
    best = other;
    slot = other_slot;
  }
}

template <int kSteps>
__global__ void __launch_bounds__(kThreads, 2) match_kernel(Params p, Scratch w) {
  JMP_DYNAMIC_SHARED(shared);
  __shared__ Selection selection;
  __shared__ uint16_t row_tokens[kRows];
  __shared__ float other_best[kRows];
  __shared__ uint32_t other_slot[kRows];
  constexpr int kTiles = kColumns<kSteps> / 16;  // of 8 columns, for one warp
  const int patches = patch_tokens(p);
  const int groups = match_groups(p);
  const int sample = static_cast<int>(blockIdx.x) / groups;
  const int group = static_cast<int>(blockIdx.x) % groups;
  const int rest = patches - p.num_keep;
  const int first_row = group * kRows;
  const int rows_here = rest - first_row < kRows ? rest - first_row : kRows;
  char* const tiles = shared;
  uint32_t* const keys = reinterpret_cast<uint32_t*>(shared);
  char* const behind = shared + match_shared(p, kTileBytes<kSteps>) -
                       sizeof(float) * static_cast<size_t>(2 * p.num_heads) -
                       sizeof(uint16_t) * static_cast<size_t>(p.num_keep);
  float* const stats = reinterpret_cast<float*>(behind);
  uint16_t* const kept = reinterpret_cast<uint16_t*>(stats + 2 * p.num_heads);

  let_next_start();
  wait_for_previous();
  const int64_t first_patch = product(sample, patches);
  const float* logits = w.logits + product(sample, p.num_heads, p.tokens);
  if (p.selection == JMP_BY_IMPORTANCE) softmax_stats(p, logits, stats);
  for (int t = static_cast<int>(threadIdx.x); t < patches; t += kThreads) {
    const float rating =
        p.selection == JMP_BY_IMPORTANCE
            ? importance_of(p, logits, stats, t)
            : distinct_rating(w.importance[first_patch + t],
                              redundancy_of(w.redundancy[first_patch + t]));
    keys[t] = sort_key(rating);
  }
  select_largest(keys, patches, p.num_keep, &selection);
  for (int t = static_cast<int>(threadIdx.x); t < patches; t += kThreads) {
    const int slot = selection.slot(t);
    if (selection.is_critical(t)) {
      kept[slot] = static_cast<uint16_t>(t);
      if (group == 0) w.kept[product(sample, p.num_keep) + slot] = t;
    } else if (t - slot >= first_row && t - slot < first_row + kRows) {
      row_tokens[t - slot - first_row] = static_cast<uint16_t>(t);
    }
  }
  if (rows_here <= 0) return;  // the whole block: nothing to compare
  __syncthreads();

  const __half* metric = metric_of(p, w, sample);
  stage_rows<kSteps>(tiles, metric, kRows, [=](int i) {
    return static_cast<int>(row_tokens[i < rows_here ? i : rows_here - 1]);
  });
  JMP_WAIT_COPIES(0);
  __syncthreads();
  const int warp_row = warp_index() / 2 * kTileRows;
  RowTile<kSteps> rows;
  rows.load(tiles + warp_row * kStride<kSteps>);
  __syncthreads();  // the rows are in registers: columns may take their place

  const auto stage_columns = [&](int tile) {
    stage_rows<kSteps>(tiles + tile % 2 * kTileBytes<kSteps>, metric, kColumns<kSteps>,
                       [=](int i) {
                         const int slot = tile * kColumns<kSteps> + i;
                         return static_cast<int>(kept[slot < p.num_keep ? slot : p.num_keep - 1]);
                       });
  };
  float best[2] = {-2.0f, -2.0f};
  uint32_t nearest[2] = {kNobody, kNobody};
  const int end_tile = static_cast<int>(divide_up(p.num_keep, kColumns<kSteps>));
  stage_columns(0);
  for (int tile = 0; tile < end_tile; ++tile) {
    if (tile + 1 < end_tile) {
      stage_columns(tile + 1);
    } else {
      commit_copies();
    }
    JMP_WAIT_COPIES(1);
    __syncthreads();
    const int part = warp_index() % 2 * (kColumns<kSteps> / 2);
    const int first_slot = tile * kColumns<kSteps> + part;
    if (first_slot < p.num_keep && warp_row < rows_here) {
      float dots[kTiles][4];
      multiply<kSteps>(rows, tiles + tile % 2 * kTileBytes<kSteps> + part * kStride<kSteps>, dots);
      JMP_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        JMP_UNROLL
        for (int side = 0; side < 2; ++side) {
          const int slot = first_slot + t * 8 + lane_index() % 4 * 2 + side;
          JMP_UNROLL
          for (int r = 0; r < 2; ++r) {
            float dot = dots[t][2 * r + side];
            dot = dot > 1.0f ? 1.0f : dot;  // not fminf: a NaN must stay one, and lose below
            dot = dot < -1.0f ? -1.0f : dot;
            if (slot < p.num_keep && dot > best[r]) {
              best[r] = dot;
              nearest[r] = static_cast<uint32_t>(slot);
            }
          }
        }
      }
    }
    __syncthreads();
  }

  // The four lanes of a row, then the two warps.
  const int row = warp_row + lane_index() / 4;
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) {
    JMP_UNROLL
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float their_best = __shfl_xor_sync(kAll, best[r], lanes);
      const uint32_t their_slot = __shfl_xor_sync(kAll, nearest[r], lanes);
      take_better(best[r], nearest[r], their_best, their_slot);
    }
    if (warp_index() % 2 == 1 && lane_index() % 4 == 0) {
      other_best[row + 8 * r] = best[r];
      other_slot[row + 8 * r] = nearest[r];
    }
  }
  __syncthreads();
  if (warp_index() % 2 == 1 || lane_index() % 4 != 0) return;
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int at = row + 8 * r;
    if (at >= rows_here) continue;
    take_better(best[r], nearest[r], other_best[at], other_slot[at]);
    const bool none = nearest[r] == kNobody;
    const bool pruned = p.granularity == JMP_PER_TOKEN && !(best[r] >= p.tau);
    const int64_t out = product(sample, rest) + first_row + at;
    w.similarity[out] = none ? NAN : best[r];
    w.source[out] = row_tokens[at] | (none ? kNobody : nearest[r] | (pruned ? kFar : 0u)) << 16;
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_MATCH_CUH
