// Products of rows sorted by expert with their experts' matrices.
//
// Letters: S rows, E experts, A what goes into a product, B what comes out.

#pragma once

#include "few_rows.h"

namespace {

template <typename X>
constexpr int kDotDepth = sizeof(X) == 2 ? 2048 : 704;  // how much of kDotColumns matrix rows stays in the cache
constexpr int kPanelRows = 6, kPanelVectors = kLanes == 16 ? 4 : 2, kPanelTile = kPanelVectors * kLanes;
constexpr int kPanelColumns = 128, kPanelDepth = 16384 / kPanelColumns;  // 64 KiB
constexpr int kTaskColumns = 32, kExpertsPerThread = 8;

// Matrices whose rows are outputs: y = x w^T, by dot products of contiguous rows.
template <typename X, typename W>
void multiply_by_rows(Rows<X> x, const W* w, int64_t w_expert, int64_t w_row, const int64_t* ends, int64_t experts,
                      int64_t A, int64_t B, float* y, int threads) {
  auto tasks = make_tasks(ends, experts, B, kTaskColumns, false);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    int64_t start = task.expert ? ends[task.expert - 1] : 0, end = ends[task.expert];
    const W* matrix = w + task.expert * w_expert;
    if (end - start <= kRowsAtOnce) {  // reading the matrix is what takes time, so it is read in long runs
      const X* few[kRowsAtOnce];
      for (int64_t s = start; s < end; ++s) few[s - start] = x[s];
      return dots(few, end - start, matrix, w_row, task.column, std::min(B, task.column + kTaskColumns), A,
                  [&](int64_t m, int64_t n, float sum) { y[(start + m) * B + n] = sum; });
    }
    int64_t last = std::min(B, task.column + kTaskColumns), whole = last - (last - task.column) % kDotColumns;
    for (int64_t n = task.column; n < last; n += kDotColumns) {
      // too few columns for a tile: their last ones are computed again, or, in a tiny matrix, one is repeated
      bool is_short = n >= whole;
      int64_t from = is_short ? std::max<int64_t>(0, last - kDotColumns) : n;
      bool is_tiny = B < kDotColumns;
      for (int64_t k = 0; k < A; k += kDotDepth<X>) {
        int64_t depth = std::min<int64_t>(kDotDepth<X>, A - k), parts = (end - start + kDotRows - 1) / kDotRows;
        // The same few matrix rows meet all rows of the expert: they are widened once, not once for every tile, and
        // laid side by side, as rows a power of two apart would take each other's place in the cache.
        alignas(64) X near[kDotColumns * kDotDepth<X>];
        bool is_near = !is_short && parts > 1;
        for (int c = 0; is_near && c < kDotColumns; ++c) {
          const W* row = matrix + (n + c) * w_row + k;
          if constexpr (std::is_same<X, W>::value)
            std::copy(row, row + depth, near + c * kDotDepth<X>);
          else
            each_vector(depth, [&](int64_t i, auto some) { put(near + c * kDotDepth<X> + i, get(row + i, some), some); });
        }
        const W* next = k + kDotDepth<X> < A ? matrix + n * w_row + k + kDotDepth<X> : matrix + (n + kDotColumns) * w_row;
        Fetch fetch, none;
        if (parts > 2) fetch = Fetch(next, w_row, depth, kDotColumns, parts * dot_steps<X>(depth));
        for (int64_t s = start; s < end; s += kDotRows) {
          int64_t count = std::min<int64_t>(kDotRows, end - s);
          const X* rows[kDotRows];
          float sums[kDotRows * kDotColumns];
          for (int64_t m = 0; m < count; ++m) rows[m] = x[s + m] + k;
          if (is_near) {
            dot_tile_of<kDotRows>(count, rows, y + s * B + n, B, k > 0, fetch, Stretch<X>{near, kDotDepth<X>, depth});
          } else if (!is_short) {
            Stretch<W> far{matrix + n * w_row + k, w_row, depth};
            dot_tile_of<kDotRows, true>(count, rows, y + s * B + n, B, k > 0, none, far);
          } else if (!is_tiny) {
            Stretch<W> far{matrix + from * w_row + k, w_row, depth};
            dot_tile_of<kDotRows>(count, rows, sums, kDotColumns, false, none, far);
            for (int64_t m = 0; m < count; ++m)
              for (int64_t c = n; c < last; ++c) {
                float& place = y[(s + m) * B + c];
                place = (k ? place : 0) + sums[m * kDotColumns + c - from];
              }
          } else {
            for (int64_t c = n; c < last; ++c) {
              Stretch<W> far{matrix + c * w_row + k, 0, depth};
              dot_tile_of<kDotRows>(count, rows, sums, kDotColumns, false, none, far);
              for (int64_t m = 0; m < count; ++m) {
                float& place = y[(s + m) * B + c];
                place = (k ? place : 0) + sums[m * kDotColumns];
              }
            }
          }
        }
      }
    }
  });
}

// A panel: of `columns` of `rows` rows of w, those of one tile behind those of another, widened or in pairs.
template <typename W>
void pack_panel(const W* w, int64_t w_row, int64_t rows, int64_t columns, float* panel) {
  constexpr int64_t kStep = kInPairs<W> ? 2 : 1;
  for (int64_t r = 0; r < rows; r += kStep, w += kStep * w_row, panel += kPanelTile) {
    auto pack = [&](int64_t c, int64_t count, float* to) {
      if constexpr (kInPairs<W>)
        store(to, pair_up(w + c, r + 1 < rows ? w + w_row + c : nullptr, count));
      else
        store(to, get(w + c, count));
    };
    float* to = panel;
    int64_t c = 0;
    for (; c + kPanelTile <= columns; c += kPanelTile, to += kPanelDepth * kPanelTile)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) pack(c + v * kLanes, kLanes, to + v * kLanes);
    for (; c < columns; c += kLanes, to += kLanes) pack(c, std::min<int64_t>(kLanes, columns - c), to);
  }
}

