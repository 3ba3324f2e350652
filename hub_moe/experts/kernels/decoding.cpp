// What a model computes for a few new tokens, in few calls: products with whole weights, SwiGLU blocks, and attention
// over the latent cache. decoding.py calls and describes it. It is built as one file with products.cpp.
//
// For so few rows time is what reading weights and cache from memory takes, so each is read once, in long runs that the
// processor foresees, and a call is one parallel region. What is added up, and in which order, depends on no number of
// threads. Rows are bfloat16 where the processor multiplies it itself and the weights are, float32 otherwise; sums,
// softmax and everything between two products are float32.
//
// Letters: T rows (new tokens of all sequences), B sequences, L new tokens of each, S cached tokens, D hidden, F inner,
// K experts per token, H heads, M = L * H rows of queries, C latent, N head without rotation, R rotary part, V value.

#include "products.cpp"

#include <cmath>
#include <type_traits>

namespace {

constexpr int kRowsAtOnce = 4;           // rows that share one pass over a weight
constexpr int kMostRows = 8;
constexpr int64_t kTaskRows = 128, kBlockRows = 32;  // rows of a weight in one task, at most; of a SwiGLU block's
constexpr int64_t kBlock = 64, kSplit = 512;  // cached tokens that stay in the cache, and of one task
constexpr int kHeadRows = kLanes == 16 ? 8 : 4;   // rows of queries in one tile of sums of latents
constexpr int kWide = kLanes == 16 ? 16 : 8;      // vectors of a run of columns that stays in registers

#if defined(__AVX512BF16__)
template <typename W>
using RowOf = W;
#else
template <typename W>
using RowOf = float;
#endif

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float result;
  std::memcpy(&result, &bits, sizeof bits);
  return result;
}

