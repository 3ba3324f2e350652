// Attention of a few new tokens over the latent cache, which is read once for all heads.
//
// Letters: B sequences, L new tokens of each, T = B * L, S cached tokens, H heads, M = L * H rows of queries, C latent,
// N head without rotation, R rotary part, V value.

#pragma once

#include "latent_blocks.h"

namespace {

constexpr int64_t kSplit = 512;               // cached tokens of one task
constexpr int kWide = kLanes == 16 ? 16 : 8;  // vectors of a run of columns that stays in registers
constexpr int kRowsAhead = 16;                // of such a run, that are fetched ahead: they lie apart

// out (columns) = sum over n of x[n] * w[n]: the product with a weight whose columns are outputs.
template <int V, typename W, typename Y>
inline void combine(const float* x, int64_t count, const W* w, int64_t w_row, Y* out) {
  Vec acc[V] = {};
  for (int64_t n = 0; n < count; ++n) {
    Vec factor = broadcast(x[n]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(w + (n + kRowsAhead) * w_row + v * kLanes, 0, 2);
      acc[v] += factor * load(w + n * w_row + v * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
}

template <typename W, typename Y>
void combine_columns(const float* x, int64_t count, const W* w, int64_t w_row, int64_t columns, Y* out) {
  int64_t c = 0;
  for (; c + kWide * kLanes <= columns; c += kWide * kLanes) combine<kWide>(x, count, w + c, w_row, out + c);
  for (; c + kLanes <= columns; c += kLanes) combine<1>(x, count, w + c, w_row, out + c);
  if (c == columns) return;
  Vec acc = {};
  for (int64_t n = 0; n < count; ++n) acc += broadcast(x[n]) * load_some(w + n * w_row + c, columns - c);
  store_some(out + c, acc, columns - c);
}

struct Cache {  // element (b, s, c) of the latents at latent[b * latent_sequence + s * latent_row + c], keys alike
  const void *latent, *key;
  int64_t latent_sequence, latent_row, key_sequence, key_row, S;
};

struct Heads {
  const void* kv_b;  // (H, N + V, C)
  int64_t B, L, H, N, R, C, V;
};

// One call of `attend`: where its parts lie, and its four steps, which threads share.
template <typename W>
struct Attention {
  using X = RowOf<W>;
  const Heads& p;
  const Cache& cache;
  const Mask& mask;
  float scaling;
  const W* kv_b;
  int64_t T, M, splits, width, per_head;
  X* latent_query;                         // (T, H, C + R)
  float *plain, *parts, *states, *context;  // (T, H, N); of each split (M, C) and (M, 2); (T, H, C)

  Attention(const Heads& p, const Cache& cache, const Mask& mask, float scaling)
      : p(p), cache(cache), mask(mask), scaling(scaling), kv_b((const W*)p.kv_b), T(p.B * p.L), M(p.L * p.H),
        splits((cache.S + kSplit - 1) / kSplit), width(p.C + p.R), per_head(p.N + p.V) {
    Pieces pieces;
    size_t q_place = pieces.add<X>(T * p.H * width), n_place = pieces.add<float>(T * p.H * p.N);
    size_t part_place = pieces.add<float>(p.B * splits * M * p.C), state_place = pieces.add<float>(p.B * splits * M * 2);
    size_t context_place = pieces.add<float>(T * p.H * p.C);
    char* memory = scratch(pieces.size);
    latent_query = (X*)(memory + q_place);
    plain = (float*)(memory + n_place), parts = (float*)(memory + part_place);
    states = (float*)(memory + state_place), context = (float*)(memory + context_place);
  }

  void widen_queries(const W* query) {
    for (int64_t i = 0; i < T * p.H; ++i) {
      const W* row = query + i * (p.N + p.R);
      for (int64_t n = 0; n < p.N; ++n) plain[i * p.N + n] = widen(row[n]);
      for (int64_t r = 0; r < p.R; ++r) put(latent_query + i * width + p.C + r, widen(row[p.N + r]));
    }
  }

  // Queries as they meet latents.
  void absorb_keys() {
    int64_t columns = (p.C + kWide * kLanes - 1) / (kWide * kLanes);
    share(p.H * columns, 1, [&](int64_t index, int64_t) {
      int64_t h = index / columns, c = index % columns * kWide * kLanes;
      for (int64_t t = 0; t < T; ++t)
        combine_columns(plain + (t * p.H + h) * p.N, p.N, kv_b + h * per_head * p.C + c, p.C,
                        std::min<int64_t>(kWide * kLanes, p.C - c), latent_query + (t * p.H + h) * width + c);
    });
  }

  // Rows of queries as they meet latents and keys.
  const Met<X, W>* meet_queries(const X* rows) {
    if constexpr (std::is_same_v<Met<X, W>, X>) {
      return rows;
    } else {
      int64_t turned_at = met_size<Met<X, W>>(p.C), size = turned_at + met_size<Met<X, W>>(p.R);
      thread_local std::vector<Met<X, W>> met;
      met.resize(M * size);
      for (int64_t m = 0; m < M; ++m) {
        spread_row(rows + m * width, p.C, met.data() + m * size);
        spread_row(rows + m * width + p.C, p.R, met.data() + m * size + turned_at);
      }
      return met.data();
    }
  }

  // The block that comes behind the one at `s`.
  Ahead fetch_behind(const W* latent, const W* key, int64_t s) {
    int64_t next = std::min(s + kBlock, cache.S), step = score_step<Met<X, W>>(M);
    int64_t of_scores = kBlock / kDotColumns * ((M + step - 1) / step);
    int64_t of_sums = (M + kHeadRows - 1) / kHeadRows * (p.C / kTile);
    constexpr int64_t kBytes = sizeof(W);
    return {(const char*)(latent + next * cache.latent_row), (const char*)(key + next * cache.key_row),
            p.C * kBytes, cache.latent_row * kBytes, p.R * kBytes, cache.key_row * kBytes,
            std::min(kBlock, cache.S - next), of_scores + of_sums};
  }

  // Of a run of cached tokens: latents weighed by e^(score - largest), added up, and the largest score and the sum of weights.
  void read_split(int64_t b, int64_t split) {
    int64_t from = split * kSplit, to = std::min(cache.S, from + kSplit), index = b * splits + split;
    const W* latent = (const W*)cache.latent + b * cache.latent_sequence;
    const W* key = (const W*)cache.key + b * cache.key_sequence;
    float *sums = parts + index * M * p.C, *state = states + index * M * 2;
    std::fill(sums, sums + M * p.C, 0.0f);
    for (int64_t m = 0; m < M; ++m) state[2 * m] = -INFINITY, state[2 * m + 1] = 0;
    thread_local std::vector<float> scores;
    thread_local std::vector<X> weights;
    scores.resize(M * kBlock), weights.resize(M * kBlock);
    const Met<X, W>* queries = meet_queries(latent_query + b * M * width);
    for (int64_t s = from; s < to; s += kBlock) {
      int64_t count = std::min(kBlock, to - s);
      Stretch<W> latents{latent + s * cache.latent_row, cache.latent_row, p.C};
      Stretch<W> keys{key + s * cache.key_row, cache.key_row, p.R};
      Ahead ahead = fetch_behind(latent, key, s);
      score_block(queries, M, latents, keys, count, scores.data(), ahead);
      for (int64_t m = 0; m < M; ++m) {
        float* row = scores.data() + m * kBlock;
        int64_t offset = b * mask.sequence + m % p.H * mask.head + m / p.H * mask.token + s * mask.cached;
        mask_scores(row, count, scaling, mask, offset);
        float sum = weigh(row, count, weights.data() + m * kBlock, state[2 * m], state[2 * m + 1], sums + m * p.C, p.C);
        state[2 * m + 1] += sum;
      }
      add_block(weights.data(), M, latents, count, sums, ahead);
    }
  }

  // The weighted mean of all latents from those of the runs.
  void join_splits(int64_t row) {
    int64_t b = row / M, m = row % M;
    float most = -INFINITY, total = 0, *to = context + row * p.C;
    for (int64_t i = 0; i < splits; ++i) most = std::max(most, states[((b * splits + i) * M + m) * 2]);
    std::fill(to, to + p.C, 0.0f);
    for (int64_t i = 0; i < splits; ++i) {
      const float *state = states + ((b * splits + i) * M + m) * 2, *sums = parts + ((b * splits + i) * M + m) * p.C;
      float factor = state[0] == -INFINITY ? 0.0f : std::exp(state[0] - most);
      total += factor * state[1];
      for (int64_t c = 0; c < p.C; ++c) to[c] += factor * sums[c];
    }
    float scale = total > 0 ? 1 / total : 0;  // a query that sees nothing has output 0
    for (int64_t c = 0; c < p.C; ++c) to[c] *= scale;
  }

  void expand_values(W* y) {
    int64_t step = std::min<int64_t>(p.V, 32), runs = (p.V + step - 1) / step;
    share(p.H * runs, 1, [&](int64_t index, int64_t) {
      int64_t h = index / runs, v = index % runs * step;
      RowList<float> mine(context + h * p.C, p.H * p.C, T);
      dots(mine.rows, T, kv_b + (h * per_head + p.N) * p.C, p.C, v, std::min(p.V, v + step), p.C,
           [&](int64_t t, int64_t n, float sum) { put(y + (t * p.H + h) * p.V + n, sum); });
    });
  }
};

// y (B, L, H, V) of query (B, L, H, N + R) over the cache.
template <typename W>
void attend(const W* query, const Heads& p, const Cache& cache, const Mask& mask, float scaling, W* y, int threads) {
  Attention<W> all(p, cache, mask, scaling);
  all.widen_queries(query);
  double operations = 2.0 * all.T * p.H * (p.C * all.per_head + (double)cache.S * (p.C + all.width));
  threads = threads_for(operations, threads);
#pragma omp parallel num_threads(threads)
  {
    all.absorb_keys();
    // runs of neighbours, as memory is read ahead beyond the end of a split
    share(p.B * all.splits, std::max<int64_t>(1, p.B * all.splits / (2 * threads)), [&](int64_t first, int64_t last) {
      for (int64_t index = first; index < last; ++index) all.read_split(index / all.splits, index % all.splits);
    });
    share(p.B * all.M, 1, [&](int64_t row, int64_t) { all.join_splits(row); });
    all.expand_values(y);
  }
}

}  // namespace
