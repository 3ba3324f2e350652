// How work is cut into tasks, which the threads of OpenMP take one by one, and where rows lie.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr double kOperationsPerThread = 2e5;  // below that a thread costs more than it brings

struct Task {
  int64_t expert, column;
};

std::vector<Task> make_tasks(const int64_t* ends, int64_t experts, int64_t columns, int64_t step, bool idle_too) {
  std::vector<Task> tasks;
  for (int64_t e = 0; e < experts; ++e)
    if (idle_too || ends[e] > (e ? ends[e - 1] : 0))
      for (int64_t c = 0; c < columns; c += step) tasks.push_back({e, c});
  return tasks;
}

int threads_for(double operations, int most) {
  return (int)std::max(1.0, std::min<double>(most, operations / kOperationsPerThread));
}

template <typename F>
void run_tasks(const std::vector<Task>& tasks, int threads, F run) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < (int64_t)tasks.size(); ++i) run(tasks[i]);
}

template <typename X>
struct Rows {  // row s is base + places[s] * row, or base + s * row without places
  const X* base;
  int64_t row;
  const int64_t* places;
  const X* operator[](int64_t s) const { return base + (places ? places[s] : s) * row; }
};

template <typename F>
void run_rows(int64_t rows, double numbers, int most, F run) {  // about 20 operations a number
#pragma omp parallel for schedule(static) num_threads(threads_for(20 * numbers, most))
  for (int64_t s = 0; s < rows; ++s) run(s);
}

}  // namespace