inline void put(float* p, float x) { *p = x; }
inline void put(bfloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *p = x != x ? 0x7fc0 : (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float sum_of(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline Vec at_most(Vec x, float most) { return broadcast(most) < x ? broadcast(most) : x; }  // these let NaN pass
inline Vec at_least(Vec x, float least) { return broadcast(least) > x ? broadcast(least) : x; }

// e^x to 2 units in the last place; 0 below -87, where float32 ends, and x is at most 88.
inline Vec exp_of(Vec x) {
  Words is_tiny = (Words)(x < broadcast(-87.0f));
  x = at_most(at_least(x, -87.0f), 88.0f);
  const Vec round = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
  Vec shifted = x * 1.44269504088896341f + round, whole = shifted - round;
  Vec r = x - whole * 0.693145751953125f;
  r -= whole * 1.42860682030941723e-6f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)(((Words)p + (((Words)shifted - (Words)round) << 23)) & ~is_tiny);
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
  int64_t each = (rows / (threads * 4) + kDotColumns - 1) / kDotColumns * kDotColumns;
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

template <typename W, typename Y>
void linear(const W* x, int64_t T, int64_t A, const W* w, int64_t B, Y* y, int threads) {
  using X = RowOf<W>;
  RowList<X> rows(as_rows(x, T * A, (X*)scratch(T * A * sizeof(X))), A, T);
  threads = threads_for(2.0 * T * A * B, threads);
#pragma omp parallel num_threads(threads)
  share(B, step_for(B, threads), [&](int64_t first, int64_t last) {
    dots(rows.rows, T, w, A, first, last, A, [&](int64_t t, int64_t n, float sum) { put(y + t * B + n, sum); });
  });
}

template <typename W>
struct Block {  // one SwiGLU block and the rows it gets
  const W *gate, *up, *down;
  int64_t inner, count = 0;
  int64_t token[kMostRows] = {};
  float weight[kMostRows] = {};
  int64_t place = 0;  // of its activations
};

// y[t] = sum over the blocks of weight * down(silu(gate x[t]) * up x[t]).
template <typename W>
void feed_forward(const W* x, int64_t T, int64_t D, std::vector<Block<W>>& blocks, W* y, int threads) {
  using X = RowOf<W>;
  struct Part {
    Block<W>* block;
    int64_t first, last;
  };
  std::vector<Part> parts;
  int64_t size = 0;
  double operations = 0;
  for (auto& block : blocks) {
    block.place = size;
    size += block.count * block.inner;
    operations += 6.0 * block.count * block.inner * D;
    for (int64_t f = 0; f < block.inner; f += kBlockRows)
      parts.push_back({&block, f, std::min(block.inner, f + kBlockRows)});
  }
  Pieces pieces;
  size_t row_place = pieces.add<X>(T * D), inner_place = pieces.add<X>(size);
  char* memory = scratch(pieces.size);
  const X* rows = as_rows(x, T * D, (X*)(memory + row_place));
  X* inner = (X*)(memory + inner_place);
  threads = threads_for(operations, threads);
#pragma omp parallel num_threads(threads)
  {
    share(parts.size(), 1, [&](int64_t index, int64_t) {
      auto [block, first, last] = parts[index];
      float gate[kMostRows][kBlockRows + kLanes], up[kMostRows][kBlockRows + kLanes];
      const X* mine[kMostRows];
      for (int64_t m = 0; m < block->count; ++m) mine[m] = rows + block->token[m] * D;
      dots(mine, block->count, block->gate, D, first, last, D,
           [&, from = first](int64_t m, int64_t n, float sum) { gate[m][n - from] = sum; });
      dots(mine, block->count, block->up, D, first, last, D,
           [&, from = first](int64_t m, int64_t n, float sum) { up[m][n - from] = sum; });
      for (int64_t m = 0; m < block->count; ++m)
        for (int64_t f = 0; f < last - first; f += kLanes) {
          Vec g = load(&gate[m][f]);
          Vec a = g / (1.0f + exp_of(-g)) * load(&up[m][f]);
          X* to = inner + block->place + m * block->inner + first + f;
          int64_t lanes = std::min<int64_t>(kLanes, last - first - f);
          lanes == kLanes ? store(to, a) : store_some(to, a, lanes);
        }
    });
    share(D, std::min<int64_t>(kBlockRows, step_for(D, threads)), [&](int64_t first, int64_t last) {
      float sums[kMostRows][kBlockRows] = {};
      for (const auto& block : blocks) {
        RowList<X> mine(inner + block.place, block.inner, block.count);
        dots(mine.rows, block.count, block.down, block.inner, first, last, block.inner,
             [&](int64_t m, int64_t n, float sum) { sums[block.token[m]][n - first] += block.weight[m] * sum; });
      }
      for (int64_t t = 0; t < T; ++t)
        for (int64_t n = first; n < last; ++n) put(y + t * D + n, sums[t][n - first]);
    });
  }
}

// The blocks of the routed experts that get rows; false for an id that no expert has.
template <typename W>
bool add_experts(std::vector<Block<W>>& blocks, const int64_t* expert_TK, const float* weight_TK, int64_t T, int64_t K,
                 const W* gate_up, const W* down, int64_t E, int64_t F, int64_t D) {
  size_t start = blocks.size();
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < T * K; ++i) {
    int64_t expert = expert_TK[i];
    if (expert < 0 || expert >= E) return false;
    size_t found = std::find(ids.begin(), ids.end(), expert) - ids.begin();
    bool is_full = found < ids.size() && blocks[start + found].count == kMostRows;
    if (is_full) return false;
    if (found == ids.size()) {
      ids.push_back(expert);
      const W* up = gate_up + expert * 2 * F * D;
      Block<W> block{up, up + F * D, down + expert * D * F, F};
      blocks.push_back(block);
    }
    Block<W>& block = blocks[start + found];
    block.token[block.count] = i / K;
    block.weight[block.count++] = weight_TK[i];
  }
  return true;
}

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
  const void *q_a, *q_norm, *q_b, *kv_a, *kv_norm;
  float q_eps, kv_eps;
  int64_t D, A, H, N, R, C;
};

// query (T, H, N + R) with its last part rotated; latent (T, C) normalised and key (T, R) rotated, in rows of C + R.
template <typename W>
void project(const W* x, int64_t T, const Projections& p, const Rotation& by, W* query, W* latent, W* key, int threads) {
  using X = RowOf<W>;
  int64_t width = p.N + p.R, queries = p.H * width, first_rows = p.q_b ? p.A : queries, keys = p.C + p.R;
  Pieces pieces;
  size_t x_place = pieces.add<X>(T * p.D), first_place = pieces.add<float>(T * first_rows);
  size_t key_place = pieces.add<float>(T * keys), q_place = pieces.add<float>(T * queries), a_place = pieces.add<X>(T * p.A);
  char* memory = scratch(pieces.size);
  RowList<X> rows(as_rows(x, T * p.D, (X*)(memory + x_place)), p.D, T);
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

// out (columns) = sum over n of x[n] * w[n]: the product with a weight whose columns are outputs.
template <int V, typename W, typename Y>
inline void combine(const float* x, int64_t count, const W* w, int64_t w_row, Y* out) {
  Vec acc[V] = {};
  for (int64_t n = 0; n < count; ++n) {
    Vec factor = broadcast(x[n]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] += factor * load(w + n * w_row + v * kLanes);
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

struct Mask {  // kind 0: none; 1: bytes, 1 for what is seen; 2: float32 and 3: bfloat16 numbers to add
  const void* base;
  int kind;
  int64_t sequence, head, token, cached;  // elements from one to the next; 0 where all share one
};

// scores (M, kBlock) of `count` cached tokens from `start` on, scaled and masked; hidden ones are -infinity.
template <typename X, typename W>
void score_block(const X* query, int64_t M, int64_t C, int64_t R, const W* latent, int64_t latent_row, const W* key,
                 int64_t key_row, int64_t count, float* scores) {
  int64_t step = M % kDotRows == 0 || M < kDotRows ? kDotRows : std::min<int64_t>(kDotRows, 4);
  for (int64_t j = 0; j < count; j += kDotColumns) {
    bool is_short = j + kDotColumns > count;
    for (int64_t m = 0; m < M; m += step) {
      int64_t rows = std::min(step, M - m);
      const X *wide[kDotRows], *turned[kDotRows];
      for (int64_t i = 0; i < rows; ++i) wide[i] = query + (m + i) * (C + R), turned[i] = wide[i] + C;
      if (!is_short) {
        float* to = scores + m * kBlock + j;
        dot_tile_of<kDotRows>(rows, wide, latent + j * latent_row, latent_row, C, to, kBlock, false);
        dot_tile_of<kDotRows>(rows, turned, key + j * key_row, key_row, R, to, kBlock, true);
      } else {
        for (int64_t k = j; k < count; ++k) {
          float sums[kDotRows * kDotColumns];
          dot_tile_of<kDotRows>(rows, wide, latent + k * latent_row, (int64_t)0, C, sums, (int64_t)kDotColumns, false);
          dot_tile_of<kDotRows>(rows, turned, key + k * key_row, (int64_t)0, R, sums, (int64_t)kDotColumns, true);
          for (int64_t i = 0; i < rows; ++i) scores[(m + i) * kBlock + k] = sums[i * kDotColumns];
        }
      }
    }
  }
}

inline void mask_scores(float* scores, int64_t count, float scaling, const Mask& mask, int64_t offset) {
  constexpr float kLowest = -3.402823466e38f;  // a sum with it stays finite, so a row of nothing else is a mean
  if (mask.kind == 0) {
    for (int64_t j = 0; j < count; ++j) scores[j] *= scaling;
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    int64_t place = offset + j * mask.cached;
    if (mask.kind == 1) {
      scores[j] = ((const uint8_t*)mask.base)[place] ? scores[j] * scaling : -INFINITY;
    } else {
      float number = mask.kind == 2 ? ((const float*)mask.base)[place] : widen(((const bfloat16*)mask.base)[place]);
      scores[j] = std::max(kLowest, scores[j] * scaling + std::max(kLowest, number));
    }
  }
}

// sums[0:I, two vectors] += p[0:I, 0:count] times `count` rows of latents. Fetches the same columns of the rows `ahead`,
// which come next: their way from memory takes as long as this.
template <int I, typename W>
inline void add_latents(const float* p, int64_t count, const W* latent, int64_t row, const W* ahead, float* sums,
                        int64_t sums_row) {
  Vec acc[I][2];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) acc[i][0] = load(sums + i * sums_row), acc[i][1] = load(sums + i * sums_row + kLanes);
  for (int64_t j = 0; j < count; ++j) {
    for (size_t line = 0; line < kTile * sizeof(W); line += 64)
      __builtin_prefetch((const char*)(ahead + j * row) + line, 0, 2);
    Vec first = load(latent + j * row), second = load(latent + j * row + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      Vec factor = broadcast(p[i * kBlock + j]);
      acc[i][0] += factor * first;
      acc[i][1] += factor * second;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) store(sums + i * sums_row, acc[i][0]), store(sums + i * sums_row + kLanes, acc[i][1]);
}

#if defined(__AVX512BF16__)
// The same by products of pairs: two tokens at a time, their columns interleaved in registers.
template <int I>
inline void add_latents(const bfloat16* p, int64_t count, const bfloat16* latent, int64_t row, const bfloat16* ahead,
                        float* sums, int64_t sums_row) {
  // where columns are after unpacking: of each eight, the first four in one vector and the last four in the other
  const __m512i first_four = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i last_four = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  __m512 acc[I][2];
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
    __m512 one = (__m512)load(sums + i * sums_row), two = (__m512)load(sums + i * sums_row + kLanes);
    acc[i][0] = _mm512_permutex2var_ps(one, first_four, two), acc[i][1] = _mm512_permutex2var_ps(one, last_four, two);
  }
  for (int64_t j = 0; j < count; j += 2) {
    const bfloat16* left = latent + j * row;
    const bfloat16* right = j + 1 < count ? left + row : left;  // then its weight is 0
    __builtin_prefetch(ahead + j * row, 0, 2);
    __builtin_prefetch(ahead + (j + 1) * row, 0, 2);
    __m512i one = _mm512_loadu_si512(left), two = _mm512_loadu_si512(right);
    __m512bh first = (__m512bh)_mm512_unpacklo_epi16(one, two), last = (__m512bh)_mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      int32_t pair;
      std::memcpy(&pair, p + i * kBlock + j, sizeof pair);
      __m512bh factors = (__m512bh)_mm512_set1_epi32(pair);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], first, factors);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], last, factors);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
    store(sums + i * sums_row, (Vec)_mm512_permutex2var_ps(acc[i][0], low, acc[i][1]));
    store(sums + i * sums_row + kLanes, (Vec)_mm512_permutex2var_ps(acc[i][0], high, acc[i][1]));
  }
}
#endif

