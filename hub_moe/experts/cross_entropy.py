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

from .compiled_products import CompiledProducts, borrow_memory
from .decoding import may_leave_torch
from .decoding_layer import INT, LONG, POINTER
from .products import VARIABLE, choose_products


def token_losses(logits_TV: Tensor, label_T: Tensor, *, ignore_index: int) -> Tensor | None:
    """Each token's cross-entropy, float32 (T,), and 0 where the label is `ignore_index`.

    As `torch.nn.functional.cross_entropy(logits_TV.float(), label_T, reduction="none")`, up to rounding.

    Args:
        logits_TV: Float32 or bfloat16.
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
    has_logit_T = (label_T >= 0) & (label_T < logits_TV.shape[1]) | (label_T == ignore_index)
    if kernels is None or not has_logit_T.all():
        return None
    function: Any = _TokenLosses
    losses_T: Tensor = function.apply(logits_TV.contiguous(), label_T.contiguous(), ignore_index, kernels)
    return losses_T


class _Kernels:
    """Calls into the compiled code; all tensors are contiguous."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._losses, self._gradient = library.hub_moe_token_losses, library.hub_moe_token_losses_gradient
        self._losses.argtypes = [POINTER, INT, POINTER, *[LONG] * 3, POINTER, POINTER, INT]
        self._gradient.argtypes = [POINTER, INT, POINTER, LONG, POINTER, POINTER, LONG, LONG, POINTER, INT]
        self._losses.restype = self._gradient.restype = None

    def losses(self, logits_TV: Tensor, label_T: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Losses (T,), and for the gradient each row's largest logit and log of its sum, (T, 2); both float32."""
        loss_T = torch.empty(logits_TV.shape[0])
        norm_T2 = torch.empty(logits_TV.shape[0], 2)
        self._losses(
            *(logits_TV.data_ptr(), logits_TV.dtype == torch.bfloat16, label_T.data_ptr(), ignore_index),
            *(*logits_TV.shape, loss_T.data_ptr(), norm_T2.data_ptr(), torch.get_num_threads()),
        )
        return loss_T, norm_T2

    def gradient(
        self, logits_TV: Tensor, label_T: Tensor, ignore_index: int, norm_T2: Tensor, dloss_T: Tensor
    ) -> Tensor:
        """That of the logits, in their dtype; `dloss_T` is float32."""
        gradient_TV = borrow_memory(logits_TV.shape, logits_TV.dtype)
        self._gradient(
            *(logits_TV.data_ptr(), logits_TV.dtype == torch.bfloat16, label_T.data_ptr(), ignore_index),
            *(norm_T2.data_ptr(), dloss_T.data_ptr(), *logits_TV.shape, gradient_TV.data_ptr()),
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
        loss_T, norm_T2 = kernels.losses(logits_TV, label_T, ignore_index)
        ctx.save_for_backward(logits_TV, label_T, norm_T2)
        ctx.ignore_index, ctx.kernels = ignore_index, kernels
        return loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, label_T, norm_T2 = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return _gradient_in_torch(logits_TV, label_T, ctx.ignore_index, dloss_T), None, None, None
        dloss_T = dloss_T.float().contiguous()
        return ctx.kernels.gradient(logits_TV, label_T, ctx.ignore_index, norm_T2, dloss_T), None, None, None


def _gradient_in_torch(logits_TV: Tensor, label_T: Tensor, ignore_index: int, dloss_T: Tensor) -> Tensor:
    label_T1, is_ignored_T1 = label_T.unsqueeze(-1), (label_T == ignore_index).unsqueeze(-1)
    share_TV = logits_TV.float().softmax(dim=-1)
    excess_TV = share_TV.scatter_add(1, label_T1.masked_fill(is_ignored_T1, 0), torch.full_like(share_TV[:, :1], -1.0))
    return (excess_TV * dloss_T.unsqueeze(-1)).masked_fill(is_ignored_T1, 0.0).to(logits_TV.dtype)
