// Tuned version: cosines of many pairs of tokens at once, on matrix units, as exact as in float32.
//
// A unit vector m is stored as two halves, hi = half(m) and lo = half(m - hi). Three products
// (lo*hi, hi*lo, hi*hi) with float32 sums give m.m' to about 1e-7: no decision depends on the fact
// that matrix units take halves. What is dropped, lo*lo, is below 2^-22.
#ifndef JMP_TOKEN_REDUCE_TILES_CUH
#define JMP_TOKEN_REDUCE_TILES_CUH

#include "token_reduce_measure.cuh"

#ifndef JMP_TILE_COLUMNS  // tests with few tokens take fewer, so that several tiles follow each other
#define JMP_TILE_COLUMNS 64
#endif

namespace {

// A block compares kRows tokens with kColumns others at a time. Warp 2r + h has 16 rows, 16r to
// 16r + 15, and half of the columns.
constexpr int kRows = kThreads / 4;
constexpr int kTileRows = 16;

// A token's row in shared memory: hi, lo, and 16 bytes more, so that the 8 rows x 4 words that a
// warp reads at a time lie in 32 different banks.
template <int kSteps>
constexpr int kStride = 64 * kSteps + 16;
// Two tiles of columns, or one of rows, fit 48 KB.
template <int kSteps>
constexpr int kColumns = kSteps <= 4 ? JMP_TILE_COLUMNS : JMP_TILE_COLUMNS / 2;
template <int kSteps>
constexpr int kTileBytes = kColumns<kSteps> * kStride<kSteps>;

// Starts to copy `rows` rows; row i is that of patch token index(i).
template <int kSteps, typename Index>
__device__ inline void stage_rows(char* to, const __half* metric, int rows, Index index) {
  constexpr int kPieces = 4 * kSteps;  // of 16 bytes
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    copy_16(to + row * kStride<kSteps> + piece * 16,
            metric + product(index(row), kPieces * 8) + piece * 8);
  }
  commit_copies();
}

// Sixteen rows in registers, as matrix units want them.
template <int kSteps>
struct RowTile {
  uint32_t hi[kSteps][4];
  uint32_t lo[kSteps][4];

  __device__ void load(const char* tile) {
    const char* at = tile + lane_index() / 4 * kStride<kSteps> + lane_index() % 4 * 4;
    JMP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      JMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int offset = i % 2 * 8 * kStride<kSteps> + s * 32 + i / 2 * 16;
        hi[s][i] = word_at(at + offset);
        lo[s][i] = word_at(at + offset + 32 * kSteps);
      }
    }
  }
};

// dots[t]: this lane's four of the 16 rows x columns 8t to 8t+7 of `tile`; see multiply_tile.
template <int kSteps, int kTiles>
__device__ inline void multiply(const RowTile<kSteps>& rows, const char* tile,
                                float (&dots)[kTiles][4]) {
  const char* at = tile + lane_index() / 4 * kStride<kSteps> + lane_index() % 4 * 4;
  JMP_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    JMP_UNROLL
    for (int e = 0; e < 4; ++e) dots[t][e] = 0.0f;
  }
  JMP_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    JMP_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const char* column = at + t * 8 * kStride<kSteps> + s * 32;
      const uint32_t hi[2] = {word_at(column), word_at(column + 16)};
      const uint32_t lo[2] = {word_at(column + 32 * kSteps), word_at(column + 32 * kSteps + 16)};
      multiply_tile(dots[t], rows.lo[s], hi[0], hi[1]);
      multiply_tile(dots[t], rows.hi[s], lo[0], lo[1]);
      multiply_tile(dots[t], rows.hi[s], hi[0], hi[1]);
    }
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_TILES_CUH