template <int I, typename... Rest>
inline void add_latents_of(int64_t rows, Rest... rest) {
  if constexpr (I > 0) {
    if (rows == I) return add_latents<I>(rest...);
    add_latents_of<I - 1>(rows, rest...);
  }
}

// Adds a block's latents, weighed by p (M, kBlock), to sums (M, C).
template <typename P, typename W>
void add_block(const P* p, int64_t M, int64_t C, const W* latent, int64_t row, int64_t count, const W* ahead, float* sums) {
  for (int64_t m = 0; m < M; m += kHeadRows) {
    int64_t rows = std::min<int64_t>(kHeadRows, M - m), c = 0;
    for (; c + kTile <= C; c += kTile)
      add_latents_of<kHeadRows>(rows, p + m * kBlock, count, latent + c, row, m ? latent + c : ahead + c, sums + m * C + c, C);
    for (; c < C; ++c)
      for (int64_t i = m; i < m + rows; ++i)
        for (int64_t j = 0; j < count; ++j) sums[i * C + c] += widen(p[i * kBlock + j]) * widen(latent[j * row + c]);
  }
}

// The weights e^(score - largest) of a row of scores, in the type of rows, with zeros up to a whole vector behind them.
// Returns their sum; `largest` and the sums so far follow.
template <typename P>
inline float weigh(float* scores, int64_t count, P* weights, float& largest, float& total, float* sums, int64_t C) {
  int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + count, scores + whole, -INFINITY);
  Vec most_of = broadcast(largest);
  for (int64_t j = 0; j < whole; j += kLanes) {
    Vec v = load(scores + j);
    most_of = most_of < v ? v : most_of;
  }
  float most = most_of[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, most_of[i]);
  if (most > largest) {
    float factor = largest == -INFINITY ? 0.0f : std::exp(largest - most);
    total *= factor;
    for (int64_t c = 0; c < C; ++c) sums[c] *= factor;
    largest = most;
  }
  if (most == -INFINITY) most = 0;  // nothing seen so far: all weights are 0
  Vec added = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(weights + j, exp_of(load(scores + j) - most));
    added += load(weights + j);
  }
  return sum_of(added);
}

