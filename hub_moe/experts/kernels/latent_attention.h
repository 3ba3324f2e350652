// Attention of a few new tokens over the latent cache, which is read once for all heads.
//
// Letters: B sequences, L new tokens of each, T = B * L, S cached tokens, H heads, M = L * H rows of queries, C latent,
// N head without rotation, R rotary part, V value.

#pragma once

#include "few_rows.h"

namespace {

constexpr int64_t kBlock = 64, kSplit = 512;     // cached tokens that stay in the cache, and of one task
constexpr int kHeadRows = kLanes == 16 ? 8 : 4;  // rows of queries in one tile of sums of latents
constexpr int kWide = kLanes == 16 ? 16 : 8;     // vectors of a run of columns that stays in registers
constexpr int kRowsAhead = 16;                   // of such a run, that are fetched ahead: they lie apart

// out (columns) = sum over n of x[n] * w[n]: the product with a weight whose columns are outputs.
template <int V, typename W, typename Y>
inline void combine(const float* x, int64_t count, const W* w, int64_t w_row, Y* out) {
  Vec acc[V] = {};
  for (int64_t n = 0; n < count; ++n) {
    Vec factor = broadcast(x[n]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(w + (n + kRowsAhead) * w_row + v * kLanes, 0, 2);
      acc[v] += factor * load(w + n * w_row + v * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
}

template <typename W, typename Y>
void combine_columns(const float* x, int64_t count, const W* w, int64_t w_row, int64_t columns, Y* out) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= columns; c += kWide * kLanes) combine<kWide>(x, count, w + c, w_row, out + c);
  for (; c + kLanes <= columns; c += kLanes) combine<1>(x, count, w + c, w_row, out + c);
  if (c == columns) return;
  Vec acc = {};
  for (int64_t n = 0; n < count; ++n) acc += broadcast(x[n]) * load_some(w + n * w_row + c, columns - c);
  store_some(out + c, acc, columns - c);
}

struct Cache {  // element (b, s, c) of the latents at latent[b * latent_sequence + s * latent_row + c], keys alike
  const void *latent, *key;
  int64_t latent_sequence, latent_row, key_sequence, key_row, S;
};

struct Mask {  // kind 0: none; 1: bytes, 1 for what is seen; 2: float32 and 3: bfloat16 numbers to add
  const void* base;
  int kind;
  int64_t sequence, head, token, cached;  // elements from one to the next; 0 where all share one
};

// scores (M, kBlock) of `count` cached tokens: rows of `query` are C numbers as they meet latents, then R as they meet keys.
template <typename X, typename W>
void score_block(const X* query, int64_t M, int64_t C, int64_t R, const W* latent, int64_t latent_row, const W* key,
                 int64_t key_row, int64_t count, float* scores) {
  constexpr int kRows = std::is_same_v<X, Spread> ? kPairRows : kDotRows;
  int64_t step = M % kRows == 0 || M < kRows ? kRows : std::min<int64_t>(kRows, 4);
  int64_t turned_at = met_size<X>(C), width = turned_at + met_size<X>(R);
  for (int64_t j = 0; j < count; j += kDotColumns) {
    bool is_short = j + kDotColumns > count;
    for (int64_t m = 0; m < M; m += step) {
      int64_t rows = std::min(step, M - m);
      const X *wide[kRows], *turned[kRows];
      for (int64_t i = 0; i < rows; ++i) wide[i] = query + (m + i) * width, turned[i] = wide[i] + turned_at;
      if (!is_short) {
        float* to = scores + m * kBlock + j;
        dot_tile_of<kRows>(rows, wide, latent + j * latent_row, latent_row, C, to, kBlock, false);
        dot_tile_of<kRows>(rows, turned, key + j * key_row, key_row, R, to, kBlock, true);
      } else {
        for (int64_t k = j; k < count; ++k) {
          float sums[kRows * kDotColumns];
          dot_tile_of<kRows>(rows, wide, latent + k * latent_row, (int64_t)0, C, sums, (int64_t)kDotColumns, false);
          dot_tile_of<kRows>(rows, turned, key + k * key_row, (int64_t)0, R, sums, (int64_t)kDotColumns, true);
          for (int64_t i = 0; i < rows; ++i) scores[(m + i) * kBlock + k] = sums[i * kDotColumns];
        }
      }
    }
  }
}

inline void mask_scores(float* scores, int64_t count, float scaling, const Mask& mask, int64_t offset) {
  constexpr float kLowest = -3.402823466e38f;  // a sum with it stays finite, so a row of nothing else is a mean
  if (mask.kind == 0) {
    for (int64_t j = 0; j < count; ++j) scores[j] *= scaling;
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    int64_t place = offset + j * mask.cached;
    if (mask.kind == 1) {
      scores[j] = ((const uint8_t*)mask.base)[place] ? scores[j] * scaling : -INFINITY;
    } else {
      float number = mask.kind == 2 ? ((const float*)mask.base)[place] : widen(((const bfloat16*)mask.base)[place]);
      scores[j] = std::max(kLowest, scores[j] * scaling + std::max(kLowest, number));
    }
  }
}

// Two vectors of columns: of bfloat16 those at even places and those at odd ones, of float32 one behind the other.
inline Pair load_two(const bfloat16* p) { return load_pair(p); }
inline Pair load_two(const float* p) { return {load(p), load(p + kLanes)}; }

template <typename W>
inline Pair get_pair(const float* p) {
  if constexpr (std::is_same_v<W, bfloat16>) return spread(load(p), load(p + kLanes));
  return {load(p), load(p + kLanes)};
}

template <typename W>
inline void put_pair(float* p, Pair pair) {
  if constexpr (std::is_same_v<W, bfloat16>) join(pair, pair.even, pair.odd);
  store(p, pair.even), store(p + kLanes, pair.odd);
}

// sums[0:I, two vectors] += p[0:I, 0:count] times `count` rows of latents. Fetches the same columns of the rows `ahead`,
// which come next: their way from memory takes as long as this.
template <int I, typename W>
inline void add_latents(const float* p, int64_t count, const W* latent, int64_t row, const W* ahead, float* sums,
                        int64_t sums_row) {
  Pair acc[I];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) acc[i] = get_pair<W>(sums + i * sums_row);
  for (int64_t j = 0; j < count; ++j) {
    for (size_t line = 0; line < kTile * sizeof(W); line += 64)
      __builtin_prefetch((const char*)(ahead + j * row) + line, 0, 2);
    Pair columns = load_two(latent + j * row);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      Vec factor = broadcast(p[i * kBlock + j]);
      acc[i].even += factor * columns.even;
      acc[i].odd += factor * columns.odd;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) put_pair<W>(sums + i * sums_row, acc[i]);
}

#if defined(__AVX512BF16__)
// The same by products of pairs: two tokens at a time, their columns interleaved in registers.
template <int I>
inline void add_latents(const bfloat16* p, int64_t count, const bfloat16* latent, int64_t row, const bfloat16* ahead,
                        float* sums, int64_t sums_row) {
  // where columns are after unpacking: of each eight, the first four in one vector and the last four in the other
  const __m512i first_four = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i last_four = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  __m512 acc[I][2];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
    __m512 one = (__m512)load(sums + i * sums_row), two = (__m512)load(sums + i * sums_row + kLanes);
    acc[i][0] = _mm512_permutex2var_ps(one, first_four, two), acc[i][1] = _mm512_permutex2var_ps(one, last_four, two);
  }
  for (int64_t j = 0; j < count; j += 2) {
    const bfloat16* left = latent + j * row;
    const bfloat16* right = j + 1 < count ? left + row : left;  // then its weight is 0
    __builtin_prefetch(ahead + j * row, 0, 2);
    __builtin_prefetch(ahead + (j + 1) * row, 0, 2);
    __m512i one = _mm512_loadu_si512(left), two = _mm512_loadu_si512(right);
    __m512bh first = (__m512bh)_mm512_unpacklo_epi16(one, two), last = (__m512bh)_mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      int32_t pair;
      std::memcpy(&pair, p + i * kBlock + j, sizeof pair);
      __m512bh factors = (__m512bh)_mm512_set1_epi32(pair);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], first, factors);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], last, factors);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
    store(sums + i * sums_row, (Vec)_mm512_permutex2var_ps(acc[i][0], low, acc[i][1]));
    store(sums + i * sums_row + kLanes, (Vec)_mm512_permutex2var_ps(acc[i][0], high, acc[i][1]));
  }
}
#endif

