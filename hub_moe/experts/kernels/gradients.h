// Gradients of stacks of matrices, from what went into their products and the gradients of what came out.
//
// Letters as in matrices.h.

#pragma once

#include "few_rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// A gradient is fresh memory, and to get it page by page takes longer than to compute it.
void ask_for_huge_pages(void* start, size_t size) {
#if defined(__linux__)
  constexpr size_t kHuge = size_t{2} << 20;
  uintptr_t first = ((uintptr_t)start + kHuge - 1) / kHuge * kHuge, last = ((uintptr_t)start + size) / kHuge * kHuge;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: where it fails nothing is lost
#endif
}

constexpr int64_t kGradientColumns = 48;  // of `left`, in one task

// g[0:count, 0:width] = the sum over `depth` of left (depth, kOuterRows) and right (depth, kTile).
template <typename G>
inline __attribute__((always_inline)) void store_tile(const float* left, const float* right, int64_t depth, int64_t count,
                                                      int64_t width, G* g, int64_t g_row) {
  auto get_left = [&](int64_t r) { return [row = left + r * kOuterRows](int i) { return row[i]; }; };
  auto get_right = [&](int64_t r) { return right + r * kTile; };
  Fetch none;
  Vec sums[kOuterRows][2] = {};
  if (count == kOuterRows && width == kTile) {  // all in registers
    outer_tile<kOuterRows, kInPairs<G>>(sums, depth, get_left, get_right, none);
#pragma GCC unroll 12
    for (int i = 0; i < kOuterRows; ++i, g += g_row) store_once(g, sums[i][0]), store_once(g + kLanes, sums[i][1]);
    return;
  }
  outer_tile_of<kOuterRows, kInPairs<G>>(count, sums, depth, get_left, get_right, none);
  for (int64_t i = 0; i < count; ++i, g += g_row)
    for (int half = 0; half * kLanes < width; ++half)
      put(g + half * kLanes, sums[i][half], std::min<int64_t>(kLanes, width - half * kLanes));
}

// g[e] = left[rows of e]^T right[rows of e], each element added up in registers over all rows and written once. What tiles
// take is laid side by side first: rows a power of two apart would take each other's place in the cache.
template <typename G>
void gradient_of_stack(Rows<float> left, Rows<float> right, const int64_t* ends, int64_t experts, int64_t A, int64_t B, G* g,
                       int threads) {
  static_assert(kGradientColumns % kOuterRows == 0);
  ask_for_huge_pages(g, experts * A * B * sizeof(G));
  auto tasks = make_tasks(ends, experts, A, kGradientColumns, true);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    int64_t start = task.expert ? ends[task.expert - 1] : 0, depth = ends[task.expert] - start;
    int64_t columns = std::min(kGradientColumns, A - task.column);
    G* out = g + (task.expert * A + task.column) * B;
    if (!depth) return (void)std::memset(out, 0, columns * B * sizeof(G));
    constexpr int64_t kEach = kInPairs<G> ? 2 : 1;
    int64_t places = (depth + kEach - 1) / kEach;
    Pieces pieces;
    size_t right_place = pieces.add<float>(places * kTile);
    size_t left_place = pieces.add<float>(places * kGradientColumns + kLanes);
    char* memory = scratch(pieces.size);
    float *near_right = (float*)(memory + right_place), *near_left = (float*)(memory + left_place);
    auto pack = [&](const Rows<float>& rows, int64_t place, int64_t from, auto count, float* to) {
      int64_t r = place * kEach;
      const float* row = rows[start + r] + from;
      if constexpr (kInPairs<G>)
        store(to, pair_up(row, r + 1 < depth ? rows[start + r + 1] + from : nullptr, count));  // up to a whole vector
      else if constexpr (std::is_same_v<decltype(count), std::integral_constant<int64_t, kLanes>>)
        store(to, load(row));
      else
        std::copy(row, row + count, to);
    };
    for (int64_t a = 0; a < columns; a += kOuterRows)
      for (int64_t i = 0; i < places; ++i) {
        float* to = near_left + a * places + i * kOuterRows;  // what follows it is written later
        if (a + kOuterRows <= columns)
          pack(left, i, task.column + a, std::integral_constant<int64_t, kOuterRows>(), to);
        else
          pack(left, i, task.column + a, columns - a, to);
      }
    for (int64_t c = 0; c < B; c += kTile) {
      int64_t width = std::min<int64_t>(kTile, B - c);
      for (int64_t i = 0; i < places; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int64_t from = half * kLanes;
          float* to = near_right + i * kTile + from;
          if (from + kLanes <= width)
            pack(right, i, c + from, std::integral_constant<int64_t, kLanes>(), to);
          else if (from < width)
            pack(right, i, c + from, width - from, to);
        }
      for (int64_t a = 0; a < columns; a += kOuterRows)
        store_tile(near_left + a * places, near_right, places, std::min<int64_t>(kOuterRows, columns - a), width,
                   out + a * B + c, B);
    }
    finish_stores();
  });
}

}  // namespace