struct Heads {
  const void* kv_b;  // (H, N + V, C)
  int64_t B, L, H, N, R, C, V;
};

// y (B, L, H, V) of query (B, L, H, N + R) over the cache.
template <typename W>
void attend(const W* query, const Heads& p, const Cache& cache, const Mask& mask, float scaling, W* y, int threads) {
  using X = RowOf<W>;
  int64_t T = p.B * p.L, M = p.L * p.H, splits = (cache.S + kSplit - 1) / kSplit, width = p.C + p.R, per_head = p.N + p.V;
  const W* kv_b = (const W*)p.kv_b;
  Pieces pieces;
  size_t q_place = pieces.add<X>(T * p.H * width), n_place = pieces.add<float>(T * p.H * p.N);
  size_t part_place = pieces.add<float>(p.B * splits * M * p.C), state_place = pieces.add<float>(p.B * splits * M * 2);
  size_t context_place = pieces.add<float>(T * p.H * p.C);
  char* memory = scratch(pieces.size);
  X* latent_query = (X*)(memory + q_place);
  float *plain = (float*)(memory + n_place), *parts = (float*)(memory + part_place);
  float *states = (float*)(memory + state_place), *context = (float*)(memory + context_place);
  for (int64_t i = 0; i < T * p.H; ++i) {
    const W* row = query + i * (p.N + p.R);
    for (int64_t n = 0; n < p.N; ++n) plain[i * p.N + n] = widen(row[n]);
    for (int64_t r = 0; r < p.R; ++r) put(latent_query + i * width + p.C + r, widen(row[p.N + r]));
  }
  double operations = 2.0 * T * p.H * (p.C * per_head + (double)cache.S * (p.C + width));
  threads = threads_for(operations, threads);
#pragma omp parallel num_threads(threads)
  {
    int64_t columns = (p.C + kWide * kLanes - 1) / (kWide * kLanes);
    share(p.H * columns, 1, [&](int64_t index, int64_t) {
      int64_t h = index / columns, c = index % columns * kWide * kLanes;
      for (int64_t t = 0; t < T; ++t)
        combine_columns(plain + (t * p.H + h) * p.N, p.N, kv_b + h * per_head * p.C + c, p.C,
                        std::min<int64_t>(kWide * kLanes, p.C - c), latent_query + (t * p.H + h) * width + c);
    });
    share(p.B * splits, 1, [&](int64_t index, int64_t) {
      int64_t b = index / splits, from = index % splits * kSplit, to = std::min(cache.S, from + kSplit);
      const W* latent = (const W*)cache.latent + b * cache.latent_sequence;
      const W* key = (const W*)cache.key + b * cache.key_sequence;
      float *sums = parts + index * M * p.C, *state = states + index * M * 2;
      std::fill(sums, sums + M * p.C, 0.0f);
      for (int64_t m = 0; m < M; ++m) state[2 * m] = -INFINITY, state[2 * m + 1] = 0;
      thread_local std::vector<float> scores;
      thread_local std::vector<X> weights;
      scores.resize(M * kBlock), weights.resize(M * kBlock);
      for (int64_t s = from; s < to; s += kBlock) {
        int64_t count = std::min(kBlock, to - s);
        score_block(latent_query + b * M * width, M, p.C, p.R, latent + s * cache.latent_row, cache.latent_row,
                    key + s * cache.key_row, cache.key_row, count, scores.data());
        for (int64_t m = 0; m < M; ++m) {
          float* row = scores.data() + m * kBlock;
          int64_t offset = b * mask.sequence + m % p.H * mask.head + m / p.H * mask.token + s * mask.cached;
          mask_scores(row, count, scaling, mask, offset);
          float sum = weigh(row, count, weights.data() + m * kBlock, state[2 * m], state[2 * m + 1], sums + m * p.C, p.C);
          state[2 * m + 1] += sum;
        }
        const W *here = latent + s * cache.latent_row, *ahead = s + 2 * kBlock <= cache.S ? here + kBlock * cache.latent_row : here;
        add_block(weights.data(), M, p.C, here, cache.latent_row, count, ahead, sums);
      }
    });
    share(p.B * M, 1, [&](int64_t row, int64_t) {
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
    });
    int64_t step = std::min<int64_t>(p.V, 32), runs = (p.V + step - 1) / step;
    share(p.H * runs, 1, [&](int64_t index, int64_t) {
      int64_t h = index / runs, v = index % runs * step;
      RowList<float> mine(context + h * p.C, p.H * p.C, T);
      dots(mine.rows, T, kv_b + (h * per_head + p.N) * p.C, p.C, v, std::min(p.V, v + step), p.C,
           [&](int64_t t, int64_t n, float sum) { put(y + (t * p.H + h) * p.V + n, sum); });
    });
  }
}

}  // namespace

