// What a model computes for a few new tokens, in few calls, in C: products with whole weights, SwiGLU blocks, and
// attention over the latent cache. decoding.py calls and describes it. This file has all others of its folder in it.
//
// What is added up, and in which order, depends on no number of threads. Letters as in the files named below.

#include "cross_entropy.cpp"
#include "products.cpp"

#include "feed_forward.h"
#include "few_rows.h"
#include "latent_attention.h"
#include "latent_projections.h"
#include "layer.h"

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
    if (gate) add_block_of_all(blocks, (const W*)gate, (const W*)up, (const W*)down, F, T);
    if (!add_experts(blocks, expert_TK, weight_TK, T, K, (const W*)gate_up, (const W*)experts_down, E, I, D)) return 1;
    feed_forward((const W*)x, T, D, blocks, typed, threads);
    return 0;
  };
  return is_bfloat16 ? run((bfloat16*)y) : run((float*)y);
}

// sizes: T, D, A, H, N, R, C. See `project`; q_norm and q_b are null where q_a gives the queries themselves, and x_norm
// where the rows are normalised already.
void hub_moe_project(const void* x, const void* const* weights, const float* eps, const int64_t* sizes, const void* cos,
                     const void* sin, int is_bfloat16_rotation, int is_interleaved, int64_t rotation_row, void* query,
                     void* latent, void* key, int is_bfloat16, int threads) {
  Projections p{weights[0], weights[1], weights[2], weights[3], weights[4], weights[5], eps[0], eps[1], eps[2],
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

// The rest of a layer: see `finish_layer`. addresses: x, query, kv_b, latents, keys, mask, o, norm, gate, up, down, router,
// bias, experts_up, experts_down, y. sizes: B, L, H, N, R, C, V, S, D, F, I, E, K, groups, groups kept. strides: as in
// hub_moe_attend. choices: kind of mask, softmax, method, normalised, bfloat16 bias. numbers: scaling, eps, scale. 1 if it cannot be.
int hub_moe_finish_layer(const void* const* addresses, const int64_t* sizes, const int64_t* strides, const int* choices,
                         const float* numbers, int is_bfloat16, int threads) {
  const void* const* a = addresses;
  Heads p{a[2], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  Cache cache{a[3], a[4], strides[0], strides[1], strides[2], strides[3], sizes[7]};
  Mask hides{a[5], choices[0], strides[4], strides[5], strides[6], strides[7]};
  Weights w{a[6], a[7], a[8], a[9], a[10], a[11], a[13], a[14], numbers[1], sizes[8], sizes[9], sizes[10]};
  Routing r{choices[1], choices[2], sizes[11], sizes[12], sizes[13], sizes[14], choices[3], numbers[2], a[12], choices[4]};
  auto run = [&](auto* typed) {
    using W = std::remove_pointer_t<decltype(typed)>;
    return !finish_layer((const W*)a[0], (const W*)a[1], p, cache, hides, numbers[0], w, r, typed, threads);
  };
  return is_bfloat16 ? run((bfloat16*)a[15]) : run((float*)a[15]);
}
}
