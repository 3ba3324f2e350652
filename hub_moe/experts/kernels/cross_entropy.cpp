// The cross-entropy of rows of logits and its gradient, in C; cross_entropy.py calls and describes it.
//
// Logits are float32 or bfloat16, widened as they are read. Each row is summed by one thread, in float32 over a stretch
// and in double over all stretches, so that a large vocabulary costs no precision.
//
// Letters: T rows, V vocabulary.

#include <cmath>

#include "tasks.h"
#include "vectors.h"

namespace {

constexpr int64_t kSummed = 1024;  // numbers of a stretch; whole vectors

template <typename X>
inline Vec get_or_least(const X* p, int64_t count) {  // -infinity behind the last number
  if (count == kLanes) return load(p);
  X padded[kLanes];
  for (X& each : padded) put(&each, -INFINITY);
  std::copy(p, p + count, padded);
  return load(padded);
}

template <typename X>
float largest(const X* x, int64_t V) {  // NaN counts as nothing here, and shows in the sum
  Vec most = broadcast(-INFINITY);
  each_vector(V, [&](int64_t i, auto count) {
    Vec v = get_or_least(x + i, count);
    most = v > most ? v : most;
  });
  float found = most[0];
  for (int i = 1; i < kLanes; ++i) found = std::max(found, most[i]);
  return found;
}

template <typename X>
double sum_of_exponentials(const X* x, int64_t V, float shift) {
  double total = 0;
  for (int64_t start = 0; start < V; start += kSummed) {
    Vec sum = {};
    each_vector(std::min(kSummed, V - start), [&](int64_t i, auto count) {
      sum += exponential_or_zero(get_or_least(x + start + i, count) - shift);
    });
    for (int i = 0; i < kLanes; ++i) total += sum[i];
  }
  return total;
}

struct Normaliser {  // logits less both are logarithms of shares; their sum would be rounded to the size of the largest
  float largest, log_sum;
};

template <typename X>
void token_losses(const X* logits, const int64_t* labels, int64_t ignored, int64_t T, int64_t V, float* losses,
                  Normaliser* normalisers, int threads) {
  run_rows(T, (double)T * V, threads, [=](int64_t t) {
    const X* x = logits + t * V;
    losses[t] = 0;
    normalisers[t] = {};
    if (labels[t] == ignored) return;
    float shift = largest(x, V);
    double log_sum = std::log(sum_of_exponentials(x, V, shift));
    losses[t] = (float)((double)shift - widen(x[labels[t]]) + log_sum);
    normalisers[t] = {shift, (float)log_sum};
  });
}

template <typename X>
void token_losses_gradient(const X* logits, const int64_t* labels, int64_t ignored, const Normaliser* normalisers,
                           const float* scale, int64_t T, int64_t V, X* gradient, int threads) {
  run_rows(T, (double)T * V, threads, [=](int64_t t) {
    const X* x = logits + t * V;
    X* dx = gradient + t * V;
    if (labels[t] == ignored) return (void)std::fill(dx, dx + V, X{});
    Normaliser normaliser = normalisers[t];
    float factor = scale[t];
    auto share = [=](Vec v) { return exponential_or_zero(v - normaliser.largest - normaliser.log_sum); };
    each_vector(V, [=](int64_t i, auto count) { put(dx + i, share(get(x + i, count)) * factor, count); });
    int64_t label = labels[t];
    put(dx + label, (share(broadcast(widen(x[label])))[0] - 1) * factor);
  });
}

}  // namespace

extern "C" {

// losses[t] = log of the sum of the exponentials of row t less the logit of its label; 0 where the label is `ignored`.
// Other labels are in [0, V). normalisers (T, 2) are for the gradient. All is contiguous.
void hub_moe_token_losses(const void* logits, int is_bfloat16, const int64_t* labels, int64_t ignored, int64_t T,
                          int64_t V, float* losses, float* normalisers, int threads) {
  Normaliser* n = (Normaliser*)normalisers;
  is_bfloat16 ? token_losses((const bfloat16*)logits, labels, ignored, T, V, losses, n, threads)
              : token_losses((const float*)logits, labels, ignored, T, V, losses, n, threads);
}

// The gradient of the logits, of their type, of the sum over rows of scale[t] * losses[t].
void hub_moe_token_losses_gradient(const void* logits, int is_bfloat16, const int64_t* labels, int64_t ignored,
                                   const float* normalisers, const float* scale, int64_t T, int64_t V, void* gradient,
                                   int threads) {
  auto run = [&](auto* typed) {
    using X = std::remove_pointer_t<decltype(typed)>;
    token_losses_gradient((const X*)logits, labels, ignored, (const Normaliser*)normalisers, scale, T, V, typed,
                          threads);
  };
  is_bfloat16 ? run((bfloat16*)gradient) : run((float*)gradient);
}
}
