"""The compiled steps of a whole decoder layer, with its weights looked up once, and what weights they take.

A layer is two calls, as the cache of its latents stands between them. What a call needs of the weights, their addresses
and sizes, is put down when a step is prepared; whoever keeps one sees to it that the weights still lie there.

Shape letters as in `decoding`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}
_TOPK_METHODS = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}


class FeedForward(NamedTuple):
    """Weights of one SwiGLU block: `gate` and `up` (F, D), `down` (D, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Routed(NamedTuple):
    """Routed SwiGLU experts, `gate_up` (E, 2F, D) and `down` (E, D, F), and what each row gets of them."""

    gate_up: Tensor
    down: Tensor
    expert_TK: Tensor  # int64
    weight_TK: Tensor


class Norm(NamedTuple):
    """An RMS norm."""

    weight: Tensor
    eps: float


class Projections(NamedTuple):
    """Weights in front of latent attention; `q_norm` and `q_b` are None where `q_a` gives the queries themselves."""

    q_a: Tensor
    q_norm: Norm | None
    q_b: Tensor | None
    kv_a: Tensor  # (C + R, D)
    kv_norm: Norm
    head_sizes: tuple[int, int]  # N, R
    is_interleaved: bool  # how rotary parts lie, as `rope_interleave` says
    x_norm: Norm | None = None  # of the hidden states, which otherwise are normalised already


class Router(NamedTuple):
    """What chooses experts; the fields of a HubMoeConfig that `route_tokens` of hub_moe.modeling reads."""

    weight: Tensor  # (E, D)
    bias: Tensor | None  # (E,), float32 or bfloat16
    scoring_func: str
    topk_method: str
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


class LayerWeights(NamedTuple):
    """A layer behind its projections; `shared` is the block of a dense layer, or what all rows get beside experts."""

    kv_b: Tensor  # (H (N + V), C)
    output: Tensor  # (D, H V)
    norm: Norm
    shared: FeedForward | None
    router: Router | None = None
    experts: tuple[Tensor, Tensor] | None = None  # gate_up (E, 2F, D) and down (E, D, F)


class PreparedProjections:
    """From hidden states (B, L, D) to queries (B, H, L, X), latents (B, 1, L, C) and keys (B, 1, L, R).

    Latents are normed, and queries and keys rotated; latents and keys lie side by side, as LatentLayer keeps them.
    """

    def __init__(self, function: Any, weights: Projections) -> None:
        self._function = function
        q_norm, kv_norm, x_norm = weights.q_norm, weights.kv_norm, weights.x_norm
        self._addresses = _addresses(
            *(weights.q_a, q_norm and q_norm.weight, weights.q_b),
            *(weights.kv_a, kv_norm.weight, x_norm and x_norm.weight),
        )
        self._eps = (FLOAT * 3)(*[each.eps if each else 0.0 for each in (q_norm, kv_norm, x_norm)])
        self._is_interleaved, (key_rows, self._rope_size) = weights.is_interleaved, weights.head_sizes
        q_last = weights.q_a if weights.q_b is None else weights.q_b
        self._head_size, self._latent_size = sum(weights.head_sizes), weights.kv_a.shape[0] - self._rope_size
        self._heads = q_last.shape[0] // self._head_size
        self._sizes = weights.q_a.shape[0], self._heads, key_rows, self._rope_size, self._latent_size

    def __call__(self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Project.

        Args:
            x_BLD: Hidden states; with `Projections.x_norm`, in front of their norm.
            rotation: Cosines and sines, each (B or 1, L, R), float32 or bfloat16.
        """
        x_BLD = x_BLD.contiguous()
        batch, new, width = x_BLD.shape
        shape = (batch, new, self._rope_size)
        cos, sin = (part if part.shape == shape else part.expand(shape) for part in rotation)
        cos, sin = cos.contiguous(), sin.contiguous()
        query_BLHX = x_BLD.new_empty((batch, new, self._heads, self._head_size))
        both = x_BLD.new_empty((batch, 1, new, self._latent_size + self._rope_size))
        latent, key = both.split_with_sizes((self._latent_size, self._rope_size), -1)
        self._function(
            x_BLD.data_ptr(),
            self._addresses,
            self._eps,
            (LONG * 7)(batch * new, width, *self._sizes),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.dtype == torch.bfloat16,
            self._is_interleaved,
            self._rope_size,
            query_BLHX.data_ptr(),
            latent.data_ptr(),
            key.data_ptr(),
            x_BLD.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return query_BLHX.transpose(1, 2), latent, key


class PreparedLayer:
    """A layer behind its projections: h + feed forward of the norm of h, where h = x + attention."""

    def __init__(self, function: Any, weights: LayerWeights) -> None:
        self._function = function
        router, block = weights.router, weights.shared
        gate_up, down = weights.experts or (None, None)
        inner, expert_inner = block.gate.shape[0] if block else 0, 0 if down is None else down.shape[2]
        self._weights = list(
            _addresses(
                *(weights.output, weights.norm.weight, *(block or (None,) * 3)),
                *(router and router.weight, router and router.bias, gate_up, down),
            )
        )
        self._kv_b, self._kv_rows = weights.kv_b.data_ptr(), weights.kv_b.shape[0]
        routing, self._choices, scale = _lay_out_routing(router)
        self._sizes = inner, expert_inner, *routing
        self._numbers = weights.norm.eps, scale

    def __call__(
        self,
        x_BLD: Tensor,
        query_BHLX: Tensor,
        cache: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor | None:
        """The layer's output, (B, L, D); None where several experts are equally good for a row, also as all are NaN.

        Args:
            x_BLD: What went into the layer.
            query_BHLX: Queries, as `project` gives them.
            cache: As in `attend`.
            mask: As in `attend`.
            scaling: Of the scores.
        """
        latent_BSC, rope_BSR = cache
        x_BLD, query_BLHX = x_BLD.contiguous(), query_BHLX.transpose(1, 2).contiguous()
        batch, new, heads, head_size = query_BLHX.shape
        cached, latent_size, rope_size = latent_BSC.shape[1], latent_BSC.shape[2], rope_BSR.shape[2]
        key_rows = head_size - rope_size
        value_size = self._kv_rows // heads - key_rows
        kind, mask, mask_strides = lay_out_mask(mask, (batch, heads, new, cached))
        y_BLD = torch.empty_like(x_BLD)
        failed = self._function(
            (POINTER * 16)(
                *(x_BLD.data_ptr(), query_BLHX.data_ptr(), self._kv_b, latent_BSC.data_ptr(), rope_BSR.data_ptr()),
                *(None if mask is None else mask.data_ptr(), *self._weights, y_BLD.data_ptr()),
            ),
            (LONG * 15)(
                *(batch, new, heads, key_rows, rope_size, latent_size, value_size, cached),
                *(x_BLD.shape[2], *self._sizes),
            ),
            (LONG * 8)(*latent_BSC.stride()[:2], *rope_BSR.stride()[:2], *mask_strides),
            (INT * 5)(kind, *self._choices),
            (FLOAT * 3)(scaling, *self._numbers),
            x_BLD.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return None if failed else y_BLD


def _addresses(*tensors: Tensor | None) -> Any:
    return (POINTER * len(tensors))(*[None if each is None else each.data_ptr() for each in tensors])


def lay_out_mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, Tensor | None, Sequence[int]]:
    """Of which kind a mask is, a mask of that kind and of `shape`, and its strides."""
    if mask is None:
        return 0, None, (0, 0, 0, 0)
    if mask.dtype not in _MASK_KINDS:
        mask = mask.float()
    mask = mask.expand(shape)
    return _MASK_KINDS[mask.dtype], mask, mask.stride()


def _lay_out_routing(router: Router | None) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """E, K, groups and groups kept; softmax, method, normalised and bfloat16 bias; the scale of weights."""
    if router is None:
        return (0, 0, 1, 1), (0, 0, 0, 0), 1.0
    is_softmax = router.scoring_func == "softmax"
    top_k = router.num_experts_per_tok
    is_normalised = router.norm_topk_prob and (not is_softmax or top_k > 1)
    sizes = router.weight.shape[0], top_k, router.n_group or 1, router.topk_group or 1
    has_narrow_bias = router.bias is not None and router.bias.dtype == torch.bfloat16
    choices = is_softmax, _TOPK_METHODS[router.topk_method], is_normalised, has_narrow_bias
    return sizes, choices, router.routed_scaling_factor