template <int I, typename... Rest>
inline void add_latents_of(int64_t rows, Rest... rest) {
  if constexpr (I > 0) {
    if (rows == I) return add_latents<I>(rest...);
    add_latents_of<I - 1>(rows, rest...);
  }
}

// Adds a block's latents, weighed by p (M, kBlock), to sums (M, C).
template <typename P, typename W>
void add_block(const P* p, int64_t M, int64_t C, const W* latent, int64_t row, int64_t count, const W* ahead, float* sums) {
  for (int64_t m = 0; m < M; m += kHeadRows) {
    int64_t rows = std::min<int64_t>(kHeadRows, M - m), c = 0;
    for (; c + kTile <= C; c += kTile)
      add_latents_of<kHeadRows>(rows, p + m * kBlock, count, latent + c, row, m ? latent + c : ahead + c, sums + m * C + c, C);
    for (; c < C; ++c)
      for (int64_t i = m; i < m + rows; ++i)
        for (int64_t j = 0; j < count; ++j) sums[i * C + c] += widen(p[i * kBlock + j]) * widen(latent[j * row + c]);
  }
}

// The weights e^(score - largest) of a row of scores, in the type of rows, with zeros up to a whole vector behind them.
// Returns their sum; `largest` and the sums so far follow.
template <typename P>
inline float weigh(float* scores, int64_t count, P* weights, float& largest, float& total, float* sums, int64_t C) {
  int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + whole, -INFINITY);
  Vec most_of = broadcast(largest);
  for (int64_t j = 0; j < whole; j += kLanes) {
    Vec v = load(scores + j);
    most_of = most_of < v ? v : most_of;
  }
  float most = most_of[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, most_of[i]);
  if (most > largest) {
    float factor = largest == -INFINITY ? 0.0f : std::exp(largest - most);
    total *= factor;
    for (int64_t c = 0; c < C; ++c) sums[c] *= factor;
    largest = most;
  }
  if (most == -INFINITY) most = 0;  // nothing seen so far: all weights are 0
  Vec added = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(weights + j, exponential_or_zero(load(scores + j) - most));
    added += load(weights + j);
  }
  return sum_of(added);
}

