// SwiGLU of many rows, its gradient, and the sums over the experts of each token.
//
// Letters: F inner, D hidden.

#pragma once

#include "tasks.h"
#include "vectors.h"

namespace {

// a = silu(gate) * linear, of rows h = (gate, linear).
template <typename T>
void swiglu(const float* h, int64_t rows, int64_t F, T* a, int threads) {
  run_rows(rows, (double)rows * F, threads, [=](int64_t s) {
    const float *gate = h + s * 2 * F, *linear = gate + F;
    each_vector(F, [=](int64_t i, auto count) {
      Vec g = get(gate + i, count);
      put(a + s * F + i, g * sigmoid(g) * get(linear + i, count), count);
    });
  });
}

void swiglu_gradient(const float* h, const float* da, const float* scale, int64_t rows, int64_t F, float* a, float* dh,
                     float* sums, int threads) {
  run_rows(rows, 2.0 * rows * F, threads, [=](int64_t s) {
    const float *gate = h + s * 2 * F, *linear = gate + F;
    float factor = scale ? scale[s] : 1;
    Vec sum = {};
    each_vector(F, [=, &sum](int64_t i, auto count) {
      Vec g = get(gate + i, count), u = get(linear + i, count), d = get(da + s * F + i, count);
      Vec open = sigmoid(g), silu = g * open, product = silu * u;
      sum += product * d;
      d *= factor;
      put(a + s * F + i, product * factor, count);
      put(dh + s * 2 * F + i, d * u * (open + silu * (1.0f - open)), count);
      put(dh + s * 2 * F + F + i, d * silu, count);
    });
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    sums[s] = (float)total;
  });
}

// Row t is the sum of the rows y[s] that order[s] / top_k names t, in the order of k, whatever the threads.
void add_up(const float* y, const float* weights, const int64_t* order, int64_t rows, int64_t tokens, int64_t top_k,
            int64_t D, float* out, int threads) {
  std::vector<int64_t> places(tokens * top_k, -1);
  for (int64_t s = 0; s < rows; ++s) places[order[s]] = s;
  run_rows(tokens, 0.1 * rows * D, threads, [=, &places](int64_t t) {
    each_vector(D, [=, &places](int64_t i, auto count) {
      Vec sum = {};
      for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k)
        if (int64_t s = places[k]; s >= 0) sum += get(y + s * D + i, count) * (weights ? weights[k] : 1.0f);
      put(out + t * D + i, sum, count);
    });
  });
}

}  // namespace
