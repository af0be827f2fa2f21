// Tuned version for samples that fit: the unit keys of a sample stay in shared memory, and the whole
// reduction is one launch. Up to 256 patch tokens, heads of up to 64 columns.
//
// Four steps: measure the tokens, rate them, match those that go with those that stay, merge. With
// many samples each has one block, which keeps everything (kAlone). With few, `groups` blocks share
// a sample: each does a part of every step, and tells the others what they need of it. Blocks of a
// cluster wait for each other and write into each other's shared memory (kCluster; compute capability
// 9.0 and newer); elsewhere every step is a launch of its own, and device memory holds what is told. How a sample is cut changes no sum and no operand's side: the
// bits are the same for any number of blocks.
#ifndef JMP_TOKEN_REDUCE_RESIDENT_CUH
#define JMP_TOKEN_REDUCE_RESIDENT_CUH

#include "token_reduce_merge.cuh"
#include "token_reduce_select.cuh"

namespace {

constexpr int kResidentPatches = 256;
constexpr int kResidentHeadDim = 64;
constexpr int kResidentSteps = 4;  // of 16 columns, on matrix units; narrower heads are filled up with zeros
constexpr int kStaticShared = 64;  // bytes
constexpr int kMostGroups = 8;     // blocks of a sample, a power of two: a portable cluster

// Steps, to be combined.
constexpr int kMeasure = 1;
constexpr int kRate = 2;
constexpr int kMatch = 4;
constexpr int kMerge = 8;
constexpr int kAlone = 15;
constexpr int kCluster = 31;

// Where things lie in a block's shared memory, in bytes.
struct ResidentLayout {
  int rows, keys, ratings, importance, query, logits, stats, nearest, source, kept, row_of, token_of;
  int arrivals, bytes;

