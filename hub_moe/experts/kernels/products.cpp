// Products of rows sorted by expert with their experts' matrices; compiled_products.py builds this and describes it.
//
// Rows are float32; matrices float32 or bfloat16, widened as they are read; all sums are float32. Where the processor
// multiplies pairs of bfloat16 itself, rows may be bfloat16 beside a bfloat16 matrix whose rows are outputs. Nothing is allocated
// but one panel per thread, and no matrix is copied as a whole. Work is cut into tasks of one expert and some columns,
// which the threads of OpenMP take one by one; what a task adds up, and in which order, depends on no other.
//
// Letters: S rows, E experts, A what goes into a product, B what comes out.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kDotRows = 6, kOuterRows = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kDotRows = 3, kOuterRows = 6;
#else
constexpr int kLanes = 4, kDotRows = 4, kOuterRows = 8;
#endif
constexpr int kDotColumns = 4;           // matrix rows whose sums one tile of dot products keeps in registers
constexpr int kDotDepth = 704;          // how much of kDotColumns matrix rows stays in the first-level cache
constexpr int kTile = 2 * kLanes;        // columns of a tile of outer products
constexpr int kPanelColumns = 4 * kTile, kPanelDepth = 16384 / kPanelColumns;  // 64 KiB
constexpr int kTaskColumns = 32;
constexpr double kOperationsPerThread = 2e5;  // below that a thread costs more than it brings

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef float Four __attribute__((vector_size(16)));
typedef uint16_t bfloat16;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Words) << 16);
}

template <typename T>
inline Vec load_some(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::copy(p, p + count, padded);
  return load(padded);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bfloat16* p, Vec v) {  // to nearest, ties to even; NaN stays NaN
  Words w = (Words)v;
  Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  Words nan = (Words)(v != v);
  Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
  std::memcpy(p, &h, sizeof h);
}

// Past the cache, which a stack's gradient would sweep empty, and without reading first what is overwritten.
template <typename T>
inline void store_once(T* p, Vec v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<T, float>::value)
    if ((uintptr_t)p % sizeof v == 0) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if constexpr (std::is_same<T, float>::value)
    if ((uintptr_t)p % sizeof v == 0) return _mm256_stream_ps(p, (__m256)v);
#endif
  store(p, v);
}

inline void finish_stores() {  // before others are told that the numbers are there
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <typename T>
inline void store_some(T* p, Vec v, int64_t count) {
  T all[kLanes];
  store(all, v);
  std::copy(all, all + count, p);
}

template <typename F>
inline void each_vector(int64_t count, F run) {  // run(start, how many)
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) run(i, std::integral_constant<int64_t, kLanes>());
  if (i < count) run(i, count - i);
}

template <typename T>
inline Vec get(const T* p, int64_t count) { return count == kLanes ? load(p) : load_some(p, count); }

template <typename T>
inline void put(T* p, Vec v, int64_t count) { count == kLanes ? store(p, v) : store_some(p, v, count); }

inline Vec broadcast(float x) { return x - Vec{}; }

