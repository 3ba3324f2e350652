"""Attention of whole sequences on a CPU, in training and for prompts: only the half of it that a causal mask leaves.

torch's fused kernel for CPUs wants keys and values of one width, which latent attention does not have; what it falls
back to multiplies every token with every other, masks, and keeps all of it. Here blocks of queries meet only the keys
up to their own end. 512 tokens, 8 heads, widths 96 and 64, two AVX-512 cores: 10.8 ms forward and backward instead of
17.6; 2048 tokens: 140 instead of 444.

Shape letters: B batch, H heads, M = B * H, L sequence, l queries of a block, X width of queries and keys, V of values.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .half_products import runs_as_written

_BLOCK_TOKENS = 128  # fewer make small products, more compute what is masked; 64 and 256 take 2 and 10 % longer
# arguments of transformers' attention functions under which a sequence is not just causal
_DIFFERENT = ("position_bias", "cache", "softcap", "sliding_window", "output_attentions")


def suits_blocks(
    attention: nn.Module, query_BHLX: Tensor, key_BHLX: Tensor, mask: Tensor | None, given: Mapping[str, Any]
) -> bool:
    """Whether `attend_to_past` gives what transformers' `sdpa` would, in less time.

    It does for a whole sequence without a mask and without dropout, on a CPU, if it is longer than one block.
    """
    config: Any = attention.config
    is_causal = given.get("is_causal")  # which transformers lets say otherwise than the module
    is_causal = attention.is_causal if is_causal is None else is_causal
    is_plain = mask is None and is_causal and not any(given.get(name) for name in _DIFFERENT)
    if config._attn_implementation != "sdpa" or query_BHLX.device.type != "cpu" or not is_plain:
        return False
    if attention.training and config.attention_dropout:
        return False
    if not runs_as_written("cpu"):
        return False
    return query_BHLX.shape[:3] == key_BHLX.shape[:3] and query_BHLX.shape[2] > _BLOCK_TOKENS


def attend_to_past(query_BHLX: Tensor, key_BHLX: Tensor, value_BHLV: Tensor, *, scaling: float) -> Tensor:
    """Causal attention of a sequence to itself, (B, H, L, V) in the dtype of the queries, any strides.

    Products and softmax are float32 (float64 for float64 inputs). Differentiable once. The attention weights are kept
    for backward in that precision, half of what unmasked ones would take.
    """
    function: Any = _CausalAttention
    output: Tensor = function.apply(query_BHLX, key_BHLX, value_BHLV, scaling)
    return output


class _CausalAttention(torch.autograd.Function):
    """See `attend_to_past`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query_MLX, key_MLX, value_MLV = map(_flatten, (query, key, value))
        query_MLX = query_MLX * scaling
        output_MLV = torch.empty_like(value_MLV, memory_format=torch.contiguous_format)
        hidden_ll = query_MLX.new_full((_BLOCK_TOKENS, _BLOCK_TOKENS), float("-inf")).triu_(1)
        kept = []
        for start, end in _blocks(query_MLX.shape[1]):
            scores_MlL = torch.bmm(query_MLX[:, start:end], key_MLX[:, :end].mT)
            scores_MlL[:, :, start:] += hidden_ll[: end - start, : end - start]
            weights_MlL = torch.softmax(scores_MlL, dim=-1)
            torch.bmm(weights_MlL, value_MLV[:, :end], out=output_MLV[:, start:end])
            if any(ctx.needs_input_grad):  # a long prompt's take far more memory than all else here
                kept.append(weights_MlL)
        ctx.save_for_backward(query, key, value, output_MLV, *kept)
        ctx.scaling = scaling
        return output_MLV.to(query.dtype).view(*query.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output_MLV, *kept = ctx.saved_tensors
        query_MLX, key_MLX, value_MLV, doutput_MLV = map(_flatten, (query, key, value, doutput))
        query_MLX = query_MLX * ctx.scaling
        dquery_MLX = torch.empty_like(query_MLX, memory_format=torch.contiguous_format)
        dkey_MLX, dvalue_MLV = map(_zeros_like, (key_MLX, value_MLV))
        # of softmax: dscore = weight * (dweight - sum over keys of weight * dweight), and that sum is output . doutput
        shared_ML1 = (output_MLV * doutput_MLV).sum(dim=-1, keepdim=True)
        for (start, end), weights_MlL in zip(_blocks(query_MLX.shape[1]), kept, strict=True):
            doutput_MlV = doutput_MLV[:, start:end]
            dvalue_MLV[:, :end].baddbmm_(weights_MlL.mT, doutput_MlV)
            dscores_MlL = torch.bmm(doutput_MlV, value_MLV[:, :end].mT)
            dscores_MlL.sub_(shared_ML1[:, start:end]).mul_(weights_MlL)
            torch.bmm(dscores_MlL, key_MLX[:, :end], out=dquery_MLX[:, start:end])
            dkey_MLX[:, :end].baddbmm_(dscores_MlL.mT, query_MLX[:, start:end])
        gradients = ((query, dquery_MLX.mul_(ctx.scaling)), (key, dkey_MLX), (value, dvalue_MLV))
        return *(gradient.to(like.dtype).view(like.shape) for like, gradient in gradients), None


def _flatten(x: Tensor) -> Tensor:
    """(B, H, L, anything) as (M, L, anything), float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where each block of queries starts and ends."""
    return ((start, min(start + _BLOCK_TOKENS, length)) for start in range(0, length, _BLOCK_TOKENS))
