// Tuned version, before all else where importance is the attention received: the attention that
// every token gets from the rows of all tokens. Two launches of one kernel; no attention matrix is
// ever stored.
#ifndef JMP_TOKEN_REDUCE_RECEIVED_CUH
#define JMP_TOKEN_REDUCE_RECEIVED_CUH

#include "token_reduce_tiles.cuh"

namespace {

// Logits to base 2: the GPU has an instruction for that power, and no other.
constexpr float kLog2E = 1.44269504f;

__device__ inline float exp2_of(float v) {
#ifdef JMP_CUDA_ON_HOST
  return exp2f(v);
#else
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
#endif
}

// Queries and keys as matrix units take them: float16 as it is. Others are divided by the power of
// two below the largest of their row, which fits any of them into halves; what that loses of a
// bfloat16 is below 2^-25 of the largest, and a float32 takes two halves, as a unit vector does.
template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;
template <typename T>
constexpr bool kHasLow = sizeof(T) == 4;

__device__ inline float power_below(float top) {
  const float power = __uint_as_float(__float_as_uint(top) & 0x7f800000u);
  return power > 1e-30f && power < 1e30f ? power : 1.0f;  // false for 0, inf, NaN
}

// Two values as the halves of a word; `lost` takes what rounding lost.
__device__ inline uint32_t pack_pair(float a, float b, float* lost) {
  const __half halves[2] = {__float2half_rn(a), __float2half_rn(b)};
  lost[0] = a - __half2float(halves[0]);
  lost[1] = b - __half2float(halves[1]);
  uint32_t word;
  memcpy(&word, halves, sizeof word);
  return word;
}

// The sixteen rows of a warp, from global memory, rows at `from` and at `next`, 8 below.
template <typename T, int kSteps>
struct OwnRows {
  uint32_t hi[kSteps][4];
  uint32_t lo[kHasLow<T> ? kSteps : 1][4];
  float power[2];

  __device__ void load(const T* from, const T* next, int head_dim) {
    const auto column_of = [](int s, int i) { return s * 16 + i / 2 * 8 + lane_index() % 4 * 2; };
    power[0] = power[1] = 1.0f;
    if constexpr (!kIsHalf<T>) {
      float top[2] = {0.0f, 0.0f};
      for (int c = lane_index() % 4 * 2; c < head_dim; c += 8) {
        top[0] = fmaxf(top[0], fmaxf(fabsf(to_float(from[c])), fabsf(to_float(from[c + 1]))));
        top[1] = fmaxf(top[1], fmaxf(fabsf(to_float(next[c])), fabsf(to_float(next[c + 1]))));
      }
      power[0] = power_below(max_lanes<4>(top[0]));
      power[1] = power_below(max_lanes<4>(top[1]));
    }
    JMP_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      JMP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = column_of(s, i);
        const T* const at = (i % 2 == 0 ? from : next) + column;
        hi[s][i] = 0u;
        if constexpr (kHasLow<T>) lo[s][i] = 0u;
        if (column >= head_dim) continue;
        if constexpr (kIsHalf<T>) {
          hi[s][i] = word_at(reinterpret_cast<const char*>(at));
        } else {
          float lost[2];
          float unused[2];
          const float inverse = 1.0f / power[i % 2];
          hi[s][i] = pack_pair(to_float(at[0]) * inverse, to_float(at[1]) * inverse, lost);
          if constexpr (kHasLow<T>) lo[s][i] = pack_pair(lost[0], lost[1], unused);
        }
      }
    }
  }
};

// A tile of columns in shared memory: rows of hi, then lo, then 16 bytes, and what is known of each.
template <typename T, int kSteps>
struct ColumnTile {
  static constexpr int kBytesOfRow = 32 * kSteps * (kHasLow<T> ? 2 : 1) + 16;
  static constexpr int kCount = kBytesOfRow <= 272 || JMP_TILE_COLUMNS < 64 ? JMP_TILE_COLUMNS : 32;
  static_assert(kCount % 32 == 0, "a warp takes 32 columns at a time");
  char rows[kCount * kBytesOfRow];
  float power[kCount];
  float first[kCount];   // log2 of a key's size; the largest logit of a query's row
  float second[kCount];  // of a query: 1 / denominator

