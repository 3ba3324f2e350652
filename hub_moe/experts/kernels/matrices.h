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

// A panel: of `columns` of `depth` rows of w, those of one tile behind those of another, widened.
template <typename W>
void pack_panel(const W* w, int64_t w_row, int64_t depth, int64_t columns, float* panel) {
  for (int64_t r = 0; r < depth; ++r, w += w_row) {
    float* to = panel + r * kPanelTile;
    int64_t c = 0;
    for (; c + kPanelTile <= columns; c += kPanelTile, to += kPanelDepth * kPanelTile)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) store(to + v * kLanes, load(w + c + v * kLanes));
    for (; c < columns; c += kLanes, to += kLanes) store(to, get(w + c, std::min<int64_t>(kLanes, columns - c)));
  }
}

// y[m, 0:width] (+)= rows[m] times a tile of a panel.
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
    outer_tile<kPanelRows>(sums, depth, get_left, get_right, fetch);
    each(std::true_type(), write);
  } else {
    if (add) each(std::false_type(), read);
    outer_tile_of<kPanelRows>(count, sums, depth, get_left, get_right, fetch);
    each(std::false_type(), write);
  }
}

// y[s, 0:columns] = x[s] w for the rows from `start` to `end`: outer products with panels of w, each widened into the cache
// first. Meanwhile the next is fetched: below, or, behind the last one, where there is `more`, beside the first.
template <typename W>
void multiply_panels(Rows<float> x, int64_t start, int64_t end, const W* w, int64_t w_row, int64_t A, int64_t columns,
                     bool more, float* y, int64_t y_row) {
  alignas(64) float panel[kPanelDepth * kPanelColumns];
  int64_t parts = (end - start + kPanelRows - 1) / kPanelRows * ((columns + kPanelTile - 1) / kPanelTile);
  for (int64_t k = 0; k < A; k += kPanelDepth) {
    int64_t depth = std::min<int64_t>(kPanelDepth, A - k);
    pack_panel(w + k * w_row, w_row, depth, columns, panel);
    bool is_last = k + kPanelDepth >= A;
    const W* next = is_last ? w + kPanelColumns : w + (k + kPanelDepth) * w_row;
    Fetch fetch;
    if (end - start > kPanelRows && (more || !is_last))
      fetch = Fetch(next, w_row, columns, std::min<int64_t>(kPanelDepth, A), parts * depth);
    for (int64_t s = start; s < end; s += kPanelRows) {
      int64_t count = std::min<int64_t>(kPanelRows, end - s);
      const float* rows[kPanelRows];
      for (int64_t m = 0; m < count; ++m) rows[m] = x[s + m] + k;
      for (int64_t c = 0; c < columns; c += kPanelTile)
        multiply_tile(rows, count, panel + c * kPanelDepth, depth, std::min<int64_t>(kPanelTile, columns - c), k > 0,
                      y + s * y_row + c, y_row, fetch);
    }
  }
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
    int64_t last = std::min(B, task.column + step);
    for (int64_t column = task.column; column < last; column += kPanelColumns)
      multiply_panels(x, task.expert ? ends[task.expert - 1] : 0, ends[task.expert], w + task.expert * w_expert + column,
                      w_row, A, std::min<int64_t>(kPanelColumns, B - column), column + kPanelColumns < last, y + column, B);
  });
}

}  // namespace
