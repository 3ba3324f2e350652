"""Multi-head latent attention that reads the latent cache as it lies there: decoding with absorbed weights.

The expanded form makes a key and a value per head of every cached token, at every step. Since a score is
q_nope . (W_uk c) + q_rope . k_rope = (W_uk' q_nope) . c + q_rope . k_rope, and an output is W_uv (sum of p c), the
up-projections can be taken to the few new tokens instead (arXiv:2405.04434 section 2.1.2): same numbers, 1 / 117 of the
arithmetic for one token of DeepSeek-V2-Lite at context 4096, and only latents and rotary keys are read.

Shape letters: B batch, L new tokens, S cached tokens (new ones included), H heads, M = H * L rows of queries;
C latent (kv_lora_rank), N head without rotation, R rotary part, V value of a head, X = N + V.
"""

import importlib.util
import os
import shutil
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .half_products import has_fast_products, is_plain
from .latent_cache import join

# implementations whose masks and results are plain enough to be had from the latents
_IMPLEMENTATIONS = ("sdpa", "eager")
# where absorbed and expanded take as long, measured over counted
_MEASURED_SHARE = 0.75
# float32 copies of 16-bit latents are made in blocks of this many tokens, which stay in the processor's cache
_BLOCK_TOKENS = 1024
_LEAST_CAPABILITY = (8, 0)  # of GPUs, for the kernels of `latent_kernels`


class LatentCache(NamedTuple):
    """What the cache holds of one layer: `latent_BSC`, and the rotated keys `rope_BSR` that all heads share."""

    latent_BSC: Tensor
    rope_BSR: Tensor


def should_absorb(attention: nn.Module, query_BHLX: Tensor, latent_B1SC: Tensor, mask: Tensor | None) -> bool:
    """Whether the absorbed form gives the same result as the expanded one of `attention`, at less cost.

    Counting multiplications per head, absorbed L (C X + S (2 C + R)) and expanded S C X + L S (X + R), the two meet at
    L = C X / (C X / S + 2 C - X), 171 new tokens for DeepSeek-V2 and V3 over a long context. Measured on a CPU with 512
    and 4096 cached they meet at 118 and 128 in float32, 70 and 171 in bfloat16: at about three quarters of it.

    Not absorbed: whole prompts (they come without a mask), other attention implementations than `sdpa` and `eager`,
    dropout, autocast, and a `kv_b_proj` that is more than its weight (adapters, quantisation, sharding, hooks).
    """
    new, cached = query_BHLX.shape[2], latent_B1SC.shape[2]
    sizes: Any = attention  # it keeps what it needs of its config, whose plain reads take ten times as long
    if sizes.config._attn_implementation not in _IMPLEMENTATIONS or (mask is None and new > 1):
        return False
    if mask is not None and not hides_plainly(mask):
        return False
    if (attention.training and sizes.config.attention_dropout) or torch.is_autocast_enabled(query_BHLX.device.type):
        return False
    if latent_B1SC.dtype != query_BHLX.dtype or not is_plain(sizes.kv_b_proj, query_BHLX):
        return False
    return costs_less(attention, new, cached)


def hides_plainly(mask: Tensor) -> bool:
    """Whether a mask is (B, H, L, S), and bool or numbers to add."""
    return mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())


def costs_less(attention: Any, new: int, cached: int) -> bool:
    """Whether the absorbed form of `new` tokens takes less time than the expanded one; see `should_absorb`."""
    width, latent_size = attention.qk_nope_head_dim + attention.v_head_dim, attention.kv_lora_rank
    expansion = latent_size * width
    return bool(new * (expansion + cached * (2 * latent_size - width)) < _MEASURED_SHARE * cached * expansion)


