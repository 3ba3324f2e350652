// Vectors of float32, as wide as the processor's, and what goes in and out of them.
//
// bfloat16 is widened as it is read and rounded to nearest, ties to even, as it is written; NaN stays NaN.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

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

struct Pair {  // 2 * kLanes numbers: those at even places, and those at odd ones
  Vec even, odd;
};

// Two bfloat16 lie in one word, and each is widened by one instruction where it lies.
inline Pair load_pair(const bfloat16* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
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

inline Vec broadcast(float x) {  // bit by bit, as it may stand for a pair
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#else
  return x - Vec{};
#endif
}

// Numbers in their order as a pair, and back.
template <int... I>
inline Pair spread(Vec first, Vec second, std::integer_sequence<int, I...>) {
  return {__builtin_shufflevector(first, second, 2 * I...), __builtin_shufflevector(first, second, (2 * I + 1)...)};
}
inline Pair spread(Vec first, Vec second) { return spread(first, second, std::make_integer_sequence<int, kLanes>()); }

template <int... I>
inline void join(Pair pair, Vec& first, Vec& second, std::integer_sequence<int, I...>) {
  first = __builtin_shufflevector(pair.even, pair.odd, (I / 2 + I % 2 * kLanes)...);
  second = __builtin_shufflevector(pair.even, pair.odd, (I / 2 + I % 2 * kLanes + kLanes / 2)...);
}
inline void join(Pair pair, Vec& first, Vec& second) {
  join(pair, first, second, std::make_integer_sequence<int, kLanes>());
}

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

inline float sum_of(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// e^x to 2 units in the last place for |x| < 87; beyond that as at 87. NaN stays NaN.
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

// The same, but 0 below -87, where float32 ends.
inline Vec exponential_or_zero(Vec x) { return (Vec)((Words)exponential(x) & ~(Words)(x < -87.0f)); }

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
