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

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .compiled_products import DTYPES, CompiledProducts
from .decoding_layer import (
    FLOAT,
    INT,
    LONG,
    POINTER,
    FeedForward,
    LayerWeights,
    Norm,
    PreparedLayer,
    PreparedProjections,
    Projections,
    Routed,
    Router,
    lay_out_mask,
)
from .products import VARIABLE, choose_products

__all__ = [
    "DecodingSteps",
    "FeedForward",
    "LayerWeights",
    "Norm",
    "PreparedLayer",
    "PreparedProjections",
    "Projections",
    "Routed",
    "Router",
    "find_steps",
]
INTERFACES = (1, 2)  # of DecodingSteps; code beside a checkpoint asks for the one it was written for


def find_steps(x: Tensor, interface: int) -> "DecodingSteps | None":
    """The steps for rows like `x` (..., D), or None where the plain modules have to compute them.

    There are some for a few rows of a plain float32 or bfloat16 tensor on the CPU, where the compiled products are in
    use (`hub-moe env`), while no gradients of either mode, autocast, compiling, tracing, transform of torch.func or
    dispatch mode want to see the operations.

    Args:
        interface: The version of `DecodingSteps` that the caller knows.

    Raises:
        ConfigError: As `choose_products`.
    """
    if interface not in INTERFACES or torch.is_grad_enabled() or not may_leave_torch(x):
        return None
    steps = _steps_for(os.environ.get(VARIABLE, ""))
    return steps if steps is not None and 0 < x.numel() <= steps.most_rows * x.shape[-1] else None


def may_leave_torch(x: Tensor) -> bool:
    """Whether compiled code may stand for operations on `x`: whether nothing but autograd wants to see them.

    It may for a plain float32 or bfloat16 tensor on the CPU, without forward-mode gradients, autocast, compiling,
    tracing, transforms of torch.func and dispatch modes.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if x.is_neg() or x._is_zerotensor():  # their numbers are not what lies in their memory
        return False
    if torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active():
        return False
    # tangents flow without grad mode, too
    return forward_ad._current_level < 0 and not is_in_torch_dispatch_mode()


class DecodingSteps:
    """Calls into the compiled code; results have the dtype of the rows, and everything between is float32.

    All weights are contiguous and of the dtype of the rows.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.most_rows: int = library.hub_moe_most_rows()
        self._linear, self._rms_norm = library.hub_moe_linear, library.hub_moe_rms_norm
        self._linear.argtypes = [*[POINTER] * 3, INT, INT, *[LONG] * 3, INT]
        self._rms_norm.argtypes = [*[POINTER] * 3, INT, LONG, LONG, FLOAT]
        self._feed_forward = library.hub_moe_feed_forward
        self._feed_forward.argtypes = [
            *(POINTER, POINTER, INT, LONG, LONG),
            *(POINTER, POINTER, POINTER, LONG),
            *(POINTER, POINTER, LONG, LONG, POINTER, POINTER, LONG, INT),
        ]
        self._project, self._attend = library.hub_moe_project, library.hub_moe_attend
        self._project.argtypes = [*[POINTER] * 6, INT, INT, LONG, *[POINTER] * 3, INT, INT]
        self._attend.argtypes = [*[POINTER] * 5, INT, POINTER, POINTER, FLOAT, POINTER, INT, INT]
        for function in (self._linear, self._rms_norm, self._project, self._attend):
            function.restype = None
        self._finish_layer = library.hub_moe_finish_layer
        self._finish_layer.argtypes = [*[POINTER] * 5, INT, INT]

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
        """See `PreparedProjections`."""
        return self.prepare_projections(weights)(x_BLD, rotation)

    def prepare_projections(self, weights: Projections) -> PreparedProjections:
        """`project` with the weights looked up once; good as long as they lie where they are."""
        return PreparedProjections(self._project, weights)

    def prepare_layer(self, weights: LayerWeights) -> PreparedLayer:
        """The part of a layer behind its projections, with the weights looked up once."""
        return PreparedLayer(self._finish_layer, weights)

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
        kind, mask, mask_strides = lay_out_mask(mask, (batch, heads, new, latent_BSC.shape[1]))
        sizes = (batch, new, heads, key_rows, rope_size, latent_BSC.shape[2], value_size, latent_BSC.shape[1])
        self._attend(
            query_BLHX.data_ptr(),
            weight_HXC.data_ptr(),
            latent_BSC.data_ptr(),
            rope_BSR.data_ptr(),
            None if mask is None else mask.data_ptr(),
            kind,
            (LONG * 8)(*sizes),
            (LONG * 8)(*latent_BSC.stride()[:2], *rope_BSR.stride()[:2], *mask_strides),
            scaling,
            y_BLHV.data_ptr(),
            query_BLHX.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return y_BLHV


@cache
def _steps_for(asked: str) -> DecodingSteps | None:
    """Those of the products that HUB_MOE_CPU_EXPERTS stands for."""
    products = choose_products(torch.float32)
    return DecodingSteps(products.library) if isinstance(products, CompiledProducts) else None
