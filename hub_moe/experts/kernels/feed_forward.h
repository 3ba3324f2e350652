// SwiGLU blocks of a few rows: some that all rows pass, and experts that some do.
//
// Letters: T rows, D hidden, F inner of an expert, E experts, K of them per row.

#pragma once

#include "few_rows.h"

namespace {

constexpr int64_t kBlockRows = 32;  // rows of a block's weight in one task

template <typename W>
struct Block {  // one SwiGLU block and the rows it gets
  const W *gate, *up, *down;
  int64_t inner, count = 0;
  int64_t token[kMostRows] = {};
  float weight[kMostRows] = {};
  int64_t pair[kMostRows] = {};  // which of all tokens' experts it is, one behind the other
  bool is_routed = false;
  int64_t place = 0;  // of its activations
};

// y[t] = sum over the blocks of weight * down(silu(gate x[t]) * up x[t]), and plus[t] unless that is null. Experts are added
// up in the order in which the token chose them.
template <typename W>
void feed_forward(const W* x, int64_t T, int64_t D, std::vector<Block<W>>& blocks, W* y, int threads,
                  const W* plus = nullptr) {
  using X = RowOf<W>;
  struct Part {
    Block<W>* block;
    int64_t first, last;
  };
  std::vector<Part> parts;
  int64_t size = 0, pairs = 0;
  double operations = 0;
  for (auto& block : blocks) {
    block.place = size;
    if (block.is_routed) pairs += block.count;
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
          Vec a = g * sigmoid(g) * load(&up[m][f]);
          X* to = inner + block->place + m * block->inner + first + f;
          put(to, a, std::min<int64_t>(kLanes, last - first - f));
        }
    });
    share(D, std::min<int64_t>(kBlockRows, step_for(D, threads)), [&](int64_t first, int64_t last) {
      float sums[kMostRows][kBlockRows] = {};
      struct Term {
        int64_t token;
        float weight, number[kBlockRows];
      };
      thread_local std::vector<Term> terms;
      terms.resize(pairs);
      for (int64_t t = 0; plus && t < T; ++t)
        for (int64_t n = first; n < last; ++n) sums[t][n - first] = widen(plus[t * D + n]);
      for (const auto& block : blocks) {
        RowList<X> mine(inner + block.place, block.inner, block.count);
        for (int64_t m = 0; block.is_routed && m < block.count; ++m)
          terms[block.pair[m]].token = block.token[m], terms[block.pair[m]].weight = block.weight[m];
        dots(mine.rows, block.count, block.down, block.inner, first, last, block.inner,
             [&](int64_t m, int64_t n, float sum) {
               if (block.is_routed)
                 terms[block.pair[m]].number[n - first] = sum;
               else
                 sums[block.token[m]][n - first] += block.weight[m] * sum;
             });
      }
      for (const Term& term : terms)
        for (int64_t i = 0; i < last - first; ++i) sums[term.token][i] += term.weight * term.number[i];
      for (int64_t t = 0; t < T; ++t)
        for (int64_t n = first; n < last; ++n) put(y + t * D + n, sums[t][n - first]);
    });
  }
}

// A block that gets every row.
template <typename W>
void add_block_of_all(std::vector<Block<W>>& blocks, const W* gate, const W* up, const W* down, int64_t F, int64_t T) {
  Block<W> all{gate, up, down, F};
  for (; all.count < T; ++all.count) all.token[all.count] = all.count, all.weight[all.count] = 1;
  blocks.push_back(all);
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
    block.pair[block.count] = i;
    block.is_routed = true;
    block.weight[block.count++] = weight_TK[i];
  }
  return true;
}

}  // namespace