  __host__ __device__ explicit ResidentLayout(const Params& p) {
    const int patches = (patch_tokens(p) + 15) / 16 * 16;
    int end = 0;
    const auto take = [&end](int size) {
      const int from = end;
      end += (size + 15) / 16 * 16;
      return from;
    };
    rows = take(patches * kStride<kResidentSteps>);
    nearest = take(patches * 8);
    keys = take(patches * 4);
    ratings = take(patches * 4);
    importance = take(patches * 4);
    source = take(patches * 4);
    query = take(p.num_heads * p.head_dim * 4);
    logits = take(p.num_heads * p.tokens * 4);
    stats = take(p.num_heads * 8);
    kept = take(patches * 2);
    row_of = take(patches * 2);
    token_of = take(patches * 2);
    arrivals = take(16);
    bytes = end;
  }
};

// Tells a block of the sample the number `at` of an array: `mine`, in the shared memory of each. Where
// the next launch reads it, block 0 is told, in `theirs`, in device memory.
template <int kDo>
__device__ inline void tell(uint32_t* mine, uint32_t* theirs, int at, uint32_t value, int block,
                            uint64_t* arrivals) {
  if constexpr (kDo == kAlone) {
    mine[at] = value;
  } else if constexpr (kDo == kCluster) {
    send(mine + at, value, arrivals, block);
  } else {
    if (block == 0) theirs[at] = value;
  }
}

// The blocks of a sample wait for each other, and see what the others wrote.
template <int kDo>
__device__ inline void wait_for_sample() {
  if constexpr (kDo == kAlone) {
    __syncthreads();
  } else if constexpr (kDo == kCluster) {
    wait_for_cluster();
  }
}

// A block waits for what the others, or its own threads, tell it.
template <int kDo>
__device__ inline void wait_until_told(uint64_t* arrivals) {
  if constexpr (kDo == kCluster) {
    wait_for_bytes(arrivals);
  } else {
    wait_for_sample<kDo>();
  }
}

// Sixteen rows; `row`: address of row lane % 16.
__device__ inline void load_rows(RowTile<kResidentSteps>& tile, const char* row) {
  const char* const at = row + lane_index() / 16 * 16;
  JMP_UNROLL
  for (int s = 0; s < kResidentSteps; ++s) {
    load_matrices(tile.hi[s], at + s * 32);
    load_matrices(tile.lo[s], at + s * 32 + 32 * kResidentSteps);
  }
}

// 16 rows x 16 columns in the order of `multiply`; `column`: address of column lane % 8, `next` of
// column lane % 8 + 8.
__device__ inline void multiply_16(const RowTile<kResidentSteps>& rows, const char* column,
                                   const char* next, float (&dots)[2][4]) {
  const int offset = lane_index() / 8 % 2 * 16 + lane_index() / 16 * 32 * kResidentSteps;
  JMP_UNROLL
  for (int t = 0; t < 2; ++t) {
    JMP_UNROLL
    for (int e = 0; e < 4; ++e) dots[t][e] = 0.0f;
  }
  JMP_UNROLL
  for (int s = 0; s < kResidentSteps; ++s) {
    uint32_t a[4];
    uint32_t b[4];
    load_matrices(a, column + offset + s * 32);
    load_matrices(b, next + offset + s * 32);
    multiply_tile(dots[0], rows.lo[s], a[0], a[1]);
    multiply_tile(dots[1], rows.lo[s], b[0], b[1]);
    multiply_tile(dots[0], rows.hi[s], a[2], a[3]);
    multiply_tile(dots[1], rows.hi[s], b[2], b[3]);
    multiply_tile(dots[0], rows.hi[s], a[0], a[1]);
    multiply_tile(dots[1], rows.hi[s], b[0], b[1]);
  }
}

// One more where key > than. By a predicate, and as a float: comparisons keep the integer units busy,
// and of an expression the compiler makes three instructions.
__device__ inline void count_larger(float& count, uint32_t key, uint32_t than) {
#ifdef JMP_CUDA_ON_HOST
  count += key > than ? 1.0f : 0.0f;
#else
  asm("{\n.reg .pred larger;\nsetp.gt.u32 larger, %1, %2;\n@larger add.f32 %0, %0, 0f3F800000;\n}"
      : "+f"(count)
      : "r"(key), "r"(than));
#endif
}

// rank[t]: how many of keys[0, patches) come before key t: larger first, then the lower index. `keys`
// goes on with zeros up to a multiple of 16. `holder` [patches] and `ties` are scratch. Begins and
// ends with a barrier.
__device__ inline void rank_keys(const uint32_t* keys, int patches, uint16_t* rank,
                                 uint16_t* holder, int* ties) {
  const int padded = (patches + 15) / 16 * 16;
  if (threadIdx.x == 0) *ties = 0;
  __syncthreads();
  JMP_NO_UNROLL
  for (int t = static_cast<int>(threadIdx.x); t < patches; t += kThreads) {
    const uint32_t mine = keys[t];
    float counts[4] = {};  // four, so that no addition waits for the one before
    JMP_UNROLL_4
    for (int j = 0; j < padded; j += 4) {
      const uint4 k = load_16(keys + j);
      count_larger(counts[0], k.x, mine);
      count_larger(counts[1], k.y, mine);
      count_larger(counts[2], k.z, mine);
      count_larger(counts[3], k.w, mine);
    }
    const int larger = static_cast<int>(counts[0] + counts[1] + counts[2] + counts[3]);
    rank[t] = static_cast<uint16_t>(larger);
    holder[larger] = static_cast<uint16_t>(t);
  }
  __syncthreads();
  JMP_NO_UNROLL
  for (int t = static_cast<int>(threadIdx.x); t < patches; t += kThreads) {
    if (holder[rank[t]] != t) *ties = 1;  // another has the same key
  }
  __syncthreads();
  if (*ties == 0) return;
  JMP_NO_UNROLL
  for (int t = static_cast<int>(threadIdx.x); t < patches; t += kThreads) {
    int equal = 0;
    JMP_NO_UNROLL
    for (int j = 0; j < t; ++j) equal += keys[j] == keys[t] ? 1 : 0;
    rank[t] = static_cast<uint16_t>(rank[t] + equal);
  }
  __syncthreads();
}

// A better candidate is a larger number: larger similarity, then lower slot. 0: none.
__device__ inline unsigned long long candidate(float similarity, int slot) {
  return static_cast<unsigned long long>(ordered(similarity + 0.0f)) << 32 |
         (0xffffffffu - static_cast<uint32_t>(slot));
}

// Units 0 to `units` are divided among the warps of a block: those of this one.
__device__ inline void my_units(int units, int* from, int* to) {
  *from = units * warp_index() / kWarps;
  *to = units * (warp_index() + 1) / kWarps;
}

// --- Step 4 --------------------------------------------------------------------------------------

// Rows of a warp whose loads are under way at once, of two accesses each.
constexpr int kCopiedAtOnce = 4;

// Rows of x for outputs that take no content in: bit for bit, one warp each, some at a time so that
// enough loads are under way. `row_of(place)`: the token, negative for an output to leave out.
template <typename T, typename Row>
__device__ inline void copy_outputs(const Params& p, const T* x, int sample, int first, int stride,
                                    T* y, Row row_of) {
  constexpr int kPieces = 2;  // of 16 bytes, that a lane has under way at once for an output
  constexpr int kOutputs = kCopiedAtOnce;
  const int places = p.num_prefix + p.num_keep;
  const int pieces = p.channels / kPerLoad<T>;
  const T* const from = x + token_row(p, sample, 0) * p.channels;
  T* const to = y + product(sample, places, p.channels);
  for (int place = first; place < places; place += kOutputs * stride) {
    for (int base = lane_index(); base < pieces; base += kPieces * kWarpSize) {
      uint4 raw[kOutputs][kPieces];
      int row[kOutputs];
      JMP_UNROLL
      for (int u = 0; u < kOutputs; ++u) {
        const int at = place + u * stride;
        row[u] = at < places ? row_of(at) : -1;
        JMP_UNROLL
        for (int k = 0; k < kPieces; ++k) {
          const int piece = base + k * kWarpSize;
          if (row[u] >= 0 && piece < pieces) {
            raw[u][k] = load_16(from + product(row[u], p.channels) + piece * kPerLoad<T>);
          }
        }
      }
      JMP_UNROLL
      for (int u = 0; u < kOutputs; ++u) {
        JMP_UNROLL
        for (int k = 0; k < kPieces; ++k) {
          const int piece = base + k * kWarpSize;
          if (row[u] >= 0 && piece < pieces) {
            store_16(to + product(place + u * stride, p.channels) + piece * kPerLoad<T>, raw[u][k]);
          }
        }
      }
    }
  }
}

// What became of every patch token, by one block.
__device__ inline void record_sample(const Params& p, const uint16_t* kept, const uint32_t* source,
                                     int rest, int32_t* index) {
  const int me = static_cast<int>(threadIdx.x);
  JMP_NO_UNROLL
  for (int i = me; i < p.num_keep; i += kThreads) index[kept[i]] = i;
  JMP_NO_UNROLL
  for (int i = me; i < rest; i += kThreads) {
    const uint32_t target = source[i] >> 16;
    const int nearest = target == kNobody ? 0 : static_cast<int>(target & ~kFar);
    const int fate = (target & kFar) == 0u ? kMerged : kPruned;
    index[source[i] & 0xffffu] = fate * p.num_keep + nearest;
  }
}

// --- The kernel ----------------------------------------------------------------------------------

template <typename T, int kDo>
__device__ inline void reduce_resident(const Params& p, const T* x, const T* qkv, const T* size,
                                       const Scratch& w, T* y, T* out_size, T* log_size,
                                       int32_t* index, int groups) {
  JMP_DYNAMIC_SHARED(shared);
  __shared__ uint32_t words[kResidentPatches / kWarpSize];
  __shared__ int flag;
  constexpr bool kOwn = kDo == kAlone;
  constexpr int kPieces = 4 * kResidentSteps;  // of 16 bytes, of a unit vector
  const ResidentLayout at(p);
  char* const rows = shared + at.rows;
  uint32_t* const keys = reinterpret_cast<uint32_t*>(shared + at.keys);
  // Of blocks that tell each other, since some may be ahead of those who still need `keys`.
  uint32_t* const ratings = kDo == kCluster ? reinterpret_cast<uint32_t*>(shared + at.ratings) : keys;
  float* const importance = reinterpret_cast<float*>(shared + at.importance);
  float* const logits = reinterpret_cast<float*>(shared + at.logits);
  float* const stats = reinterpret_cast<float*>(shared + at.stats);
  auto* const nearest = reinterpret_cast<unsigned long long*>(shared + at.nearest);
  uint32_t* const source = reinterpret_cast<uint32_t*>(shared + at.source);
  uint16_t* const kept = reinterpret_cast<uint16_t*>(shared + at.kept);
  uint16_t* const row_of = reinterpret_cast<uint16_t*>(shared + at.row_of);
  uint16_t* const token_of = reinterpret_cast<uint16_t*>(shared + at.token_of);
  uint64_t* const arrivals = reinterpret_cast<uint64_t*>(shared + at.arrivals);
  const int me = static_cast<int>(threadIdx.x);
  // A power of two, and no division.
  const int shift = kOwn ? 0 : 31 - __clz(groups);
  if (kOwn) groups = 1;
  const int sample = static_cast<int>(blockIdx.x) >> shift;
  const int group = static_cast<int>(blockIdx.x) & (groups - 1);
  const int patches = patch_tokens(p);
  const int padded = (patches + 15) / 16 * 16;
  const int rest = patches - p.num_keep;
  const bool distinct = p.selection == JMP_DISTINCT;
  // `groups` threads tell the blocks of a sample what there is to say of one row of those that are this
  // block's: every so many tiles one.
  const int teller = me & (groups - 1);
  const int told = me >> shift;
  const auto my_row = [=](int i) { return (i / kTileRows * groups + group) * kTileRows + i % kTileRows; };
  // What the blocks of a sample tell each other.
  float* const their_logits = w.logits + product(sample, p.num_heads, p.tokens);
  uint32_t* const their_keys = w.redundancy + product(sample, patches);
  uint32_t* const their_source = w.source + product(sample, rest);
  __half* const their_rows = w.metric + product(sample, patches, kPieces * 8);

  if constexpr (kDo == kCluster) {
    if (me == 0) {
      expect_bytes(arrivals, patches * 4);   // ratings
      expect_bytes(arrivals + 1, rest * 4);  // what becomes of the others
    }
    begin_cluster();
    for (int t = patches + me; t < padded; t += kThreads) ratings[t] = 0u;
  }
  if constexpr ((kDo & kMeasure) != 0) {
    const int share = (p.tokens + groups - 1) >> shift;
    const int begin = group * share;
    const int end = begin + share < p.tokens ? begin + share : p.tokens;
    measure_tokens<T, 2 * kResidentSteps, true>(
        p, qkv, size, sample, begin, end, reinterpret_cast<float*>(shared + at.query),
        32 * kResidentSteps,
        [=](int i, float logit) {
          if constexpr (kDo == kCluster) {
            JMP_UNROLL
            for (int block = 0; block < kMostGroups; ++block) {
              if (block < groups) *in_block(logits + i, block) = logit;
            }
          } else {
            (kOwn ? logits : their_logits)[i] = logit;
          }
        },
        [] {
          if constexpr (kDo == kCluster) cluster_has_begun();
        },
        [=](int patch) {
          return kOwn ? rows + patch * kStride<kResidentSteps>
                      : reinterpret_cast<char*>(their_rows + patch * kPieces * 8);
        });
    if constexpr (kDo == kCluster) {
      // x is read last, and comes into the second level cache meanwhile. Not where the device is
      // full: its memory is what such a batch waits for, and other lines would have to go.
      const int64_t bytes = product(p.tokens, p.channels, sizeof(T));
      const char* const from = reinterpret_cast<const char*>(x) + product(sample, bytes);
      for (int64_t i = 128 * (product(group, kThreads) + me); i < bytes;
           i += 128 * product(groups, kThreads)) {
        prefetch(from + i);
      }
    }
    wait_for_sample<kDo>();
  }

  if constexpr (!kOwn && (kDo & (kRate | kMatch)) != 0) {
    const __half* from = their_rows + me * 8;
    char* to = rows + me / kPieces * kStride<kResidentSteps> + me % kPieces * 16;
    for (int i = me; i < patches * kPieces; i += kThreads) {
      copy_16(to, from);
      from += kThreads * 8;
      to += kThreads / kPieces * kStride<kResidentSteps>;
    }
    commit_copies();
  }
  // Importance. Each block finds it for itself.
  if ((kDo & kRate) != 0 || ((kDo & kMatch) != 0 && !distinct)) {
    if ((!kOwn && kDo != kCluster) || !asks_one_row(p)) {
      JMP_UNROLL_4
      for (int i = me; i < p.num_heads * p.tokens; i += kThreads) logits[i] = their_logits[i];
      __syncthreads();
    }
    softmax_stats(p, logits, stats);
    JMP_NO_UNROLL
    for (int t = me; t < padded; t += kThreads) {
      const float value = t < patches ? importance_of(p, logits, stats, t) : 0.0f;
      importance[t] = value;
      keys[t] = t < patches ? sort_key(value) : 0u;
    }
  }

  // How much each token resembles a more important one.
  if constexpr ((kDo & kRate) != 0) {
    if (distinct) {
      uint32_t* const most = reinterpret_cast<uint32_t*>(nearest);  // by row; 0: none
      JMP_NO_UNROLL
      for (int r = me; r < padded; r += kThreads) most[r] = 0u;
      if constexpr (kOwn) {
        // The rows move into the order of importance: then row tile t meets column tiles 0 to t.
        rank_keys(keys, patches, row_of, token_of, &flag);
        constexpr int kMoves = kResidentPatches * kPieces / kThreads;
        uint4 moved[kMoves];
        JMP_UNROLL
        for (int k = 0; k < kMoves; ++k) {
          const int i = me + k * kThreads;
          if (i < patches * kPieces) {
            moved[k] = load_16(rows + i / kPieces * kStride<kResidentSteps> + i % kPieces * 16);
          }
        }
        JMP_NO_UNROLL
        for (int t = me; t < patches; t += kThreads) token_of[row_of[t]] = static_cast<uint16_t>(t);
        __syncthreads();
        JMP_UNROLL
        for (int k = 0; k < kMoves; ++k) {
          const int i = me + k * kThreads;
          if (i < patches * kPieces) {
            store_16(rows + row_of[i / kPieces] * kStride<kResidentSteps> + i % kPieces * 16, moved[k]);
          }
        }
      } else {
        JMP_WAIT_COPIES(0);
      }
      __syncthreads();
      const int tiles = padded / kTileRows;
      const auto across = [=](int t) { return kOwn ? t + 1 : tiles; };
      int units = 0;
      JMP_NO_UNROLL
      for (int t = group; t < tiles; t += groups) units += across(t);
      int unit = 0;
      int end = 0;
      my_units(units, &unit, &end);
      int first = 0;  // unit of the tile
      for (int t = group; t < tiles && unit < end; first += across(t), t += groups) {
        if (unit >= first + across(t)) continue;
        RowTile<kResidentSteps> mine;
        load_rows(mine, rows + (t * kTileRows + lane_index() % 16) * kStride<kResidentSteps>);
        const int row = t * kTileRows + lane_index() / 4;
        const uint32_t my_keys[2] = {keys[row], keys[row + 8]};
        float best[2] = {-INFINITY, -INFINITY};
        for (; unit < end && unit < first + across(t); ++unit) {
          const int tile = unit - first;
          const char* const column = rows + (tile * kTileRows + lane_index() % 8) * kStride<kResidentSteps>;
          float dots[2][4];
          multiply_16(mine, column, column + 8 * kStride<kResidentSteps>, dots);
          JMP_UNROLL
          for (int k = 0; k < 2; ++k) {
            const int other = tile * kTileRows + k * 8 + lane_index() % 4 * 2;
            JMP_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int its = other + e % 2;
              const int of_row = row + e / 2 * 8;
              const bool elder =
                  kOwn ? tile < t || its < of_row
                       : its < patches && keys[its] >= my_keys[e / 2] + (its >= of_row ? 1u : 0u);
              if (elder) best[e / 2] = fmaxf(best[e / 2], dots[k][e]);  // drops a NaN
            }
          }
        }
        JMP_UNROLL
        for (int r = 0; r < 2; ++r) {
          best[r] = max_lanes<4>(best[r]);
          if (lane_index() % 4 == 0 && best[r] > -INFINITY) {
            atomicMax(most + row + 8 * r, ordered(best[r]));
          }
        }
      }
      __syncthreads();
      JMP_NO_UNROLL
      for (int i = told; my_row(i) < patches; i += kThreads >> shift) {
        const int row = my_row(i);
        const int token = kOwn ? token_of[row] : row;
        const uint32_t key = sort_key(distinct_rating(importance[token], redundancy_of(most[row])));
        tell<kDo>(ratings, their_keys, token, key, teller, arrivals);
      }
      wait_until_told<kDo>(arrivals);
    }
  }

