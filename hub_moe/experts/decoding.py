"""What a model computes for a few new tokens, in few compiled calls: the code of `kernels`.

One token's arithmetic takes far less time than reading its weights, so what counts is that each weight is read once at
the speed of the memory, and that little happens between two calls. torch's products with one row, in bfloat16 above
all, reach a third of that speed, and its norms and rotations are a dozen calls each. These steps stand beside the plain
modules of `hub_moe.modeling`, which compute the same where `find_steps` has none, and which tests compare them with.

They are built with the compiled products of experts, and used where those are: HUB_MOE_CPU_EXPERTS=torch has neither.

Shape letters: T rows (B sequences of L new tokens), S cached tokens, D hidden, F inner, E experts, K experts per token,
H heads, N part of a head without rotation, R rotary part, X = N + R, C latent, V value.
"""

import ctypes
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .compiled_products import DTYPES, CompiledProducts
from .products import VARIABLE, choose_products

INTERFACE = 1  # of DecodingSteps; code beside a checkpoint asks for the one it was written for
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


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


def find_steps(x: Tensor, interface: int) -> "DecodingSteps | None":
    """The steps for rows like `x` (..., D), or None where the plain modules have to compute them.

    There are some for a few rows of a plain float32 or bfloat16 tensor on the CPU, where the compiled products are in
    use (`hub-moe env`), while no gradients, autocast, compiling, tracing, transform of torch.func or dispatch mode want
    to see the operations.

    Args:
        interface: The version of `DecodingSteps` that the caller knows.

    Raises:
        ConfigError: As `choose_products`.
    """
    if interface != INTERFACE or type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in DTYPES:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return None
    steps = _steps_for(os.environ.get(VARIABLE, ""))
    if steps is None or is_in_torch_dispatch_mode():
        return None
    return steps if 0 < x.numel() <= steps.most_rows * x.shape[-1] else None


