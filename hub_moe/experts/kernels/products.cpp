// Products of rows sorted by expert with their experts' matrices, in C; compiled_products.py builds and describes it.
//
// Rows are float32; matrices float32 or bfloat16, widened as they are read; all sums are float32. Where the processor
// multiplies pairs of bfloat16 itself, rows may be bfloat16 beside a bfloat16 matrix whose rows are outputs. Nothing is
// allocated but one panel per thread, and no matrix is copied as a whole. Work is cut into tasks of one expert and some
// columns; what a task adds up, and in which order, depends on no other.
//
// Letters: S rows, E experts, A what goes into a product, B what comes out.

#include "gradients.h"
#include "matrices.h"
#include "swiglu.h"

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
