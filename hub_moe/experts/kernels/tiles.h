// Tiles of products whose sums stay in registers: of dot products, and of outer products.
//
// Where the processor multiplies pairs of bfloat16 itself, dot products take two of them as they are; sums are float32.

#pragma once

#include "vectors.h"

namespace {

constexpr int kDotRows = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 4;
constexpr int kOuterRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 8;
constexpr int kPairRows = kLanes == 16 ? 4 : 2;  // of rows that come in pairs
constexpr int kDotColumns = 4;     // matrix rows whose sums one tile of dot products keeps in registers
constexpr int kTile = 2 * kLanes;  // columns of a tile of outer products in gradients

// How many elements one step of a dot product takes, and how it adds them to the sums.
template <typename X, typename W>
struct Dot {
  static constexpr int kWidth = kLanes;
  template <typename T>
  static Vec get(const T* p) { return load(p); }
  template <typename T>
  static Vec get_some(const T* p, int64_t count) { return load_some(p, count); }
  static void add(Vec& sum, Vec a, Vec b) { sum += a * b; }
};

// Rows that meet a weight's rows in dot products as pairs: every 2 * kLanes of their float32 as `spread`, zeros behind them.
struct Spread {
  float number;
};

template <>
struct Dot<Spread, bfloat16> {
  static constexpr int kWidth = 2 * kLanes;
  static Pair get(const bfloat16* p) { return load_pair(p); }
  static Pair get(const Spread* p) { return {load(&p->number), load(&p->number + kLanes)}; }
  static Pair get_some(const bfloat16* p, int64_t count) {
    bfloat16 padded[kWidth] = {};
    std::copy(p, p + count, padded);
    return load_pair(padded);
  }
  static Pair get_some(const Spread* p, int64_t) { return get(p); }
  static void add(Vec& sum, Pair a, Pair b) { sum += a.even * b.even, sum += a.odd * b.odd; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bfloat16, bfloat16> {
  static constexpr int kWidth = 2 * kLanes;
  static __m512bh get(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh get_some(const bfloat16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << count) - 1), p);
  }
  static void add(Vec& sum, __m512bh a, __m512bh b) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// How rows of X meet those of W in dot products, and how many numbers of it `count` take.
template <typename X, typename W>
using Met = std::conditional_t<std::is_same_v<X, float> && std::is_same_v<W, bfloat16>, Spread, X>;

template <typename M>
inline int64_t met_size(int64_t count) {
  constexpr int64_t kPair = 2 * kLanes;
  return std::is_same_v<M, Spread> ? (count + kPair - 1) / kPair * kPair : count;
}

// A block of rows that is fetched while another is computed, in as many steps as that takes: asked for many lines at once,
// the processor would wait for them.
class Fetch {
 public:
  Fetch() = default;
  template <typename W>
  Fetch(const W* at, int64_t row, int64_t width, int64_t rows, int64_t steps)
      : at((const char*)at), row(row * sizeof(W)), width(width * sizeof(W)), rows(rows) {
    int64_t lines = rows * ((this->width + 63) / 64);
    each = (lines + steps - 1) / steps;
  }

  bool goes_on() const { return each; }

  void step() {
    for (int64_t i = 0; i < each; ++i) {
      __builtin_prefetch(at + line, 0, 2);
      if ((line += 64) < width) continue;
      line = 0, at += row;
      if (--rows == 0) each = 0;
    }
  }

 private:
  const char* at = nullptr;
  int64_t row = 0, width = 0, rows = 0, each = 0, line = 0;  // bytes of a row, rows left, lines of each step, next byte
};

template <typename X>
inline int64_t dot_steps(int64_t depth) {
  return (depth + Dot<X, X>::kWidth - 1) / Dot<X, X>::kWidth;
}

// A stretch of each row of a matrix, `depth` elements from `at` on.
template <typename W>
struct Stretch {
  const W* at;
  int64_t row, depth;
};

// sums[m, 0:4] += x[m] . w[0:4]. For few rows a matrix comes from memory at the speed of that, so `Ahead` asks for the next
// four of its rows while these are multiplied.
template <int M, bool Ahead, typename X, typename W>
inline __attribute__((always_inline)) void add_dots(const X* const* x, int64_t from, Stretch<W> w,
                                                    Vec (&sums)[M][kDotColumns], Fetch& fetch) {
  using D = Dot<X, W>;
  auto step = [&](int64_t i, auto get) {
    if constexpr (std::is_same_v<X, Spread>) {  // four columns of pairs do not stay in registers
      Pair rows[M];
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) rows[m] = get(x[m] + from + i);
#pragma GCC unroll 4
      for (int n = 0; n < kDotColumns; ++n) {
        Pair column = get(w.at + n * w.row + i);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) D::add(sums[m][n], rows[m], column);
      }
      return;
    }
    decltype(get(w.at)) columns[kDotColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) {
      columns[n] = get(w.at + n * w.row + i);
      if (Ahead) __builtin_prefetch(w.at + (n + kDotColumns) * w.row + i, 0, 2);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      auto row = get(x[m] + from + i);
#pragma GCC unroll 4
      for (int n = 0; n < kDotColumns; ++n) D::add(sums[m][n], row, columns[n]);
    }
  };
  int64_t i = 0;
  for (; fetch.goes_on() && i + D::kWidth <= w.depth; i += D::kWidth) {
    fetch.step();
    step(i, [](auto* p) { return D::get(p); });
  }
  for (; i + D::kWidth <= w.depth; i += D::kWidth) step(i, [](auto* p) { return D::get(p); });
  if (i < w.depth) step(i, [rest = w.depth - i](auto* p) { return D::get_some(p, rest); });
}