class DecodingSteps:
    """Calls into the compiled code; results have the dtype of the rows, and everything between is float32.

    All weights are contiguous and of the dtype of the rows.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.most_rows: int = library.hub_moe_most_rows()
        self._linear, self._rms_norm = library.hub_moe_linear, library.hub_moe_rms_norm
        self._linear.argtypes = [*[_POINTER] * 3, _INT, _INT, *[_LONG] * 3, _INT]
        self._rms_norm.argtypes = [*[_POINTER] * 3, _INT, _LONG, _LONG, _FLOAT]
        self._feed_forward = library.hub_moe_feed_forward
        self._feed_forward.argtypes = [
            *(_POINTER, _POINTER, _INT, _LONG, _LONG),
            *(_POINTER, _POINTER, _POINTER, _LONG),
            *(_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _INT),
        ]
        self._project, self._attend = library.hub_moe_project, library.hub_moe_attend
        self._project.argtypes = [*[_POINTER] * 6, _INT, _INT, _LONG, *[_POINTER] * 3, _INT, _INT]
        self._attend.argtypes = [*[_POINTER] * 5, _INT, _POINTER, _POINTER, _FLOAT, _POINTER, _INT, _INT]
        for function in (self._linear, self._rms_norm, self._project, self._attend):
            function.restype = None

    def linear(self, x: Tensor, weight_BA: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `torch.nn.functional.linear`: (..., A) to (..., B), in the dtype of `x` or, if asked for, in float32."""
        x = x.contiguous()
        width_out, width_in = weight_BA.shape
        y = x.new_empty(*x.shape[:-1], width_out, dtype=dtype)
        self._linear(
            x.data_ptr(),
            weight_BA.data_ptr(),
            y.data_ptr(),
            x.dtype == torch.bfloat16,
            y.dtype == torch.bfloat16,
            x.numel() // width_in,
            width_in,
            width_out,
            torch.get_num_threads(),
        )
        return y

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Rows (..., D) over the root of their mean square, times the weight."""
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        is_bfloat16 = x.dtype == torch.bfloat16
        self._rms_norm(
            x.data_ptr(), norm.weight.data_ptr(), y.data_ptr(), is_bfloat16, x.numel() // width, width, norm.eps
        )
        return y

    def feed_forward(self, x: Tensor, shared: FeedForward | None, routed: Routed | None = None) -> Tensor | None:
        """The sum of a block that gets every row and of the routed experts, (..., D) like `x`.

        None for an expert id that no expert has, and for an expert that is chosen more than `most_rows` times.
        """
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        dense = [each.data_ptr() for each in shared] + [shared.gate.shape[0]] if shared else [None, None, None, 0]
        experts: list[int | None] = [None, None, 0, 0, None, None, 0]
        if routed is not None:
            expert_TK, weight_TK = routed.expert_TK.contiguous(), routed.weight_TK.float().contiguous()
            experts = [
                *(routed.gate_up.data_ptr(), routed.down.data_ptr(), routed.down.shape[0], routed.down.shape[2]),
                *(expert_TK.data_ptr(), weight_TK.data_ptr(), expert_TK.shape[1]),
            ]
        failed = self._feed_forward(
            x.data_ptr(),
            y.data_ptr(),
            x.dtype == torch.bfloat16,
            x.numel() // width,
            width,
            *dense,
            *experts,
            torch.get_num_threads(),
        )
        return None if failed else y

    def project(
        self, x_BLD: Tensor, weights: Projections, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, X), latents (B, 1, L, C) and keys (B, 1, L, R) of new tokens, normed and rotated.

        Args:
            x_BLD: Hidden states.
            weights: See `Projections`.
            rotation: Cosines and sines, each (B or 1, L, R), float32 or bfloat16.
        """
        x_BLD = x_BLD.contiguous()
        batch, new, width = x_BLD.shape
        head_size, rope_size = sum(weights.head_sizes), weights.head_sizes[1]
        q_last = weights.q_a if weights.q_b is None else weights.q_b
        heads, latent_size = q_last.shape[0] // head_size, weights.kv_a.shape[0] - rope_size
        cos, sin = (part.expand(batch, -1, -1).contiguous() for part in rotation)
        query_BLHX = x_BLD.new_empty(batch, new, heads, head_size)
        # side by side, as LatentLayer keeps them
        both = x_BLD.new_empty(batch, 1, new, latent_size + rope_size)
        latent, key = both[..., :latent_size], both[..., latent_size:]
        q_norm, q_b = weights.q_norm, weights.q_b
        tensors = (weights.q_a, q_norm and q_norm.weight, q_b, weights.kv_a, weights.kv_norm.weight)
        addresses = (_POINTER * 5)(*[None if each is None else each.data_ptr() for each in tensors])
        sizes = (batch * new, width, weights.q_a.shape[0], heads, weights.head_sizes[0], rope_size, latent_size)
        self._project(
            x_BLD.data_ptr(),
            addresses,
            (_FLOAT * 2)(q_norm.eps if q_norm else 0.0, weights.kv_norm.eps),
            (_LONG * 7)(*sizes),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.dtype == torch.bfloat16,
            weights.is_interleaved,
            rope_size,
            query_BLHX.data_ptr(),
            latent.data_ptr(),
            key.data_ptr(),
            x_BLD.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return query_BLHX.transpose(1, 2), latent, key

    def attend(
        self,
        query_BHLX: Tensor,
        cache: tuple[Tensor, Tensor],
        weight_HXC: Tensor,
        *,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """See `hub_moe.modeling.absorbed_attention.attend_to_latents`: outputs (B, L, H, V).

        The cache is read once, in runs of tokens that threads share, with a running softmax (arXiv:2205.14135).

        Args:
            cache: Latents (B, S, C) and rotated keys (B, S, R), whose rows are contiguous.
        """
        latent_BSC, rope_BSR = cache
        batch, heads, new, head_size = query_BHLX.shape
        rope_size = rope_BSR.shape[-1]
        key_rows = head_size - rope_size
        value_size = weight_HXC.shape[1] - key_rows
        query_BLHX = query_BHLX.transpose(1, 2).contiguous()
        y_BLHV = query_BLHX.new_empty(batch, new, heads, value_size)
        kind, mask_strides = 0, [0] * 4
        if mask is not None:
            if mask.dtype not in _MASK_KINDS:
                mask = mask.float()
            kind = _MASK_KINDS[mask.dtype]
            mask = mask.expand(batch, heads, new, latent_BSC.shape[1])
            mask_strides = list(mask.stride())
        sizes = (batch, new, heads, key_rows, rope_size, latent_BSC.shape[2], value_size, latent_BSC.shape[1])
        self._attend(
            query_BLHX.data_ptr(),
            weight_HXC.data_ptr(),
            latent_BSC.data_ptr(),
            rope_BSR.data_ptr(),
            None if mask is None else mask.data_ptr(),
            kind,
            (_LONG * 8)(*sizes),
            (_LONG * 8)(*latent_BSC.stride()[:2], *rope_BSR.stride()[:2], *mask_strides),
            scaling,
            y_BLHV.data_ptr(),
            query_BLHX.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return y_BLHV


_MASK_KINDS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}


@cache
def _steps_for(asked: str) -> DecodingSteps | None:
    """Those of the products that HUB_MOE_CPU_EXPERTS stands for."""
    products = choose_products(torch.float32)
    return DecodingSteps(products.library) if isinstance(products, CompiledProducts) else None