def attend_to_latents(
    query_BHLX: Tensor,
    cache: LatentCache,
    weight_HXC: Tensor,
    *,
    mask: Tensor | None,
    scaling: float,
    needs_weights: bool = False,
    steps: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the new tokens over the latent cache, without expanding it.

    Scores and softmax are float32 (float64 for float64 inputs), and so is what is added up. 16-bit latents are cast in
    blocks where the CPU multiplies them slowly. On an NVIDIA GPU, where gradients are off, Triton's kernels read each
    latent once (see `latent_kernels`). Differentiable in every argument.

    Args:
        query_BHLX: Queries of shape (B, H, L, N + R), the rotated part last.
        cache: Latents and rotated keys, the new tokens' included, in the dtype of the queries.
        weight_HXC: `kv_b_proj.weight` by head: the rows of its keys first, N of them, then V of its values.
        mask: Broadcastable to (B, H, L, S): bool with True for what is seen, or numbers to add. None lets every query
            see everything. A query that sees nothing has output 0 with a bool mask, as in torch's SDPA.
        scaling: Factor of the scores.
        needs_weights: Also return the attention weights.
        steps: Compiled code that does it in one call, where there is any (`DecodingSteps` of hub_moe.experts.decoding).

    Returns:
        Outputs of shape (B, L, H, V), and the weights (B, H, L, S) or None, both in the dtype of the queries.
    """
    if steps is not None and not needs_weights:
        return steps.attend(query_BHLX, cache, weight_HXC, mask=mask, scaling=scaling), None
    heads, new = query_BHLX.shape[1:3]
    rope_size = cache.rope_BSR.shape[-1]
    key_rows = query_BHLX.shape[-1] - rope_size
    dtype = query_BHLX.dtype
    # for these few rows a cast costs less than a 16-bit product on any CPU, and loses nothing
    work = torch.float32 if dtype.itemsize < 4 and query_BHLX.device.type == "cpu" else dtype
    nope_BHLN, rope_BHLR = query_BHLX.split([key_rows, rope_size], dim=-1)
    latent_query_BHLC = _multiply_by_head(nope_BHLN.to(work), weight_HXC[:, :key_rows].to(work))
    weights_BMS = None
    if not needs_weights and _suits_gpu_kernels(cache, dtype):
        context_BHLC = _attend_on_gpu(latent_query_BHLC.to(dtype), rope_BHLR, cache, mask, scaling)
    else:
        query_BMC, query_BMR = latent_query_BHLC.flatten(1, 2), rope_BHLR.flatten(1, 2)
        if mask is not None:
            mask = mask.expand(-1, heads, -1, -1).flatten(1, 2)
        if not needs_weights and _suits_one_kernel(cache.latent_BSC):
            context_BMC = _attend_in_one_kernel(query_BMC, query_BMR, cache, mask, scaling)
        else:
            context_BMC, weights_BMS = _attend_in_products(query_BMC, query_BMR, cache, mask, scaling)
        context_BHLC = context_BMC.unflatten(1, (heads, new))
    value_HCV = weight_HXC[:, key_rows:].to(work).transpose(1, 2)
    output_BLHV = _multiply_by_head(context_BHLC.to(work), value_HCV).transpose(1, 2).to(dtype)
    if not needs_weights or weights_BMS is None:
        return output_BLHV, None
    return output_BLHV, weights_BMS.unflatten(1, (heads, new)).to(dtype)


def _attend_in_products(
    query_BMC: Tensor, query_BMR: Tensor, cache: LatentCache, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sums of latents, (B, M, C), and the weights, (B, M, S)."""
    weights_BMS, sees_BM1 = _softmax(_score(query_BMC, query_BMR, cache) * scaling, mask)
    context_BMC = _add_up(weights_BMS, cache.latent_BSC)
    return context_BMC if sees_BM1 is None else context_BMC * sees_BM1, weights_BMS


def _multiply_by_head(x_BHLA: Tensor, weight_HAB: Tensor) -> Tensor:
    """Each head's rows times its own matrix, (B, H, L, B')."""
    batch, heads, new, width = x_BHLA.shape
    rows = x_BHLA.transpose(0, 1).reshape(heads, batch * new, width)
    product: Tensor = torch.bmm(rows, weight_HAB).unflatten(1, (batch, new))
    return product.transpose(0, 1)


def _suits_gpu_kernels(cache: LatentCache, dtype: torch.dtype) -> bool:
    """Whether the kernels of `latent_kernels` give the same here; they have no gradients."""
    latent_BSC, rope_BSR = cache
    if not latent_BSC.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or latent_BSC.dtype != dtype:
        return False
    if latent_BSC.shape[1] == 0 or not _runs_triton(latent_BSC.device):
        return False
    from .latent_kernels import fits

    return fits(latent_BSC.shape[2], rope_BSR.shape[2])


@lru_cache
def _runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed, finds the C compiler that it starts kernels with, and the GPU is new enough."""
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    has_compiler = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    return bool(has_compiler) and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def _attend_on_gpu(
    query_BHLC: Tensor, rope_BHLR: Tensor, cache: LatentCache, mask: Tensor | None, scaling: float
) -> Tensor:
    """Softmax-weighted sums of latents, (B, H, L, C)."""
    from .latent_kernels import attend_in_splits

    return attend_in_splits(query_BHLC, rope_BHLR, cache, mask=mask, scaling=scaling)


def _suits_one_kernel(latent_BSC: Tensor) -> bool:
    """Whether torch's SDPA with one head is faster than two products and a softmax.

    On a CPU it reads the latents once, and is the one 16-bit product whose scores stay in float32; but one sequence
    keeps only one thread busy. So in float32 (3.2 against 5.5 ms for one token over 8192 on one thread) there must be
    as many sequences as threads, and in 16 bits (3.2 against 5.9 ms) half as many. Its gradients are wrong in rows
    where a mask of numbers hides everything.
    """
    if latent_BSC.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    threads_per_sequence = 1 if latent_BSC.dtype.itemsize >= 4 else 2
    is_spread = torch.get_num_threads() <= latent_BSC.shape[0] * threads_per_sequence
    return is_spread and has_fast_products(latent_BSC.dtype, "cpu")


def _attend_in_one_kernel(
    query_BMC: Tensor, query_BMR: Tensor, cache: LatentCache, mask: Tensor | None, scaling: float
) -> Tensor:
    """Softmax-weighted sums of latents, (B, M, C), by torch's SDPA with one head and keys that are also the values."""
    query = torch.cat((query_BMC.to(query_BMR.dtype), query_BMR), dim=-1).unsqueeze(1)
    key = join(*cache).unsqueeze(1)
    mask = None if mask is None else mask.unsqueeze(1)
    output = nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=scaling)
    return output.squeeze(1)[..., : query_BMC.shape[-1]]