struct Heads {
  const void* kv_b;  // (H, N + V, C)
  int64_t B, L, H, N, R, C, V;
};

// One call of `attend`: where its parts lie, and its four steps, which threads share.
template <typename W>
struct Attention {
  using X = RowOf<W>;
  const Heads& p;
  const Cache& cache;
  const Mask& mask;
  float scaling;
  const W* kv_b;
  int64_t T, M, splits, width, per_head;
  X* latent_query;                         // (T, H, C + R)
  float *plain, *parts, *states, *context;  // (T, H, N); of each split (M, C) and (M, 2); (T, H, C)

  Attention(const Heads& p, const Cache& cache, const Mask& mask, float scaling)
      : p(p), cache(cache), mask(mask), scaling(scaling), kv_b((const W*)p.kv_b), T(p.B * p.L), M(p.L * p.H),
        splits((cache.S + kSplit - 1) / kSplit), width(p.C + p.R), per_head(p.N + p.V) {
    Pieces pieces;
    size_t q_place = pieces.add<X>(T * p.H * width), n_place = pieces.add<float>(T * p.H * p.N);
    size_t part_place = pieces.add<float>(p.B * splits * M * p.C), state_place = pieces.add<float>(p.B * splits * M * 2);
    size_t context_place = pieces.add<float>(T * p.H * p.C);
    char* memory = scratch(pieces.size);
    latent_query = (X*)(memory + q_place);
    plain = (float*)(memory + n_place), parts = (float*)(memory + part_place);
    states = (float*)(memory + state_place), context = (float*)(memory + context_place);
  }

  void widen_queries(const W* query) {
    for (int64_t i = 0; i < T * p.H; ++i) {
      const W* row = query + i * (p.N + p.R);
      for (int64_t n = 0; n < p.N; ++n) plain[i * p.N + n] = widen(row[n]);
      for (int64_t r = 0; r < p.R; ++r) put(latent_query + i * width + p.C + r, widen(row[p.N + r]));
    }
  }

  // Queries as they meet latents.
  void absorb_keys() {
    int64_t columns = (p.C + kWide * kLanes - 1) / (kWide * kLanes);
    share(p.H * columns, 1, [&](int64_t index, int64_t) {
      int64_t h = index / columns, c = index % columns * kWide * kLanes;
      for (int64_t t = 0; t < T; ++t)
        combine_columns(plain + (t * p.H + h) * p.N, p.N, kv_b + h * per_head * p.C + c, p.C,
                        std::min<int64_t>(kWide * kLanes, p.C - c), latent_query + (t * p.H + h) * width + c);
    });
  }

  // Rows of queries as they meet latents and keys.
  const Met<X, W>* meet_queries(const X* rows) {
    if constexpr (std::is_same_v<Met<X, W>, X>) {
      return rows;
    } else {
      int64_t turned_at = met_size<Met<X, W>>(p.C), size = turned_at + met_size<Met<X, W>>(p.R);
      thread_local std::vector<Met<X, W>> met;
      met.resize(M * size);
      for (int64_t m = 0; m < M; ++m) {
        spread_row(rows + m * width, p.C, met.data() + m * size);
        spread_row(rows + m * width + p.C, p.R, met.data() + m * size + turned_at);
      }
      return met.data();
    }
  }

