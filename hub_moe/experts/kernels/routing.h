// Which experts a row goes to, and with what weight: route_tokens of hub_moe.modeling.routing, for one row.
//
// Letters: E experts, K of them per row, G groups of experts.

#pragma once

#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

struct Routing {
  int is_softmax;  // else sigmoid
  int method;      // 0: the best scores; 1: and in the best groups only; 2: the same with a bias on the choice
  int64_t E, K, groups, groups_kept;
  int is_normalised;
  float scale;
  const void* bias;  // (E), of method 2
  int is_bfloat16_bias;
};

inline bool is_above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }  // NaN is highest, as in torch

// The places of the `most` highest of `count` numbers. False where it is a matter of taste which those are.
inline bool highest(const float* numbers, int64_t count, int64_t most, int64_t* places) {
  std::vector<char> taken(count, 0);
  for (int64_t k = 0; k <= most; ++k) {  // the last one is the best of the others
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
      if (!taken[i] && (best < 0 || is_above(numbers[i], numbers[best]))) best = i;
    if (k == most) return best < 0 || most == 0 || is_above(numbers[places[k - 1]], numbers[best]);
    if (best < 0) return false;
    taken[best] = 1;
    places[k] = best;
  }
  return true;
}

// Replaces the scores outside the best groups by `dropped`. A group is worth its best `ranked` scores.
inline bool keep_best_groups(float* scores, const Routing& r, int64_t ranked, float dropped) {
  if (r.groups_kept == r.groups) return true;
  int64_t size = r.E / r.groups;
  std::vector<float> worth(r.groups, 0);
  std::vector<int64_t> places(std::max(ranked, r.groups_kept));
  for (int64_t g = 0; g < r.groups; ++g) {
    highest(scores + g * size, size, ranked, places.data());  // which of equals is added makes no difference
    for (int64_t i = 0; i < ranked; ++i) worth[g] += scores[g * size + places[i]];
  }
  bool is_clear = highest(worth.data(), r.groups, r.groups_kept, places.data());
  std::vector<char> is_kept(r.groups, 0);
  for (int64_t i = 0; i < r.groups_kept; ++i) is_kept[places[i]] = 1;
  for (int64_t g = 0; g < r.groups; ++g)
    if (!is_kept[g]) std::fill(scores + g * size, scores + (g + 1) * size, dropped);
  return is_clear;
}

// From the logits (E) of a row, which become its scores: its experts (K) and their weights (K). False where several
// choices are as good: which of them torch takes is its own affair. A group has at least as many experts as are ranked.
inline bool route(float* logits, const Routing& r, int64_t* experts, float* weights) {
  float *scores = logits, most = -INFINITY, total = 0;
  bool is_clear = true;
  if (r.is_softmax) {
    for (int64_t e = 0; e < r.E; ++e) most = std::max(most, scores[e]);
    for (int64_t e = 0; e < r.E; ++e) total += scores[e] = std::exp(scores[e] - most);
    for (int64_t e = 0; e < r.E; ++e) scores[e] /= total;
  } else {
    for (int64_t e = 0; e < r.E; ++e) scores[e] = 1 / (1 + std::exp(-scores[e]));
  }
  if (r.method == 2) {
    std::vector<float> choice(r.E);
    for (int64_t e = 0; e < r.E; ++e)
      choice[e] = scores[e] + (r.is_bfloat16_bias ? widen(((const bfloat16*)r.bias)[e]) : ((const float*)r.bias)[e]);
    is_clear = keep_best_groups(choice.data(), r, 2, -INFINITY);
    is_clear = highest(choice.data(), r.E, r.K, experts) && is_clear;
  } else {
    if (r.method == 1) is_clear = keep_best_groups(scores, r, 1, 0);
    is_clear = highest(scores, r.E, r.K, experts) && is_clear;
  }
  float sum = 0;
  for (int64_t k = 0; k < r.K; ++k) sum += weights[k] = scores[experts[k]];
  float factor = r.is_normalised ? 1 / (sum + 1e-20f) : 1;
  if (!(r.is_normalised && r.is_softmax)) factor *= r.scale;
  for (int64_t k = 0; k < r.K; ++k) weights[k] *= factor;
  return is_clear;
}

}  // namespace
