// Products of a few rows with whole weights, the norm of rows, and what the files beside this one share.
//
// So few rows cost what reading the weights from memory takes, so each is read once, in long runs that the processor
// foresees, and a call is one parallel region. Rows are bfloat16 where the processor multiplies it itself and the weights
// are, float32 otherwise, spread to meet bfloat16 as pairs; sums and everything between two products are float32.
//
// Letters: T rows, A what goes into a product, B what comes out.

#pragma once

#include <cmath>

#include "tasks.h"
#include "tiles.h"

namespace {

constexpr int kRowsAtOnce = 4;  // rows that share one pass over a weight
constexpr int kMostRows = 8;
constexpr int64_t kTaskRows = 64;  // rows of a weight in one task, at most
constexpr int kAhead = 4096;       // bytes that are fetched ahead: the processor's own foresight ends with a page

#if defined(__AVX512BF16__)
template <typename W>
using RowOf = W;
#else
template <typename W>
using RowOf = float;
#endif

template <typename W>
constexpr bool kInPairs = std::is_same_v<RowOf<W>, bfloat16>;  // how outer products take numbers beside W

inline void spread_row(const float* x, int64_t count, Spread* to) {
  constexpr int64_t kPair = 2 * kLanes;
  for (int64_t i = 0; i < count; i += kPair) {
    float padded[kPair] = {};
    const float* from = x + i;
    if (i + kPair > count) from = std::copy(from, x + count, padded) - (count - i);
    Pair pair = spread(load(from), load(from + kLanes));
    store(&to[i].number, pair.even), store(&to[i].number + kLanes, pair.odd);
  }
}

// Memory of the calling thread, kept between calls: new pages cost more than what is computed in them.
inline char* scratch(size_t bytes) {
  thread_local std::vector<char> memory;
  if (memory.size() < bytes + 64) memory.resize(bytes + 64 + bytes / 4);
  return (char*)(((uintptr_t)memory.data() + 63) / 64 * 64);
}

struct Pieces {  // cuts one run of scratch memory
  size_t size = 0;
  template <typename T>
  size_t add(int64_t count) {
    size_t start = size;
    size += (count * sizeof(T) + 63) / 64 * 64;
    return start;
  }
};

// Inside a parallel region: hands out `count` things in steps, and waits until all are done.
template <typename F>
inline void share(int64_t count, int64_t step, F run) {
  int64_t tasks = (count + step - 1) / step;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < tasks; ++i) run(i * step, std::min(count, (i + 1) * step));
}

inline int64_t step_for(int64_t rows, int threads) {
  int64_t each = (rows / (threads * 8) + kDotColumns - 1) / kDotColumns * kDotColumns;
  return std::max<int64_t>(kDotColumns, std::min(kTaskRows, each));
}

// The dot products of M rows with four rows of a weight, the weight's one after the other as they lie in memory.
template <int M, typename X, typename W>
inline void four_dots(const X* const* x, const W* const* w, int64_t depth, Four* sums) {
  constexpr int U = M == 1 ? 4 : 2;
  using D = Dot<X, W>;
  Vec total[M][kDotColumns];
#pragma GCC unroll 4
  for (int n = 0; n < kDotColumns; ++n) {
    Vec acc[M][U] = {};
    const W* row = w[n];
    int64_t i = 0;
    for (; i + U * D::kWidth <= depth; i += U * D::kWidth) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        __builtin_prefetch((const char*)(row + i + u * D::kWidth) + kAhead, 0, 2);
        auto column = D::get(row + i + u * D::kWidth);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) D::add(acc[m][u], D::get(x[m] + i + u * D::kWidth), column);
      }
    }
    for (; i + D::kWidth <= depth; i += D::kWidth) {
      auto column = D::get(row + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) D::add(acc[m][0], D::get(x[m] + i), column);
    }
    if (i < depth) {
      auto column = D::get_some(row + i, depth - i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) D::add(acc[m][0], D::get_some(x[m] + i, depth - i), column);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      total[m][n] = acc[m][0];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) total[m][n] += acc[m][u];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sums[m] = sum_lanes(total[m][0], total[m][1], total[m][2], total[m][3]);
}