def _score(query_BMC: Tensor, query_BMR: Tensor, cache: LatentCache) -> Tensor:
    """Unscaled scores (B, M, S), float32 or wider."""
    pairs = ((cache.latent_BSC, query_BMC), (cache.rope_BSR, query_BMR))
    if query_BMC.is_cuda and query_BMC.dtype.itemsize < 4 and not torch.is_grad_enabled():
        first, second = (torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32) for k, q in pairs)
        return first + second
    # keys on the left: with few rows of queries MKL is twice as fast this way round
    wide = [(keys, _widen(query).transpose(1, 2)) for keys, query in pairs]
    blocks = [
        torch.matmul(_widen(latent_BsC), wide[0][1]) + torch.matmul(_widen(rope_BsR), wide[1][1])
        for latent_BsC, rope_BsR in zip(_blocks(wide[0][0]), _blocks(wide[1][0]), strict=True)
    ]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)).transpose(1, 2)


def _softmax(scores_BMS: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Attention weights and, with a bool mask, which queries see anything at all (B, M, 1)."""
    lowest = torch.finfo(scores_BMS.dtype).min
    sees_BM1 = None
    if mask is not None and mask.dtype == torch.bool:
        scores_BMS = scores_BMS.masked_fill(~mask, lowest)
        sees_BM1 = mask.any(dim=-1, keepdim=True)
    elif mask is not None:
        # -inf in a whole row would make the softmax NaN
        scores_BMS = scores_BMS + mask.to(scores_BMS.dtype).clamp(min=lowest)
    return torch.softmax(scores_BMS, dim=-1), sees_BM1


def _add_up(weights_BMS: Tensor, latent_BSC: Tensor) -> Tensor:
    """Weighted sums of latents (B, M, C)."""
    if latent_BSC.is_cuda and latent_BSC.dtype.itemsize < 4:
        return torch.bmm(weights_BMS.to(latent_BSC.dtype), latent_BSC)
    blocks = _blocks(latent_BSC)
    parts = weights_BMS.split(blocks[0].shape[1], dim=-1) if len(blocks) > 1 else (weights_BMS,)
    total = torch.bmm(parts[0], _widen(blocks[0]))
    for part_BMs, latent_BsC in zip(parts[1:], blocks[1:], strict=True):
        total = torch.baddbmm(total, part_BMs, _widen(latent_BsC))
    return total


def _blocks(cached_BSA: Tensor) -> tuple[Tensor, ...]:
    """Runs of cached tokens to cast one at a time; all at once where nothing is cast, or a graph is being made."""
    if cached_BSA.dtype.itemsize >= 4 or torch.compiler.is_compiling():
        return (cached_BSA,)
    blocks: tuple[Tensor, ...] = torch.split(cached_BSA, max(64, _BLOCK_TOKENS // cached_BSA.shape[0]), dim=1)
    return blocks


def _widen(x: Tensor) -> Tensor:
    """16-bit numbers as float32, all others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x