  // Of a run of cached tokens: latents weighed by e^(score - largest), added up, and the largest score and the sum of weights.
  void read_split(int64_t b, int64_t split) {
    int64_t from = split * kSplit, to = std::min(cache.S, from + kSplit), index = b * splits + split;
    const W* latent = (const W*)cache.latent + b * cache.latent_sequence;
    const W* key = (const W*)cache.key + b * cache.key_sequence;
    float *sums = parts + index * M * p.C, *state = states + index * M * 2;
    std::fill(sums, sums + M * p.C, 0.0f);
    for (int64_t m = 0; m < M; ++m) state[2 * m] = -INFINITY, state[2 * m + 1] = 0;
    thread_local std::vector<float> scores;
    thread_local std::vector<X> weights;
    scores.resize(M * kBlock), weights.resize(M * kBlock);
    const Met<X, W>* queries = meet_queries(latent_query + b * M * width);
    for (int64_t s = from; s < to; s += kBlock) {
      int64_t count = std::min(kBlock, to - s);
      score_block(queries, M, p.C, p.R, latent + s * cache.latent_row, cache.latent_row,
                  key + s * cache.key_row, cache.key_row, count, scores.data());
      for (int64_t m = 0; m < M; ++m) {
        float* row = scores.data() + m * kBlock;
        int64_t offset = b * mask.sequence + m % p.H * mask.head + m / p.H * mask.token + s * mask.cached;
        mask_scores(row, count, scaling, mask, offset);
        float sum = weigh(row, count, weights.data() + m * kBlock, state[2 * m], state[2 * m + 1], sums + m * p.C, p.C);
        state[2 * m + 1] += sum;
      }
      const W *here = latent + s * cache.latent_row, *ahead = s + 2 * kBlock <= cache.S ? here + kBlock * cache.latent_row : here;
      add_block(weights.data(), M, p.C, here, cache.latent_row, count, ahead, sums);
    }
  }

  // The weighted mean of all latents from those of the runs.
  void join_splits(int64_t row) {
    int64_t b = row / M, m = row % M;
    float most = -INFINITY, total = 0, *to = context + row * p.C;
    for (int64_t i = 0; i < splits; ++i) most = std::max(most, states[((b * splits + i) * M + m) * 2]);
    std::fill(to, to + p.C, 0.0f);
    for (int64_t i = 0; i < splits; ++i) {
      const float *state = states + ((b * splits + i) * M + m) * 2, *sums = parts + ((b * splits + i) * M + m) * p.C;
      float factor = state[0] == -INFINITY ? 0.0f : std::exp(state[0] - most);
      total += factor * state[1];
      for (int64_t c = 0; c < p.C; ++c) to[c] += factor * sums[c];
    }
    float scale = total > 0 ? 1 / total : 0;  // a query that sees nothing has output 0
    for (int64_t c = 0; c < p.C; ++c) to[c] *= scale;
  }

  void expand_values(W* y) {
    int64_t step = std::min<int64_t>(p.V, 32), runs = (p.V + step - 1) / step;
    share(p.H * runs, 1, [&](int64_t index, int64_t) {
      int64_t h = index / runs, v = index % runs * step;
      RowList<float> mine(context + h * p.C, p.H * p.C, T);
      dots(mine.rows, T, kv_b + (h * per_head + p.N) * p.C, p.C, v, std::min(p.V, v + step), p.C,
           [&](int64_t t, int64_t n, float sum) { put(y + (t * p.H + h) * p.V + n, sum); });
    });
  }
};

// y (B, L, H, V) of query (B, L, H, N + R) over the cache.
template <typename W>
void attend(const W* query, const Heads& p, const Cache& cache, const Mask& mask, float scaling, W* y, int threads) {
  Attention<W> all(p, cache, mask, scaling);
  all.widen_queries(query);
  double operations = 2.0 * all.T * p.H * (p.C * all.per_head + (double)cache.S * (p.C + all.width));
  threads = threads_for(operations, threads);
#pragma omp parallel num_threads(threads)
  {
    all.absorb_keys();
    share(p.B * all.splits, 1, [&](int64_t index, int64_t) { all.read_split(index / all.splits, index % all.splits); });
    share(p.B * all.M, 1, [&](int64_t row, int64_t) { all.join_splits(row); });
    all.expand_values(y);
  }
}

}  // namespace
