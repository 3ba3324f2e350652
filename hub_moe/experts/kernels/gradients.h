// Gradients of stacks of matrices, from what went into their products and the gradients of what came out.
//
// Letters as in matrices.h.

#pragma once

#include "tasks.h"
#include "tiles.h"

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

// g[e] = left[rows of e]^T right[rows of e], each element added up in registers over all rows and written once.
template <typename G>
void gradient_of_stack(Rows<float> left, Rows<float> right, const int64_t* ends, int64_t experts, int64_t A, int64_t B, G* g,
                       int threads) {
  ask_for_huge_pages(g, experts * A * B * sizeof(G));
  auto tasks = make_tasks(ends, experts, A, 2 * kOuterRows, true);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    int64_t start = task.expert ? ends[task.expert - 1] : 0, depth = ends[task.expert] - start;
    int64_t last = std::min<int64_t>(A, task.column + 2 * kOuterRows);
    G* out = g + task.expert * A * B;
    if (!depth) return (void)std::memset(out + task.column * B, 0, (last - task.column) * B * sizeof(G));
    for (int64_t a = task.column; a < last; a += kOuterRows) {
      int64_t count = std::min<int64_t>(kOuterRows, last - a);
      for (int64_t c = 0; c < B; c += kTile) {
        Vec sums[kOuterRows][2] = {};
        int64_t width = std::min<int64_t>(kTile, B - c);
        auto get_left = [&](int64_t r) { return [row = left[start + r] + a](int i) { return row[i]; }; };
        if (width == kTile) {
          outer_tile_of<kOuterRows>(count, sums, depth, get_left, [&](int64_t r) { return right[start + r] + c; });
        } else {
          float padded[kTile] = {};
          outer_tile_of<kOuterRows>(count, sums, depth, get_left, [&](int64_t r) {
            const float* row = right[start + r] + c;
            std::copy(row, row + width, padded);
            return (const float*)padded;
          });
        }
        for (int64_t i = 0; i < count; ++i)
          for (int half = 0; half < 2; ++half) {
            int64_t lanes = std::min<int64_t>(kLanes, width - half * kLanes);
            G* to = out + (a + i) * B + c + half * kLanes;
            if (lanes == kLanes) store_once(to, sums[i][half]);
            else if (lanes > 0) store_some(to, sums[i][half], lanes);
          }
      }
    }
    finish_stores();
  });
}

}  // namespace
