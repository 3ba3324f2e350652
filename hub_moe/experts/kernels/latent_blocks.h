// What attention does with one block of cached tokens: scores, their weights, and latents added up by those.
//
// Letters: M rows of queries, C latent, R rotary part.

#pragma once

#include "few_rows.h"

namespace {

constexpr int64_t kBlock = 64;                   // cached tokens of a block, which stays in the cache
constexpr int kHeadRows = kLanes == 16 ? 8 : 4;  // rows of queries in one tile of sums of latents

struct Mask {  // kind 0: none; 1: bytes, 1 for what is seen; 2: float32 and 3: bfloat16 numbers to add
  const void* base;
  int kind;
  int64_t sequence, head, token, cached;  // elements from one to the next; 0 where all share one
};

// Fetches the next block of cached tokens while one is computed, row by row: its way from memory takes as long as that.
struct Ahead {
  const char *latent, *key;
  int64_t latent_bytes, latent_row, key_bytes, key_row;  // bytes of a row, and from one to the next
  int64_t rows, parts;                                   // of the block, and of the work on the one before it
  int64_t row = 0, part = 0;

  void follow() {  // before each part of the work
    for (++part; row < rows && row * parts < part * rows; ++row) {
      for (int64_t i = 0; i < latent_bytes; i += 64) __builtin_prefetch(latent + row * latent_row + i, 0, 2);
      for (int64_t i = 0; i < key_bytes; i += 64) __builtin_prefetch(key + row * key_row + i, 0, 2);
    }
  }
};

template <typename X>
inline int64_t score_step(int64_t M) {  // rows of queries of one tile of scores
  constexpr int kRows = std::is_same_v<X, Spread> ? kPairRows : kDotRows;
  return M % kRows == 0 || M < kRows ? kRows : std::min<int64_t>(kRows, 4);
}

// scores (M, kBlock) of `count` cached tokens: rows of `query` are C numbers as they meet latents, then R as they meet keys.
template <typename X, typename W>
void score_block(const X* query, int64_t M, Stretch<W> latent, Stretch<W> key, int64_t count, float* scores, Ahead& ahead) {
  constexpr int kRows = kDotRows > kPairRows ? kDotRows : kPairRows;
  Fetch none;
  int64_t step = score_step<X>(M), width = met_size<X>(latent.depth) + met_size<X>(key.depth);
  auto of = [](Stretch<W> all, int64_t token, int64_t row) { return Stretch<W>{all.at + token * all.row, row, all.depth}; };
  for (int64_t j = 0; j < count; j += kDotColumns) {
    bool is_short = j + kDotColumns > count;
    for (int64_t m = 0; m < M; m += step) {
      int64_t rows = std::min(step, M - m);
      const X* mine[kRows];
      for (int64_t i = 0; i < rows; ++i) mine[i] = query + (m + i) * width;
      ahead.follow();
      if (!is_short) {
        float* to = scores + m * kBlock + j;
        dot_tile_of<kRows>(rows, mine, to, kBlock, false, none, of(latent, j, latent.row), of(key, j, key.row));
      } else {
        for (int64_t k = j; k < count; ++k) {
          float sums[kRows * kDotColumns];
          dot_tile_of<kRows>(rows, mine, sums, kDotColumns, false, none, of(latent, k, 0), of(key, k, 0));
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

// sums[0:I, two vectors] += p[0:I, 0:count] times `count` rows of latents.
template <int I, typename W>
inline void add_latents(const float* p, int64_t count, const W* latent, int64_t row, float* sums, int64_t sums_row) {
  Pair acc[I];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) acc[i] = get_pair<W>(sums + i * sums_row);
  for (int64_t j = 0; j < count; ++j) {
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
inline void add_latents(const bfloat16* p, int64_t count, const bfloat16* latent, int64_t row, float* sums,
                        int64_t sums_row) {
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
void add_block(const P* p, int64_t M, Stretch<W> latent, int64_t count, float* sums, Ahead& ahead) {
  int64_t C = latent.depth;
  for (int64_t m = 0; m < M; m += kHeadRows) {
    int64_t rows = std::min<int64_t>(kHeadRows, M - m), c = 0;
    for (; c + kTile <= C; c += kTile) {
      ahead.follow();
      add_latents_of<kHeadRows>(rows, p + m * kBlock, count, latent.at + c, latent.row, sums + m * C + c, C);
    }
    for (; c < C; ++c)
      for (int64_t i = m; i < m + rows; ++i)
        for (int64_t j = 0; j < count; ++j)
          sums[i * C + c] += widen(p[i * kBlock + j]) * widen(latent.at[j * latent.row + c]);
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

}  // namespace
