// What latent attention needs of new tokens: their queries, their latents and their keys, the last parts rotated.
//
// Letters: T rows (new tokens of all sequences), D hidden, A latent of queries, H heads, N head without rotation,
// R rotary part, C latent.

#pragma once

#include "few_rows.h"

namespace {

struct Rotation {
  const void *cos, *sin;  // (T, R) with rows `row` apart, 0 where all share one
  int is_bfloat16, is_interleaved;
  int64_t row;
};

// x (R) turned by cos and sin: interleaved pairs come out with all their first parts before all their second.
template <typename A, typename Y>
inline void rotate(const float* x, const A* cos, const A* sin, int is_interleaved, int64_t R, Y* y) {
  int64_t half = R / 2;
  for (int64_t i = 0; i < half; ++i) {
    float one = is_interleaved ? x[2 * i] : x[i], two = is_interleaved ? x[2 * i + 1] : x[i + half];
    int64_t second = is_interleaved ? i : i + half;
    put(y + i, one * widen(cos[i]) - two * widen(sin[i]));
    put(y + i + half, two * widen(cos[second]) + one * widen(sin[second]));
  }
}

template <typename Y>
inline void rotate(const float* x, const Rotation& by, int64_t t, int64_t R, Y* y) {
  if (by.is_bfloat16)
    rotate(x, (const bfloat16*)by.cos + t * by.row, (const bfloat16*)by.sin + t * by.row, by.is_interleaved, R, y);
  else
    rotate(x, (const float*)by.cos + t * by.row, (const float*)by.sin + t * by.row, by.is_interleaved, R, y);
}

struct Projections {  // q_b and q_norm only where queries have a latent of their own, A numbers wide
  const void *q_a, *q_norm, *q_b, *kv_a, *kv_norm, *x_norm;  // x_norm: of the rows themselves, or null
  float q_eps, kv_eps, x_eps;
  int64_t D, A, H, N, R, C;
};

// query (T, H, N + R) with its last part rotated; latent (T, C) normalised and key (T, R) rotated, in rows of C + R.
template <typename W>
void project(const W* x, int64_t T, const Projections& p, const Rotation& by, W* query, W* latent, W* key, int threads) {
  using X = RowOf<W>;
  int64_t width = p.N + p.R, queries = p.H * width, first_rows = p.q_b ? p.A : queries, keys = p.C + p.R;
  Pieces pieces;
  size_t x_place = pieces.add<X>(T * p.D), normed_place = pieces.add<W>(T * p.D), first_place = pieces.add<float>(T * first_rows);
  size_t key_place = pieces.add<float>(T * keys), q_place = pieces.add<float>(T * queries), a_place = pieces.add<X>(T * p.A);
  char* memory = scratch(pieces.size);
  W* normed = (W*)(memory + normed_place);
  for (int64_t t = 0; p.x_norm && t < T; ++t) normalise(x + t * p.D, (const W*)p.x_norm, p.D, p.x_eps, normed + t * p.D);
  RowList<X> rows(as_rows(p.x_norm ? normed : x, T * p.D, (X*)(memory + x_place)), p.D, T);
  float *first = (float*)(memory + first_place), *kv = (float*)(memory + key_place);
  float* q = p.q_b ? (float*)(memory + q_place) : first;
  X* a = (X*)(memory + a_place);
  threads = threads_for(2.0 * T * p.D * (first_rows + keys), threads);
#pragma omp parallel num_threads(threads)
  {
    int64_t step = step_for(first_rows + keys, threads);
    share(first_rows + keys, step, [&](int64_t from, int64_t to) {
      if (from < first_rows)
        dots(rows.rows, T, (const W*)p.q_a, p.D, from, std::min(to, first_rows), p.D,
             [&](int64_t t, int64_t n, float sum) { first[t * first_rows + n] = sum; });
      if (to > first_rows)
        dots(rows.rows, T, (const W*)p.kv_a, p.D, std::max<int64_t>(0, from - first_rows), to - first_rows, p.D,
             [&](int64_t t, int64_t n, float sum) { kv[t * keys + n] = sum; });
    });
    if (p.q_b) {
#pragma omp single
      for (int64_t t = 0; t < T; ++t)
        normalise(first + t * p.A, (const W*)p.q_norm, p.A, p.q_eps, a + t * p.A);
      RowList<X> narrow(a, p.A, T);
      share(queries, step_for(queries, threads), [&](int64_t from, int64_t to) {
        dots(narrow.rows, T, (const W*)p.q_b, p.A, from, to, p.A,
             [&](int64_t t, int64_t n, float sum) { q[t * queries + n] = sum; });
      });
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    normalise(kv + t * keys, (const W*)p.kv_norm, p.C, p.kv_eps, latent + t * keys);
    rotate(kv + t * keys + p.C, by, t, p.R, key + t * keys);
    for (int64_t h = 0; h < p.H; ++h) {
      const float* from = q + t * queries + h * width;
      W* to = query + t * queries + h * width;
      for (int64_t i = 0; i < p.N; ++i) put(to + i, from[i]);
      rotate(from + p.N, by, t, p.R, to + p.N);
    }
  }
}

}  // namespace
