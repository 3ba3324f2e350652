// A decoder layer for a few new tokens, behind its projections: attention, its output, and what feeds forward.
//
// Letters: T rows, D hidden, E experts, K of them per row; those of latent_attention.h.

#pragma once

#include "feed_forward.h"
#include "latent_attention.h"
#include "routing.h"

namespace {

struct Weights {  // kv_b as in `attend`; o (D, H V); a block that all rows pass, none where gate is null; experts or none
  const void *o, *norm, *gate, *up, *down;
  const void *router, *experts_up, *experts_down;
  float eps;
  int64_t D, F, I;  // hidden, inner of the block and of an expert
};

// y (T, D) = h + feed_forward(norm(h)), where h = x + o(attend(query)). False where several
// experts are equally good for a row.
template <typename W>
bool finish_layer(const W* x, const W* query, const Heads& p, const Cache& cache, const Mask& mask, float scaling,
                  const Weights& w, const Routing& r, W* y, int threads) {
  int64_t T = p.B * p.L, D = w.D;
  thread_local std::vector<W> rows;  // `scratch` is for the functions called here
  thread_local std::vector<float> numbers;
  rows.resize(T * (p.H * p.V + 2 * D)), numbers.resize(T * (r.E + r.K));
  W *attended = rows.data(), *h = attended + T * p.H * p.V, *normed = h + T * D;
  attend(query, p, cache, mask, scaling, attended, threads);
  linear(attended, T, p.H * p.V, (const W*)w.o, D, h, threads, x);
  for (int64_t t = 0; t < T; ++t) normalise(h + t * D, (const W*)w.norm, D, w.eps, normed + t * D);
  std::vector<Block<W>> blocks;
  if (w.gate) add_block_of_all(blocks, (const W*)w.gate, (const W*)w.up, (const W*)w.down, w.F, T);
  if (r.E) {
    float *logits = numbers.data(), *weights = logits + T * r.E;
    std::vector<int64_t> experts(T * r.K);
    linear(normed, T, D, (const W*)w.router, r.E, logits, threads);
    for (int64_t t = 0; t < T; ++t)
      if (!route(logits + t * r.E, r, experts.data() + t * r.K, weights + t * r.K)) return false;
    if (!add_experts(blocks, experts.data(), weights, T, r.K, (const W*)w.experts_up, (const W*)w.experts_down, r.E, w.I, D))
      return false;
  }
  feed_forward(normed, T, D, blocks, y, threads, h);
  return true;
}

}  // namespace