// emit(t, n, x[t] . w[n]) for rows `first` to `last` of a weight.
template <typename X, typename W, typename F>
__attribute__((noinline)) void dots(const X* const* x, int64_t rows, const W* w, int64_t w_row, int64_t first, int64_t last,
                                    int64_t depth, F emit) {
  if constexpr (!std::is_same_v<Met<X, W>, X>) {
    int64_t size = met_size<Met<X, W>>(depth);
    thread_local std::vector<Met<X, W>> memory;
    memory.resize(std::max<size_t>(memory.size(), rows * size));
    const Met<X, W>* met[kMostRows];
    for (int64_t t = 0; t < rows; ++t) spread_row(x[t], depth, memory.data() + t * size), met[t] = memory.data() + t * size;
    return dots(met, rows, w, w_row, first, last, depth, emit);
  }
  for (int64_t n = first; n < last; n += kDotColumns) {
    int64_t columns = std::min<int64_t>(kDotColumns, last - n);
    const W* matrix[kDotColumns];
    for (int64_t i = 0; i < kDotColumns; ++i) matrix[i] = w + (n + std::min(i, columns - 1)) * w_row;
    for (int64_t t = 0; t < rows; t += kRowsAtOnce) {
      Four sums[kRowsAtOnce];
      switch (std::min<int64_t>(kRowsAtOnce, rows - t)) {
        case 1: four_dots<1>(x + t, matrix, depth, sums); break;
        case 2: four_dots<2>(x + t, matrix, depth, sums); break;
        case 3: four_dots<3>(x + t, matrix, depth, sums); break;
        default: four_dots<4>(x + t, matrix, depth, sums);
      }
      int64_t end = std::min<int64_t>(kRowsAtOnce, rows - t);
      for (int64_t m = 0; m < end; ++m)
        for (int64_t i = 0; i < columns; ++i) emit(t + m, n + i, sums[m][i]);
    }
  }
}

// Rows in the type that products take, in `to` where that is another than they have.
template <typename X, typename W>
inline const X* as_rows(const W* x, int64_t count, X* to) {
  if constexpr (std::is_same_v<X, W>) {
    return x;
  } else {
    for (int64_t i = 0; i < count; ++i) put(to + i, widen(x[i]));
    return to;
  }
}

template <typename X>
struct RowList {
  const X* rows[kMostRows];
  RowList(const X* base, int64_t row, int64_t count) {
    for (int64_t t = 0; t < count; ++t) rows[t] = base + t * row;
  }
};

// y = x / sqrt(mean(x^2) + eps) * weight; x and y may be the same.
template <typename X, typename W, typename Y>
inline void normalise(const X* x, const W* weight, int64_t count, float eps, Y* y) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec v = load(x + i);
    squares += v * v;
  }
  if (i < count) {
    Vec v = load_some(x + i, count - i);
    squares += v * v;
  }
  Vec factor = broadcast(1.0f / std::sqrt(sum_of(squares) / count + eps));
  for (i = 0; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) * factor * load(weight + i));
  if (i < count) store_some(y + i, load_some(x + i, count - i) * factor * load_some(weight + i, count - i), count - i);
}

// y (T, B) = x (T, A) w (B, A)^T, and plus (T, B) unless that is null.
template <typename W, typename Y>
void linear(const W* x, int64_t T, int64_t A, const W* w, int64_t B, Y* y, int threads, const Y* plus = nullptr) {
  using X = RowOf<W>;
  RowList<X> rows(as_rows(x, T * A, (X*)scratch(T * A * sizeof(X))), A, T);
  threads = threads_for(2.0 * T * A * B, threads);
#pragma omp parallel num_threads(threads)
  share(B, step_for(B, threads), [&](int64_t first, int64_t last) {
    dots(rows.rows, T, w, A, first, last, A, [&](int64_t t, int64_t n, float sum) {
      put(y + t * B + n, plus ? widen(plus[t * B + n]) + sum : sum);
    });
  });
}

}  // namespace