// The sums of four vectors.
inline Four sum_lanes(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  auto halves = [](Vec one, Vec two) {
    return __builtin_shufflevector(one, two, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(one, two, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  Vec ab = halves(a, b), cd = halves(c, d);
  Vec all = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
            __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12);
#elif defined(__AVX2__)
  auto quarters = [](Vec one, Vec two) {
    return __builtin_shufflevector(one, two, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(one, two, 2, 3, 10, 11, 6, 7, 14, 15);
  };
  Vec ab = quarters(a, b), cd = quarters(c, d);
  Vec all = __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
            __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
#else
  auto sum = [](Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); };
  return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// How many elements one step of a dot product takes, and how it adds them to the sums.
template <typename X, typename W>
struct Dot {
  static constexpr int kWidth = kLanes;
  template <typename T>
  static Vec get(const T* p) { return load(p); }
  template <typename T>
  static Vec get_some(const T* p, int64_t count) { return load_some(p, count); }
  static void add(Vec& sum, Vec a, Vec b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bfloat16, bfloat16> {
  static constexpr int kWidth = 2 * kLanes;
  static __m512bh get(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh get_some(const bfloat16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << count) - 1), p);
  }
  static void add(Vec& sum, __m512bh a, __m512bh b) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

// y[m, 0:4] (+)= x[m] . w[0:4], over `depth` elements. For few rows a matrix comes from memory at the speed of that, so
// `Ahead` asks for the next four rows while these are multiplied.
template <int M, bool Ahead, typename X, typename W>
__attribute__((noinline)) void dot_tile(const X* const* x, const W* w, int64_t w_row, int64_t depth, float* y, int64_t y_row, bool add) {
  Vec sums[M][kDotColumns] = {};
  int64_t i = 0;
  using D = Dot<X, W>;
  auto step = [&](auto get) {
    decltype(get(w)) columns[kDotColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) {
      columns[n] = get(w + n * w_row + i);
      if (Ahead) __builtin_prefetch(w + (n + kDotColumns) * w_row + i, 0, 2);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      auto row = get(x[m] + i);
#pragma GCC unroll 4
      for (int n = 0; n < kDotColumns; ++n) D::add(sums[m][n], row, columns[n]);
    }
  };
  for (; i + D::kWidth <= depth; i += D::kWidth) step([](auto* p) { return D::get(p); });
  if (i < depth) step([rest = depth - i](auto* p) { return D::get_some(p, rest); });
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    Four four = sum_lanes(sums[m][0], sums[m][1], sums[m][2], sums[m][3]), before = {};
    if (add) std::memcpy(&before, y + m * y_row, sizeof before);
    four += before;
    std::memcpy(y + m * y_row, &four, sizeof four);
  }
}

template <int M, bool Ahead = false, typename X, typename W, typename... Rest>
inline void dot_tile_of(int64_t rows, const X* const* x, const W* w, Rest... rest) {
  if constexpr (M > 0) {
    if (rows == M) return dot_tile<M, Ahead>(x, w, rest...);
    dot_tile_of<M - 1, Ahead>(rows, x, w, rest...);
  }
}

// sums[i, 0:2] over `depth`: get_left(r) gives the numbers of all i, get_right(r) points to kTile columns.
template <int I, typename Left, typename Right>
inline void outer_tile(Vec (&sums)[kOuterRows][2], int64_t depth, Left get_left, Right get_right) {
  Vec acc[I][2];
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i) acc[i][0] = sums[i][0], acc[i][1] = sums[i][1];
  for (int64_t r = 0; r < depth; ++r) {
    const float* right = get_right(r);
    auto numbers = get_left(r);
    Vec first = load(right), second = load(right + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < I; ++i) {
      Vec left = broadcast(numbers(i));
      acc[i][0] += left * first;
      acc[i][1] += left * second;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < I; ++i) sums[i][0] = acc[i][0], sums[i][1] = acc[i][1];
}

template <int I, typename... Rest>
inline void outer_tile_of(int64_t rows, Vec (&sums)[kOuterRows][2], Rest... rest) {
  if constexpr (I > 0) {
    if (rows == I) return outer_tile<I>(sums, rest...);
    outer_tile_of<I - 1>(rows, sums, rest...);
  }
}

// Fetches the `part`th of `parts` of a block of rows ahead of its use: matrices come from memory once, each in short
// runs that the processor does not foresee.
template <typename W>
inline void prefetch_part(const W* block, int64_t rows, int64_t row, int64_t width, int64_t part, int64_t parts) {
  constexpr int64_t kLine = 64 / sizeof(W);
  int64_t per_row = (width + kLine - 1) / kLine, lines = rows * per_row;
  for (int64_t i = part * lines / parts; i < (part + 1) * lines / parts; ++i)
    __builtin_prefetch(block + i / per_row * row + i % per_row * kLine, 0, 2);
}

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

// Matrices whose rows are outputs: y = x w^T, by dot products of contiguous rows.
template <typename X, typename W>
void multiply_by_rows(Rows<X> x, const W* w, int64_t w_expert, int64_t w_row, const int64_t* ends, int64_t experts,
                      int64_t A, int64_t B, float* y, int threads) {
  auto tasks = make_tasks(ends, experts, B, kTaskColumns, false);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    int64_t start = task.expert ? ends[task.expert - 1] : 0, end = ends[task.expert];
    const W* matrix = w + task.expert * w_expert;
    int64_t last = std::min(B, task.column + kTaskColumns), whole = last - (last - task.column) % kDotColumns;
    for (int64_t n = task.column; n < last; n += kDotColumns) {
      // too few columns for a tile: their last ones are computed again, or, in a tiny matrix, one is repeated
      bool is_short = n >= whole;
      int64_t from = is_short ? std::max<int64_t>(0, last - kDotColumns) : n;
      bool is_tiny = B < kDotColumns;
      for (int64_t k = 0; k < A; k += kDotDepth) {
        int64_t depth = std::min<int64_t>(kDotDepth, A - k), parts = (end - start + kDotRows - 1) / kDotRows;
        // The same few matrix rows meet all rows of the expert: they are widened once, not once for every tile, and
        // laid side by side, as rows a power of two apart would take each other's place in the cache.
        alignas(64) X near[kDotColumns * kDotDepth];
        bool is_near = !is_short && parts > 1;
        for (int c = 0; is_near && c < kDotColumns; ++c) {
          const W* row = matrix + (n + c) * w_row + k;
          if constexpr (std::is_same<X, W>::value)
            std::copy(row, row + depth, near + c * kDotDepth);
          else
            each_vector(depth, [&](int64_t i, auto some) { put(near + c * kDotDepth + i, get(row + i, some), some); });
        }
        const W* next = k + kDotDepth < A ? matrix + n * w_row + k + kDotDepth : matrix + (n + kDotColumns) * w_row;
        for (int64_t s = start; s < end; s += kDotRows) {
          int64_t count = std::min<int64_t>(kDotRows, end - s);
          if (parts > 2) prefetch_part(next, kDotColumns, w_row, depth, (s - start) / kDotRows, parts);
          const X* rows[kDotRows];
          float sums[kDotRows * kDotColumns];
          for (int64_t m = 0; m < count; ++m) rows[m] = x[s + m] + k;
          if (is_near) {
            dot_tile_of<kDotRows>(count, rows, (const X*)near, (int64_t)kDotDepth, depth, y + s * B + n, B, k > 0);
          } else if (!is_short) {
            dot_tile_of<kDotRows, true>(count, rows, matrix + n * w_row + k, w_row, depth, y + s * B + n, B, k > 0);
          } else if (!is_tiny) {
            dot_tile_of<kDotRows>(count, rows, matrix + from * w_row + k, w_row, depth, sums, (int64_t)kDotColumns, false);
            for (int64_t m = 0; m < count; ++m)
              for (int64_t c = n; c < last; ++c) {
                float& place = y[(s + m) * B + c];
                place = (k ? place : 0) + sums[m * kDotColumns + c - from];
              }
          } else {
            for (int64_t c = n; c < last; ++c) {
              dot_tile_of<kDotRows>(count, rows, matrix + c * w_row + k, (int64_t)0, depth, sums, (int64_t)kDotColumns,
                                    false);
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

// Matrices whose columns are outputs: y = x w, by outer products; a panel of w is widened into the cache first.
template <typename W>
void multiply_by_columns(Rows<float> x, const W* w, int64_t w_expert, int64_t w_row, const int64_t* ends, int64_t experts,
                         int64_t A, int64_t B, float* y, int threads) {
  auto tasks = make_tasks(ends, experts, B, kPanelColumns, false);
  run_tasks(tasks, threads_for(2.0 * ends[experts - 1] * A * B, threads), [&](Task task) {
    alignas(64) float panel[kPanelDepth * kPanelColumns];
    int64_t start = task.expert ? ends[task.expert - 1] : 0, end = ends[task.expert];
    int64_t columns = std::min<int64_t>(kPanelColumns, B - task.column);
    for (int64_t k = 0; k < A; k += kPanelDepth) {
      int64_t depth = std::min<int64_t>(kPanelDepth, A - k);
      for (int64_t r = 0; r < depth; ++r) {
        const W* from = w + task.expert * w_expert + (k + r) * w_row + task.column;
        for (int64_t c = 0; c < columns; c += kLanes) {
          float* to = panel + (c / kTile) * kPanelDepth * kTile + r * kTile + c % kTile;
          store(to, c + kLanes <= columns ? load(from + c) : load_some(from + c, columns - c));
        }
      }
      const W* next = w + task.expert * w_expert + (k + kPanelDepth) * w_row + task.column;
      int64_t parts = (end - start + kOuterRows - 1) / kOuterRows;
      for (int64_t s = start; s < end; s += kOuterRows) {
        int64_t count = std::min<int64_t>(kOuterRows, end - s);
        if (parts > 1) prefetch_part(next, kPanelDepth, w_row, columns, (s - start) / kOuterRows, parts);
        const float* rows[kOuterRows];
        for (int64_t m = 0; m < count; ++m) rows[m] = x[s + m] + k;
        for (int64_t c = 0; c < columns; c += kTile) {
          float* out = y + s * B + task.column + c;
          int64_t width = std::min<int64_t>(kTile, columns - c);
          Vec sums[kOuterRows][2] = {};
          if (k) {
            for (int64_t m = 0; m < count; ++m)
              for (int half = 0; half < 2; ++half) {
                int64_t lanes = std::min<int64_t>(kLanes, width - half * kLanes);
                const float* from = out + m * B + half * kLanes;
                if (lanes > 0) sums[m][half] = lanes == kLanes ? load(from) : load_some(from, lanes);
              }
          }
          const float* tile = panel + (c / kTile) * kPanelDepth * kTile;
          outer_tile_of<kOuterRows>(
              count, sums, depth, [&](int64_t r) { return [&rows, r](int i) { return rows[i][r]; }; },
              [&](int64_t r) { return tile + r * kTile; });
          for (int64_t m = 0; m < count; ++m)
            for (int half = 0; half < 2; ++half) {
              int64_t lanes = std::min<int64_t>(kLanes, width - half * kLanes);
              float* to = out + m * B + half * kLanes;
              if (lanes == kLanes) store(to, sums[m][half]);
              else if (lanes > 0) store_some(to, sums[m][half], lanes);
            }
        }
      }
    }
  });
}

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

// e^x to a few units in the last place, for |x| < 87; beyond that as at 87. NaN stays NaN.
inline Vec exponential(Vec x) {
  constexpr float kMost = 87, kShift = 12582912;  // 1.5 * 2^23: adding it leaves the integer in the lowest bits
  x = x > kMost ? broadcast(kMost) : x;
  x = x < -kMost ? broadcast(-kMost) : x;
  Vec shifted = x * 1.44269504f + kShift, whole = shifted - kShift;
  Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec sum = broadcast(1.9875691500e-4f);  // Cephes' expf
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + factor;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * (Vec)(((Words)shifted << 23) + (127u << 23));
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

template <typename F>
void run_rows(int64_t rows, double numbers, int most, F run) {  // about 20 operations a number
#pragma omp parallel for schedule(static) num_threads(threads_for(20 * numbers, most))
  for (int64_t s = 0; s < rows; ++s) run(s);
}

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

extern "C" {

// Whether this processor has the instructions that this file was compiled for.
int hub_moe_is_supported() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// Whether rows may be bfloat16.
int hub_moe_takes_bfloat16_rows() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// y[s] = x[places[s]] times the matrix of the expert of s. `by_rows`: element (a, b) of expert e lies at
// w[e * w_expert + b * w_row + a], else at w[e * w_expert + a * w_row + b]. y is contiguous (S, B). bfloat16 rows only
// beside bfloat16 matrices, by rows, and where hub_moe_takes_bfloat16_rows.
void hub_moe_multiply(const void* x, int is_bfloat16_x, int64_t x_row, const int64_t* places, const void* w,
                      int is_bfloat16, int by_rows, int64_t w_expert, int64_t w_row, const int64_t* ends,
                      int64_t experts, int64_t A, int64_t B, float* y, int threads) {
  Rows<float> rows{(const float*)x, x_row, places};
  auto run = [&](auto* typed) {
    (by_rows ? multiply_by_rows(rows, typed, w_expert, w_row, ends, experts, A, B, y, threads)
             : multiply_by_columns(rows, typed, w_expert, w_row, ends, experts, A, B, y, threads));
  };
#if defined(__AVX512BF16__)
  if (is_bfloat16_x) {
    Rows<bfloat16> narrow{(const bfloat16*)x, x_row, places};
    return multiply_by_rows(narrow, (const bfloat16*)w, w_expert, w_row, ends, experts, A, B, y, threads);
  }
#else
  (void)is_bfloat16_x;
#endif
  is_bfloat16 ? run((const bfloat16*)w) : run((const float*)w);
}

// h is (rows, 2 F): what silu goes to, then what it is multiplied by. a is (rows, F).
void hub_moe_swiglu(const float* h, int64_t rows, int64_t F, void* a, int is_bfloat16, int threads) {
  is_bfloat16 ? swiglu(h, rows, F, (bfloat16*)a, threads) : swiglu(h, rows, F, (float*)a, threads);
}

// From da, the gradient of each row's a before its factor scale[s] (none: 1): a times scale, dh, and a . da.
void hub_moe_swiglu_gradient(const float* h, const float* da, const float* scale, int64_t rows, int64_t F, float* a,
                             float* dh, float* sums, int threads) {
  swiglu_gradient(h, da, scale, rows, F, a, dh, sums, threads);
}

// out[t] = sum over k of weights[t, k] (none: 1) times the row s of y with order[s] = t * top_k + k, if there is one.
void hub_moe_add_up(const float* y, const float* weights, const int64_t* order, int64_t rows, int64_t tokens,
                    int64_t top_k, int64_t D, float* out, int threads) {
  add_up(y, weights, order, rows, tokens, top_k, D, out, threads);
}

// g[e, a, b] = sum over the rows s of e of left[left_places[s], a] * right[right_places[s], b]; g is contiguous.
void hub_moe_stack_gradient(const float* left, int64_t left_row, const int64_t* left_places, const float* right,
                            int64_t right_row, const int64_t* right_places, const int64_t* ends, int64_t experts,
                            int64_t A, int64_t B, void* g, int is_bfloat16, int threads) {
  Rows<float> l{left, left_row, left_places}, r{right, right_row, right_places};
  is_bfloat16 ? gradient_of_stack(l, r, ends, experts, A, B, (bfloat16*)g, threads)
              : gradient_of_stack(l, r, ends, experts, A, B, (float*)g, threads);
}
}
