// Tuned version, step 2 (JMP_DISTINCT alone): how much each token resembles a more important one.
#ifndef JMP_TOKEN_REDUCE_RATE_CUH
#define JMP_TOKEN_REDUCE_RATE_CUH

#include "token_reduce_tiles.cuh"

namespace {

// Unsigned integers in the order of the floats; 0 comes before all of them.
__device__ inline uint32_t ordered(float v) {
  const uint32_t bits = __float_as_uint(v);
  return (bits & 0x80000000u) != 0u ? ~bits : bits | 0x80000000u;
}

// Back from what rate_kernel left: the largest cosine, clamped to [-1, 1]; -inf for none.
__device__ inline float redundancy_of(uint32_t bits) {
  if (bits == 0u) return -INFINITY;
  const float v = __uint_as_float((bits & 0x80000000u) != 0u ? bits & 0x7fffffffu : ~bits);
  return fminf(fmaxf(v, -1.0f), 1.0f);
}

// Every pair of tokens is compared once, whichever is the more important: rows i against columns
// j < i. A block has kRows rows and up to `span` tiles of columns, or all for 0; units counts the
// blocks of a sample. The largest similarity meets in memory by an atomic maximum of integers,
// which is the same in every order.
template <int kSteps>
__host__ __device__ inline int column_tiles(int group, int patches) {
  const int rows = (group + 1) * kRows;
  return static_cast<int>(divide_up(rows < patches ? rows : patches, kColumns<kSteps>));
}

__host__ __device__ inline int spans(int tiles, int span) {
  return span == 0 ? 1 : static_cast<int>(divide_up(tiles, span));
}

template <int kSteps>
__host__ inline int64_t rate_units(int patches, int span) {
  int64_t units = 0;
  for (int group = 0; group * kRows < patches; ++group) {
    units += spans(column_tiles<kSteps>(group, patches), span);
  }
  return units;
}

__host__ __device__ inline size_t rate_shared(const Params& p, int tile_bytes) {
  return static_cast<size_t>(2 * tile_bytes) +
         sizeof(float) * static_cast<size_t>(patch_tokens(p) + 2 * p.num_heads);
}

template <int kSteps>
__global__ void __launch_bounds__(kThreads, 2)
    rate_kernel(Params p, Scratch w, int span, int units) {
  JMP_DYNAMIC_SHARED(shared);
  constexpr int kTiles = kColumns<kSteps> / 16;  // of 8 columns, for one warp
  char* const tiles = shared;
  float* const importance = reinterpret_cast<float*>(shared + 2 * kTileBytes<kSteps>);
  float* const stats = importance + patch_tokens(p);
  const int patches = patch_tokens(p);
  const int sample = static_cast<int>(blockIdx.x) / units;
  // The largest group first: what starts last should be short.
  int unit = static_cast<int>(blockIdx.x) % units;
  int group = static_cast<int>(divide_up(patches, kRows)) - 1;
  for (int n; unit >= (n = spans(column_tiles<kSteps>(group, patches), span)); --group) unit -= n;
  const int first_row = group * kRows;
  const int first_tile = unit * span;
  const int all_tiles = column_tiles<kSteps>(group, patches);
  const int end_tile =
      span == 0 || first_tile + span > all_tiles ? all_tiles : first_tile + span;

  let_next_start();
  wait_for_previous();
  const __half* metric = metric_of(p, w, sample);
  const float* logits = w.logits + product(sample, p.num_heads, p.tokens);
  stage_rows<kSteps>(tiles, metric, kRows, [=](int i) {
    return first_row + i < patches ? first_row + i : patches - 1;
  });
  softmax_stats(p, logits, stats);
  const int end_row = first_row + kRows < patches ? first_row + kRows : patches;
  for (int t = static_cast<int>(threadIdx.x); t < end_row; t += kThreads) {
    const float value = importance_of(p, logits, stats, t);
    importance[t] = is_nan(value) ? -INFINITY : value;
    if (t >= first_row && first_tile == 0) w.importance[product(sample, patches) + t] = value;
  }
  JMP_WAIT_COPIES(0);
  __syncthreads();

  const int warp_row = warp_index() / 2 * kTileRows;
  RowTile<kSteps> rows;
  rows.load(tiles + warp_row * kStride<kSteps>);
  const int row[2] = {first_row + warp_row + lane_index() / 4,
                      first_row + warp_row + lane_index() / 4 + 8};
  float mine[2];
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) mine[r] = row[r] < patches ? importance[row[r]] : 0.0f;
  float most[2] = {-INFINITY, -INFINITY};
  __syncthreads();  // the rows are in registers: columns may take their place

  const auto stage_columns = [&](int tile) {
    stage_rows<kSteps>(tiles + tile % 2 * kTileBytes<kSteps>, metric, kColumns<kSteps>,
                       [=](int i) {
                         const int column = tile * kColumns<kSteps> + i;
                         return column < patches ? column : patches - 1;
                       });
  };
  stage_columns(first_tile);
  for (int tile = first_tile; tile < end_tile; ++tile) {
    if (tile + 1 < end_tile) {
      stage_columns(tile + 1);
    } else {
      commit_copies();
    }
    JMP_WAIT_COPIES(1);
    __syncthreads();
    const int part = warp_index() % 2 * (kColumns<kSteps> / 2);
    const int first_column = tile * kColumns<kSteps> + part;
    if (first_column < first_row + warp_row + kTileRows && first_row + warp_row < patches) {
      float dots[kTiles][4];
      multiply<kSteps>(rows, tiles + tile % 2 * kTileBytes<kSteps> + part * kStride<kSteps>, dots);
      JMP_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        JMP_UNROLL
        for (int side = 0; side < 2; ++side) {
          const int column = first_column + t * 8 + lane_index() % 4 * 2 + side;
          const float theirs = column < end_row ? importance[column] : 0.0f;
          float column_most = -INFINITY;
          JMP_UNROLL
          for (int r = 0; r < 2; ++r) {
            if (column >= row[r] || row[r] >= patches) continue;
            // Of two equals the lower index, here the column, counts as more important.
            const float dot = dots[t][2 * r + side];  // fmaxf drops a NaN
            if (theirs >= mine[r]) {
              most[r] = fmaxf(most[r], dot);
            } else {
              column_most = fmaxf(column_most, dot);
            }
          }
          JMP_UNROLL
          for (int lanes = 4; lanes < kWarpSize; lanes *= 2) {
            column_most = fmaxf(column_most, __shfl_xor_sync(kAll, column_most, lanes));
          }
          if (lane_index() < 4 && column_most > -INFINITY) {
            atomicMax(w.redundancy + product(sample, patches) + column, ordered(column_most));
          }
        }
      }
    }
    __syncthreads();
  }
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) {
    most[r] = max_lanes<4>(most[r]);
    if (lane_index() % 4 == 0 && most[r] > -INFINITY) {
      atomicMax(w.redundancy + product(sample, patches) + row[r], ordered(most[r]));
    }
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_RATE_CUH