  // Starts to copy; row i is at `row(i)`.
  template <typename Row>
  __device__ void stage(int head_dim, Row row) {
    constexpr int kLanes = 2 * kSteps;  // a row's, eight columns each
    const int part = static_cast<int>(threadIdx.x) % kLanes;
    for (int i = static_cast<int>(threadIdx.x) / kLanes; i < kCount; i += kThreads / kLanes) {
      char* const to = rows + i * kBytesOfRow + part * 16;
      const T* const from = row(i) + part * 8;
      const bool here = part * 8 < head_dim;
      if constexpr (kIsHalf<T>) {
        if (here) {
          copy_16(to, from);
        } else {
          store_16(to, uint4{0u, 0u, 0u, 0u});
        }
      } else {
        float values[8] = {};
        if (here) {
          JMP_UNROLL
          for (int l = 0; l < 8; l += kPerLoad<T>) unpack<T>(load_16(from + l), values + l);
        }
        float top = 0.0f;
        JMP_UNROLL
        for (int c = 0; c < 8; ++c) top = fmaxf(top, fabsf(values[c]));
        const float its = power_below(max_lanes<kLanes>(top));
        if (part == 0) power[i] = its;
        float lost[8];
        JMP_UNROLL
        for (int c = 0; c < 8; ++c) {
          values[c] *= 1.0f / its;
          lost[c] = values[c] - __half2float(__float2half_rn(values[c]));
        }
        store_16(to, pack<__half>(values));
        if (kHasLow<T>) store_16(to + 32 * kSteps, pack<__half>(lost));
      }
    }
  }
};

// dots: of a warp's rows and columns 8t to 8t+7; see multiply_tile.
template <typename T, int kSteps>
__device__ inline void multiply_own(const OwnRows<T, kSteps>& own, const char* rows, int t,
                                    float (&dots)[4]) {
  const char* const at =
      rows + (t * 8 + lane_index() % 8) * ColumnTile<T, kSteps>::kBytesOfRow + lane_index() / 8 * 16;
  JMP_UNROLL
  for (int e = 0; e < 4; ++e) dots[e] = 0.0f;
  JMP_UNROLL
  for (int s = 0; s < kSteps; s += 2) {
    uint32_t hi[4];
    load_matrices(hi, at + s * 32);
    if constexpr (kHasLow<T>) {
      uint32_t lo[4];
      load_matrices(lo, at + s * 32 + 32 * kSteps);
      multiply_tile(dots, own.lo[s], hi[0], hi[1]);
      multiply_tile(dots, own.lo[s + 1], hi[2], hi[3]);
      multiply_tile(dots, own.hi[s], lo[0], lo[1]);
      multiply_tile(dots, own.hi[s + 1], lo[2], lo[3]);
    }
    multiply_tile(dots, own.hi[s], hi[0], hi[1]);
    multiply_tile(dots, own.hi[s + 1], hi[2], hi[3]);
  }
}

__host__ __device__ inline int attention_groups(const Params& p) {
  return static_cast<int>(divide_up(p.tokens, kWarps * kTileRows));
}