// y[m, 0:4] (+)= x[m] . w[0:4] over all stretches of w, one behind the other.
template <int M, bool Ahead, typename X, typename... W>
__attribute__((noinline)) void dot_tile(const X* const* x, float* y, int64_t y_row, bool add, Fetch& fetch,
                                        const Stretch<W>&... w) {
  Vec sums[M][kDotColumns] = {};
  int64_t from = 0;
  ((add_dots<M, Ahead>(x, from, w, sums, fetch), from += met_size<X>(w.depth)), ...);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    Four four = sum_lanes(sums[m][0], sums[m][1], sums[m][2], sums[m][3]), before = {};
    if (add) std::memcpy(&before, y + m * y_row, sizeof before);
    four += before;
    std::memcpy(y + m * y_row, &four, sizeof four);
  }
}

template <int M, bool Ahead = false, typename X, typename... W>
inline void dot_tile_of(int64_t rows, const X* const* x, float* y, int64_t y_row, bool add, Fetch& fetch,
                        const Stretch<W>&... w) {
  if constexpr (M > 0) {
    if (rows == M) return dot_tile<M, Ahead>(x, y, y_row, add, fetch, w...);
    dot_tile_of<M - 1, Ahead>(rows, x, y, y_row, add, fetch, w...);
  }
}

// Outer products take float32 one by one or, where the processor multiplies pairs of bfloat16 itself, two of those that
// follow each other in depth in the place of one.
template <bool InPairs>
inline Vec add_product(Vec sum, Vec left, Vec right) {
#if defined(__AVX512BF16__)
  if constexpr (InPairs) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#endif
  static_assert(!InPairs || kLanes == 16);
  return sum + left * right;
}

#if defined(__AVX512BF16__)
// `count` numbers of a row and of the one behind it, which may be null for zeros, as pairs.
inline Vec pair_up(__m256i first, __m256i second) {
  return (Vec)_mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

inline Vec pair_up(const bfloat16* first, const bfloat16* second, int64_t count) {
  __mmask16 some = (__mmask16)((1u << count) - 1);
  auto get = [some](const bfloat16* p) { return p ? _mm256_maskz_loadu_epi16(some, p) : _mm256_setzero_si256(); };
  return pair_up(get(first), get(second));
}

inline Vec pair_up(const float* first, const float* second, int64_t count) {
  __mmask16 some = (__mmask16)((1u << count) - 1);
  auto get = [some](const float* p) {
    return p ? (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, p)) : _mm256_setzero_si256();
  };
  return pair_up(get(first), get(second));
}
#else
template <typename T>
Vec pair_up(const T* first, const T* second, int64_t count);  // nobody calls it
#endif

// sums[i, 0:V] over `depth`: get_left(r) gives the numbers of all i, get_right(r) points to V vectors of columns.
template <int I, bool InPairs, int R, int V, typename Left, typename Right>
inline void outer_tile(Vec (&sums)[R][V], int64_t depth, Left get_left, Right get_right, Fetch& fetch) {
  Vec acc[I][V];
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v] = sums[i][v];
  auto add = [&](int64_t r) __attribute__((always_inline)) {
    const float* right = get_right(r);
    auto numbers = get_left(r);
    Vec columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = load(right + v * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      Vec left = broadcast(numbers(i));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] = add_product<InPairs>(acc[i][v], left, columns[v]);
    }
  };
  int64_t r = 0;
  for (; fetch.goes_on() && r < depth; ++r) fetch.step(), add(r);
  for (; r < depth; ++r) add(r);
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[i][v] = acc[i][v];
}

template <int I, bool InPairs, int R, int V, typename... Rest>
inline void outer_tile_of(int64_t rows, Vec (&sums)[R][V], Rest&&... rest) {
  if constexpr (I > 0) {
    if (rows == I) return outer_tile<I, InPairs>(sums, rest...);
    outer_tile_of<I - 1, InPairs>(rows, sums, rest...);
  }
}

}  // namespace