  // The K largest ratings, and every other token's nearest of these.
  if constexpr ((kDo & kMatch) != 0) {
    uint16_t* const others = token_of;
    uint16_t* const ranks = kept;  // until the selection is known
    const bool moved = kOwn && distinct;  // rows lie in the order of importance
    uint32_t* const rated = distinct ? ratings : keys;
    if (!kOwn && kDo != kCluster && distinct) {
      JMP_NO_UNROLL
      for (int t = me; t < padded; t += kThreads) keys[t] = t < patches ? their_keys[t] : 0u;
    }
    if constexpr (!kOwn) {
      JMP_WAIT_COPIES(0);
    }
    rank_keys(rated, patches, ranks, others, &flag);
    JMP_NO_UNROLL
    for (int first = warp_index() * kWarpSize; first < patches; first += kThreads) {
      const int t = first + lane_index();
      const unsigned word = __ballot_sync(kAll, t < patches && ranks[t] < p.num_keep);
      if (lane_index() == 0) words[first / kWarpSize] = word;
    }
    JMP_NO_UNROLL
    for (int i = me; i < rest; i += kThreads) nearest[i] = 0u;
    __syncthreads();
    JMP_NO_UNROLL
    for (int t = me; t < patches; t += kThreads) {
      const uint32_t word = words[t / kWarpSize];
      int slot = __popc(word & ((1u << t % kWarpSize) - 1u));
      JMP_NO_UNROLL
      for (int i = 0; i < t / kWarpSize; ++i) slot += __popc(words[i]);
      if ((word >> t % kWarpSize & 1u) != 0u) {
        kept[slot] = static_cast<uint16_t>(t);
        if ((kDo & kMerge) == 0 && group == 0) w.kept[product(sample, p.num_keep) + slot] = t;
      } else {
        others[t - slot] = static_cast<uint16_t>(t);
      }
    }
    __syncthreads();
    const int tiles = divide_up(rest, kTileRows);
    const int across = divide_up(p.num_keep, kTileRows);
    const int my_tiles = tiles > group ? (tiles - group + groups - 1) >> shift : 0;
    int unit = 0;
    int end = 0;
    my_units(my_tiles * across, &unit, &end);
    while (unit < end) {
      const int t = group + unit / across * groups;
      const int stop = unit / across * across + across;
      const auto row_at = [=](int token) {
        return rows + (moved ? row_of[token] : token) * kStride<kResidentSteps>;
      };
      RowTile<kResidentSteps> mine;
      const int row_here = t * kTileRows + lane_index() % 16;
      load_rows(mine, row_at(others[row_here < rest ? row_here : rest - 1]));
      float best[2] = {-2.0f, -2.0f};
      int slots[2] = {0, 0};
      for (; unit < end && unit < stop; ++unit) {
        const int first = unit % across * kTileRows;
        const char* columns[2];
        JMP_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int slot = first + k * 8 + lane_index() % 8;
          columns[k] = row_at(kept[slot < p.num_keep ? slot : p.num_keep - 1]);
        }
        float dots[2][4];
        multiply_16(mine, columns[0], columns[1], dots);
        JMP_UNROLL
        for (int k = 0; k < 2; ++k) {
          JMP_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int slot = first + k * 8 + lane_index() % 4 * 2 + e % 2;
            float dot = dots[k][e];
            dot = dot > 1.0f ? 1.0f : dot;  // not fminf: a NaN must stay one, and lose below
            dot = dot < -1.0f ? -1.0f : dot;
            if (slot < p.num_keep && dot > best[e / 2]) {
              best[e / 2] = dot;
              slots[e / 2] = slot;
            }
          }
        }
      }
      JMP_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = t * kTileRows + lane_index() / 4 + 8 * r;
        if (row < rest && best[r] > -2.0f) atomicMax(nearest + row, candidate(best[r], slots[r]));
      }
    }
    __syncthreads();
    JMP_NO_UNROLL
    for (int r = told; my_row(r) < rest; r += kThreads >> shift) {
      const int i = my_row(r);
      const bool none = nearest[i] == 0u;
      const float similarity = redundancy_of(static_cast<uint32_t>(nearest[i] >> 32));
      const bool pruned = p.granularity == JMP_PER_TOKEN && !(similarity >= p.tau);
      const uint32_t slot = 0xffffffffu - static_cast<uint32_t>(nearest[i] & 0xffffffffu);
      const uint32_t word = others[i] | (none ? kNobody : slot | (pruned ? kFar : 0u)) << 16;
      tell<kDo>(source, their_source, i, word, teller, arrivals + 1);
      if (p.granularity == JMP_PER_SAMPLE && teller == 0) {
        w.similarity[product(sample, rest) + i] = none ? NAN : similarity;
      }
    }
    wait_until_told<kDo>(arrivals + 1);
    if (kDo == kCluster && p.granularity == JMP_PER_SAMPLE) wait_for_sample<kDo>();
  }

  if constexpr ((kDo & kMerge) != 0) {
    // In `taken` every slot that takes content in, in `mixed` these slots.
    uint32_t* const taken = words;
    uint16_t* const mixed = row_of;
    if constexpr ((kDo & kMatch) == 0) {
      JMP_NO_UNROLL
      for (int i = me; i < p.num_keep; i += kThreads) {
        kept[i] = static_cast<uint16_t>(w.kept[product(sample, p.num_keep) + i]);
      }
    }
    for (int i = me; i < kResidentPatches / kWarpSize; i += kThreads) taken[i] = 0u;
    const bool merges = p.granularity == JMP_PER_TOKEN || sample_merges(p, w, sample, rest);
    __syncthreads();
    JMP_NO_UNROLL
    for (int i = me; i < rest; i += kThreads) {
      uint32_t word = ((kDo & kMatch) != 0 ? source : their_source)[i];
      if (!merges) word |= kFar << 16;
      source[i] = word;
      const uint32_t slot = word >> 16;
      if ((slot & kFar) == 0u) atomicOr(taken + slot / kWarpSize, 1u << slot % kWarpSize);
    }
    __syncthreads();
    const auto takes_in = [=](int slot) {
      return (taken[slot / kWarpSize] >> slot % kWarpSize & 1u) != 0u;
    };
    int count = 0;
    for (int i = 0; i < kResidentPatches / kWarpSize; ++i) {
      const uint32_t word = taken[i];
      const int slot = i * kWarpSize + lane_index();
      if (warp_index() == 0 && (word >> lane_index() & 1u) != 0u) {
        mixed[count + __popc(word & lanes_below())] = static_cast<uint16_t>(slot);
      }
      count += __popc(word);
    }
    if (index != nullptr && group == 0) {
      record_sample(p, kept, source, rest, index + product(sample, patches));
    }
    const T* const sizes = size + (p.size_batch == 1 ? 0 : token_row(p, sample, 0));
    const int places = p.num_prefix + p.num_keep;
    const int warp = warp_index() * groups + group;
    const int warps = kWarps * groups;
    // Where warps are left over by the sums, and enough to copy all others at once, they do that.
    const int first = places - count <= kCopiedAtOnce * (warps - count) ? count : 0;
    __syncthreads();  // `mixed` is there
    for (int i = warp; i < count; i += warps) {
      const int slot = mixed[i];
      mix_output(p, x, sizes, sample, kept[slot], slot, source, rest, y, out_size, log_size);
    }
    if (warp >= first) {
      copy_outputs(p, x, sample, warp - first, warps - first, y, [=](int place) {
        if (place < p.num_prefix) return place;
        const int slot = place - p.num_prefix;
        return p.merge_weight != 0.0f && takes_in(slot) ? -1 : p.num_prefix + kept[slot];
      });
    }
    JMP_NO_UNROLL
    for (int place = group * kThreads + me; place < places; place += groups * kThreads) {
      const int slot = place - p.num_prefix;
      if (slot >= 0 && takes_in(slot)) continue;
      const T own = sizes[slot < 0 ? place : p.num_prefix + kept[slot]];
      out_size[product(sample, places) + place] = own;
      log_size[product(sample, places) + place] = from_float<T>(logf(to_float(own)));
    }
  }
}

// Where there are clusters nobody launches the steps one by one, and nobody clusters elsewhere: that
// machine code is left out.
#if !defined(__CUDA_ARCH__) || defined(JMP_NO_CLUSTERS)
template <int kDo>
constexpr bool kWanted = true;
#else
template <int kDo>
constexpr bool kWanted = kDo == kAlone || (kDo == kCluster) == (__CUDA_ARCH__ >= 900);
#endif

template <typename T, int kDo>
__global__ void __launch_bounds__(kThreads, 2)
    resident_kernel(Params p, const T* x, const T* qkv, const T* size, Scratch w, T* y, T* out_size,
                    T* log_size, int32_t* index, int groups) {
  if constexpr (kWanted<kDo>) {
    reduce_resident<T, kDo>(p, x, qkv, size, w, y, out_size, log_size, index, groups);
  }
}

}  // namespace

#endif  // JMP_TOKEN_REDUCE_RESIDENT_CUH
