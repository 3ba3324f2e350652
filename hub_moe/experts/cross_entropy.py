"""The cross-entropy of tokens in compiled code: logits are read once for the losses and once for their gradient.

torch's makes a float32 tensor as large as the logits for the losses, fills one with zeros and writes a third for the
gradient, beside float32 copies of 16-bit logits; with a vocabulary of 100,000 these are the largest tensors of a step.
Here the losses keep two numbers a token, and the one large tensor is the gradient.

Used where the compiled products of experts are (`hub-moe env`); HUB_MOE_CPU_EXPERTS=torch has none.

Shape letters: T tokens, V vocabulary.
"""

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .compiled_products import CompiledProducts, SpareMemory
from .decoding import may_leave_torch
from .decoding_layer import INT, LONG, POINTER
from .products import VARIABLE, choose_products

_MEMORY = SpareMemory()  # of gradients of logits


def token_losses(logits_TV: Tensor, label_T: Tensor, *, ignore_index: int) -> Tensor | None:
    """Each token's cross-entropy, float32 (T,), and 0 where the label is `ignore_index`.

    As `torch.nn.functional.cross_entropy(logits_TV.float(), label_T, reduction="none")`, up to rounding.

    Args:
        logits_TV: Float32 or bfloat16. Kept for backward, so before that they must not change in place.
        label_T: int64.
        ignore_index: As in torch.

    Returns:
        None where torch has to compute it, or to say what is wrong: without compiled products, for other devices and
        dtypes, while something wants to see the operations (as for `find_steps`), and for labels of no logit.

    Raises:
        ConfigError: As `choose_products`.
    """
    if not may_leave_torch(logits_TV) or type(label_T) is not Tensor or label_T.dtype is not torch.int64:
        return None
    if logits_TV.dim() != 2 or label_T.shape != logits_TV.shape[:1] or label_T.device != logits_TV.device:
        return None
    kernels = _kernels_for(os.environ.get(VARIABLE, ""))
    if kernels is None or type(ignore_index) is not int or not _have_logits(label_T, logits_TV, ignore_index):
        return None
    function: Any = _TokenLosses
    losses_T: Tensor = function.apply(logits_TV.contiguous(), label_T.contiguous(), ignore_index, kernels)
    return losses_T


def _have_logits(label_T: Tensor, logits_TV: Tensor, ignore_index: int) -> bool:
    """Whether all labels are in the vocabulary or ignored."""
    return bool(((label_T >= 0) & (label_T < logits_TV.shape[1]) | (label_T == ignore_index)).all())


class _Kernels:
    """Calls into the compiled code; all tensors are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._losses, self._gradient = library.hub_moe_token_losses, library.hub_moe_token_losses_gradient
        self._losses.argtypes = [POINTER, INT, POINTER, *[LONG] * 3, POINTER, POINTER, INT]
        self._gradient.argtypes = [POINTER, INT, POINTER, LONG, POINTER, POINTER, LONG, LONG, POINTER, INT]
        self._losses.restype = self._gradient.restype = None

    def losses(self, logits_TV: Tensor, label_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Losses (T,), and for the gradient each row's largest logit and log of its sum, (T, 2); both float32."""
        loss_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
        normaliser_T2 = loss_T.new_empty(logits_TV.shape[0], 2)
        self._losses(
            *(logits_TV.data_ptr(), logits_TV.dtype == torch.bfloat16, label_T.data_ptr(), ignore_index),
            *(*logits_TV.shape, loss_T.data_ptr(), normaliser_T2.data_ptr(), torch.get_num_threads()),
        )
        return loss_T, normaliser_T2

    def gradient(
        self, logits_TV: Tensor, label_T: Tensor, ignore_index: int, normaliser_T2: Tensor, dloss_T: Tensor
    ) -> Tensor:
        """That of the logits, in their dtype; `dloss_T` is float32."""
        gradient_TV = _MEMORY.borrow(logits_TV.shape, logits_TV.dtype)
        self._gradient(
            *(logits_TV.data_ptr(), logits_TV.dtype == torch.bfloat16, label_T.data_ptr(), ignore_index),
            *(normaliser_T2.data_ptr(), dloss_T.data_ptr(), *logits_TV.shape, gradient_TV.data_ptr()),
            torch.get_num_threads(),
        )
        return gradient_TV


@cache
def _kernels_for(asked: str) -> _Kernels | None:
    """Those of the products that HUB_MOE_CPU_EXPERTS stands for."""
    products = choose_products(torch.float32)
    return _Kernels(products.library) if isinstance(products, CompiledProducts) else None


class _TokenLosses(torch.autograd.Function):
    """See `token_losses`."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, label_T: Tensor, ignore_index: int, kernels: _Kernels) -> Tensor:
        loss_T, normaliser_T2 = kernels.losses(logits_TV, label_T, ignore_index)
        ctx.save_for_backward(logits_TV, label_T)
        ctx.ignore_index, ctx.kernels, ctx.normaliser_T2 = ignore_index, kernels, normaliser_T2
        ctx.logits_dtype, ctx.shape = logits_TV.dtype, logits_TV.shape
        return loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, label_T = ctx.saved_tensors
        # a hook on what was saved may give back another kind of tensor, and compiled code takes addresses on trust
        logits_TV = logits_TV.to(ctx.logits_dtype).reshape(ctx.shape).contiguous()
        label_T = label_T.to(torch.int64).reshape(ctx.shape[:1]).contiguous()
        are_plain = may_leave_torch(logits_TV) and type(label_T) is Tensor and may_leave_torch(dloss_T)
        are_plain = are_plain and not torch._C._functorch.is_legacy_batchedtensor(dloss_T)  # is_grads_batched
        # torch, where the gradient is to be differentiated again, and where something wants to see the operations
        if torch.is_grad_enabled() or not are_plain or not _have_logits(label_T, logits_TV, ctx.ignore_index):
            return _gradient_in_torch(logits_TV, label_T, ctx.ignore_index, dloss_T), None, None, None
        given = logits_TV, label_T, ctx.ignore_index, ctx.normaliser_T2, dloss_T.contiguous()
        return ctx.kernels.gradient(*given), None, None, None


def _gradient_in_torch(logits_TV: Tensor, label_T: Tensor, ignore_index: int, dloss_T: Tensor) -> Tensor:
    label_T1, is_ignored_T1 = label_T.unsqueeze(-1), (label_T == ignore_index).unsqueeze(-1)
    share_TV = logits_TV.float().softmax(dim=-1)
    excess_TV = share_TV.scatter_add(1, label_T1.masked_fill(is_ignored_T1, 0), torch.full_like(share_TV[:, :1], -1.0))
    return (excess_TV * dloss_T.unsqueeze(-1)).masked_fill(is_ignored_T1, 0.0).to(logits_TV.dtype)