extern "C" {

// In all of these every tensor is contiguous where nothing else is said, and all but cos, sin and the mask are of one
// type, bfloat16 or float32; at most kMostRows rows.

int hub_moe_most_rows() { return kMostRows; }

// y (T, B) = x (T, A) w (B, A)^T; y may be float32 beside bfloat16.
void hub_moe_linear(const void* x, const void* w, void* y, int is_bfloat16, int is_bfloat16_y, int64_t T, int64_t A,
                    int64_t B, int threads) {
  if (!is_bfloat16) return linear((const float*)x, T, A, (const float*)w, B, (float*)y, threads);
  is_bfloat16_y ? linear((const bfloat16*)x, T, A, (const bfloat16*)w, B, (bfloat16*)y, threads)
                : linear((const bfloat16*)x, T, A, (const bfloat16*)w, B, (float*)y, threads);
}

// y = x / sqrt(mean(x^2) + eps) * weight, row by row.
void hub_moe_rms_norm(const void* x, const void* weight, void* y, int is_bfloat16, int64_t T, int64_t D, float eps) {
  auto run = [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    for (int64_t t = 0; t < T; ++t) normalise((const W*)x + t * D, (const W*)weight, D, eps, typed + t * D);
  };
  is_bfloat16 ? run((bfloat16*)y) : run((float*)y);
}

// y (T, D): a block that gets every row (gate and up (F, D), down (D, F); none where gate is null), and experts
// (gate_up (E, 2 I, D), down (E, D, I)) of which each row has K (none where K is 0). 1 for an id that no expert has.
int hub_moe_feed_forward(const void* x, void* y, int is_bfloat16, int64_t T, int64_t D, const void* gate, const void* up,
                         const void* down, int64_t F, const void* gate_up, const void* experts_down, int64_t E, int64_t I,
                         const int64_t* expert_TK, const float* weight_TK, int64_t K, int threads) {
  auto run = [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    std::vector<Block<W>> blocks;
    if (gate) {
      Block<W> all{(const W*)gate, (const W*)up, (const W*)down, F};
      for (; all.count < T; ++all.count) all.token[all.count] = all.count, all.weight[all.count] = 1;
      blocks.push_back(all);
    }
    if (!add_experts(blocks, expert_TK, weight_TK, T, K, (const W*)gate_up, (const W*)experts_down, E, I, D)) return 1;
    feed_forward((const W*)x, T, D, blocks, typed, threads);
    return 0;
  };
  return is_bfloat16 ? run((bfloat16*)y) : run((float*)y);
}

// sizes: T, D, A, H, N, R, C. See `project`; q_norm and q_b are null where q_a gives the queries themselves.
void hub_moe_project(const void* x, const void* const* weights, const float* eps, const int64_t* sizes, const void* cos,
                     const void* sin, int is_bfloat16_rotation, int is_interleaved, int64_t rotation_row, void* query,
                     void* latent, void* key, int is_bfloat16, int threads) {
  Projections p{weights[0], weights[1], weights[2], weights[3], weights[4], eps[0], eps[1],
                sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  Rotation by{cos, sin, is_bfloat16_rotation, is_interleaved, rotation_row};
  auto run = [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    project((const W*)x, sizes[0], p, by, typed, (W*)latent, (W*)key, threads);
  };
  is_bfloat16 ? run((bfloat16*)query) : run((float*)query);
}

// sizes: B, L, H, N, R, C, V, S; strides: of sequences and rows of latents, then of keys; then of the mask. See `attend`.
void hub_moe_attend(const void* query, const void* kv_b, const void* latent, const void* key, const void* mask,
                    int mask_kind, const int64_t* sizes, const int64_t* strides, float scaling, void* y, int is_bfloat16,
                    int threads) {
  Heads p{kv_b, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  Cache cache{latent, key, strides[0], strides[1], strides[2], strides[3], sizes[7]};
  Mask hides{mask, mask_kind, strides[4], strides[5], strides[6], strides[7]};
  is_bfloat16 ? attend((const bfloat16*)query, p, cache, hides, scaling, (bfloat16*)y, threads)
              : attend((const float*)query, p, cache, hides, scaling, (float*)y, threads);
}
}