// y[m, 0:width] (+)= rows[m] times a tile of a panel.
template <bool InPairs>
inline __attribute__((always_inline)) void multiply_tile(const float* const* rows, int64_t count, const float* tile,
                                                         int64_t depth, int64_t width, bool add, float* y, int64_t y_row,
                                                         Fetch& fetch) {
  auto get_left = [&](int64_t r) { return [rows, r](int i) { return rows[i][r]; }; };
  auto get_right = [&](int64_t r) { return tile + r * kPanelTile; };
  Vec sums[kPanelRows][kPanelVectors] = {};
  auto each = [&](auto is_whole, auto run) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int m = 0; m < kPanelRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v)
        if (is_whole || (m < count && v * kLanes < width))
          run(y + m * y_row + v * kLanes, sums[m][v], is_whole ? kLanes : std::min<int64_t>(kLanes, width - v * kLanes));
  };
  auto read = [](const float* from, Vec& sum, int64_t lanes) { sum = get(from, lanes); };
  auto write = [](float* to, Vec& sum, int64_t lanes) { put(to, sum, lanes); };
  if (count == kPanelRows && width == kPanelTile) {  // all in registers
    if (add) each(std::true_type(), read);
    outer_tile<kPanelRows, InPairs>(sums, depth, get_left, get_right, fetch);
    each(std::true_type(), write);
  } else {
    if (add) each(std::false_type(), read);
    outer_tile_of<kPanelRows, InPairs>(count, sums, depth, get_left, get_right, fetch);
    each(std::false_type(), write);
  }
}

// y[s, 0:columns] = x[start + s] w for `rows` rows, of numbers or pairs: outer products with panels of w, each brought into
// the cache first. Meanwhile the next is fetched: below, or, behind the last one, where there is `more`, beside the first.
template <typename W>
void multiply_panels(Rows<float> x, int64_t start, int64_t rows, const W* w, int64_t w_row, int64_t A, int64_t columns,
                     bool more, float* y, int64_t y_row) {
  constexpr int64_t kEach = kInPairs<W> ? 2 : 1, kPanelHeight = kPanelDepth * kEach;  // rows of w
  alignas(64) float panel[kPanelDepth * kPanelColumns];
  int64_t parts = (rows + kPanelRows - 1) / kPanelRows * ((columns + kPanelTile - 1) / kPanelTile);
  for (int64_t k = 0; k < A; k += kPanelHeight) {
    int64_t height = std::min(kPanelHeight, A - k), depth = (height + kEach - 1) / kEach;
    pack_panel(w + k * w_row, w_row, height, columns, panel);
    bool is_last = k + kPanelHeight >= A;
    const W* next = is_last ? w + kPanelColumns : w + (k + kPanelHeight) * w_row;
    Fetch fetch;
    if (rows > kPanelRows && (more || !is_last))
      fetch = Fetch(next, w_row, columns, std::min(kPanelHeight, A), parts * depth);
    for (int64_t s = 0; s < rows; s += kPanelRows) {
      int64_t count = std::min<int64_t>(kPanelRows, rows - s);
      const float* mine[kPanelRows];
      for (int64_t m = 0; m < count; ++m) mine[m] = x[start + s + m] + k / kEach;
      for (int64_t c = 0; c < columns; c += kPanelTile)
        multiply_tile<kInPairs<W>>(mine, count, panel + c * kPanelDepth, depth, std::min<int64_t>(kPanelTile, columns - c),
                                   k > 0, y + s * y_row + c, y_row, fetch);
    }
  }
}

// Rows `start` to `end` one behind the other, as outer products take them beside W.
template <typename W>
Rows<float> as_outer_rows(Rows<float> x, int64_t& start, int64_t end, int64_t A) {
  if constexpr (kInPairs<W>) {
    int64_t row = (A + 1) / 2, first = std::exchange(start, 0);
    bfloat16* to = (bfloat16*)scratch((end - first) * row * sizeof(float));
    for (int64_t s = first; s < end; ++s, to += 2 * row) {
      each_vector(A, [&](int64_t i, auto count) { put(to + i, get(x[s] + i, count), count); });
      if (A % 2) to[A] = 0;
    }
    return {(const float*)(to - (end - first) * 2 * row), row, nullptr};
  }
  return x;
}

// Matrices whose columns are outputs: y = x w.
template <typename W>
void multiply_by_columns(Rows<float> x, const W* w, int64_t w_expert, int64_t w_row, const int64_t* ends, int64_t experts,
                         int64_t A, int64_t B, float* y, int threads) {
  auto tasks = make_tasks(ends, experts, B, B, false);
  // with enough experts to go round, a thread keeps to one: then what it reads next is known, and fetched ahead
  int64_t step = (int64_t)tasks.size() >= kExpertsPerThread * threads ? B : kPanelColumns;
  if (step < B) tasks = make_tasks(ends, experts, B, step, false);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    int64_t start = task.expert ? ends[task.expert - 1] : 0, end = ends[task.expert], last = std::min(B, task.column + step);
    float* out = y + start * B;
    int64_t rows = end - start;
    Rows<float> mine = as_outer_rows<W>(x, start, end, A);
    for (int64_t column = task.column; column < last; column += kPanelColumns)
      multiply_panels(mine, start, rows, w + task.expert * w_expert + column, w_row, A,
                      std::min<int64_t>(kPanelColumns, B - column), column + kPanelColumns < last, out + column, B);
  });
}

}  // namespace