// A warp has sixteen tokens of one head, and meets all of them. First as queries that meet keys:
// maximum and denominator of each row's softmax, to w.rows. Then, with kReceives, as keys that meet
// queries: the sum of what they are given, to w.logits.
template <typename T, int kSteps, bool kReceives>
__global__ void __launch_bounds__(kThreads, kHasLow<T> && kSteps > 4 ? 1 : 2)
    attention_kernel(Params p, const T* qkv, const T* size, Scratch w) {
  using Tile = ColumnTile<T, kSteps>;
  JMP_DYNAMIC_SHARED(shared);
  Tile* const tiles = reinterpret_cast<Tile*>(shared);  // two
  const int groups = attention_groups(p);
  const int group = static_cast<int>(blockIdx.x) % groups;
  const int head = static_cast<int>(blockIdx.x) / groups % p.num_heads;
  const int sample = static_cast<int>(blockIdx.x) / groups / p.num_heads;
  const int first_row = (group * kWarps + warp_index()) * kTileRows;
  const auto clamped = [&p](int token) { return token < p.tokens ? token : p.tokens - 1; };
  const auto log_size = [&](int token) {
    return p.proportional ? log2f(to_float(size_of(p, size, sample, token))) : 0.0f;
  };
  RowStats* const stats = w.rows + product(sample, p.num_heads, p.tokens) + product(head, p.tokens);
  const auto stage = [&](int index) {
    Tile& tile = tiles[index % 2];
    const int base = index * Tile::kCount;
    tile.stage(p.head_dim, [&](int i) {
      const int token = clamped(base + i);
      return kReceives ? query_of(p, qkv, sample, token, head) : key_of(p, qkv, sample, token, head);
    });
    commit_copies();
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kCount; i += kThreads) {
      const bool there = base + i < p.tokens;
      if constexpr (kReceives) {  // a query that is not there gives nothing
        const RowStats its = there ? stats[base + i] : RowStats{FLT_MAX, 0.0f};
        tile.first[i] = its.top;
        tile.second[i] = its.inverse;
      } else {
        tile.first[i] = there ? log_size(base + i) : -INFINITY;
      }
    }
  };
  stage(0);

  OwnRows<T, kSteps> own;
  const int row[2] = {first_row + lane_index() / 4, first_row + lane_index() / 4 + 8};
  const T* mine[2];
  float own_log_size[2];
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int token = clamped(row[r]);
    mine[r] = kReceives ? key_of(p, qkv, sample, token, head) : query_of(p, qkv, sample, token, head);
    own_log_size[r] = kReceives ? log_size(token) : 0.0f;
  }
  own.load(mine[0], mine[1], p.head_dim);
  const float scale = p.scale * kLog2E;
  float top[2] = {-FLT_MAX, -FLT_MAX};  // not -inf: inf - inf would be a NaN that is not in the data
  float sum[2] = {0.0f, 0.0f};
  const int count = static_cast<int>(divide_up(p.tokens, Tile::kCount));
  for (int index = 0; index < count; ++index) {
    if (index + 1 < count) {
      stage(index + 1);
    } else {
      commit_copies();
    }
    JMP_WAIT_COPIES(1);
    __syncthreads();
    const Tile& tile = tiles[index % 2];
    if (first_row < p.tokens) {
      JMP_NO_UNROLL
      for (int part = 0; part < Tile::kCount / 32; ++part) {
        float logits[4][4];
        JMP_UNROLL
        for (int t = 0; t < 4; ++t) {
          multiply_own(own, tile.rows, part * 4 + t, logits[t]);
          JMP_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int column = (part * 4 + t) * 8 + lane_index() % 4 * 2 + e % 2;
            float dot = logits[t][e];
            if constexpr (!kIsHalf<T>) dot *= own.power[e / 2] * tile.power[column];
            logits[t][e] = scale * dot + (kReceives ? own_log_size[e / 2] : tile.first[column]);
          }
        }
        if constexpr (!kReceives) {
          JMP_UNROLL
          for (int r = 0; r < 2; ++r) {
            float larger = top[r];
            JMP_UNROLL
            for (int t = 0; t < 4; ++t) {
              larger = fmaxf(larger, fmaxf(logits[t][2 * r], logits[t][2 * r + 1]));
            }
            sum[r] *= exp2_of(top[r] - larger);
            top[r] = larger;
          }
        }
        JMP_UNROLL
        for (int t = 0; t < 4; ++t) {
          JMP_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int column = (part * 4 + t) * 8 + lane_index() % 4 * 2 + e % 2;
            if constexpr (kReceives) {
              sum[e / 2] += exp2_of(logits[t][e] - tile.first[column]) * tile.second[column];
            } else {
              sum[e / 2] += exp2_of(logits[t][e] - top[e / 2]);
            }
          }
        }
      }
    }
    __syncthreads();
  }
  JMP_UNROLL
  for (int r = 0; r < 2; ++r) {
    if constexpr (kReceives) {
      sum[r] = sum_lanes<4>(sum[r]);
    } else {
      const float largest = max_lanes<4>(top[r]);
      sum[r] = sum_lanes<4>(sum[r] * exp2_of(top[r] - largest));
      top[r] = largest;
    }
    if (lane_index() % 4 != 0 || row[r] >= p.tokens) continue;
    if constexpr (kReceives) {
      w.logits[(product(sample, p.num_heads) + head) * p.tokens + row[r]] = sum[r];
    } else {
      stats[row[r]] = RowStats{top[r], 1.0f / sum[r]};
    }
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_RECEIVED_CUH
