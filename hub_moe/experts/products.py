"""The products of which experts on the CPU consist, in torch alone, and the choice between these and compiled ones.

torch: a matrix narrower than float32 is cast into one float32 buffer that all experts share, unless this processor was
measured to multiply bfloat16 faster than that. So sums run in float32, and no copy of a whole stack exists.

`HUB_MOE_CPU_EXPERTS` says which: `compiled` (an error where they cannot be had), `torch`, or, where it is not set,
compiled if this machine can build and run them, and torch otherwise. `hub-moe env` tells which that is, and why. The
same goes for the decoding steps that are built with the compiled products (`decoding`).

Shape letters: S rows, E experts, A what goes into a product, B what comes out.
"""

import os
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedModelError
from .bfloat16_speed import has_fast_bfloat16
from .compiled_products import DTYPES, load_compiled_products
from .pairs import SortedPairs, sum_over_experts
from .stacks import IMPLEMENTATION, SPLIT_IMPLEMENTATION, describe_gpu_choice

VARIABLE = "HUB_MOE_CPU_EXPERTS"


class Products(Protocol):
    """The two products of which forward and backward of an experts layer consist."""

    name: str

    def work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What rows are computed in beside stacks of `dtype`."""
        ...

    def multiply(
        self, x_SA: Tensor, stack_EAB: Tensor, ends: tuple[int, ...], rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Each row times its expert's matrix, (S, B) in the work dtype.

        Args:
            x_SA: In the work dtype.
            stack_EAB: Any strides, such as a transposed view has.
            ends: Where the rows of each expert end.
            rows: int64 (S,): row s is `x[rows[s]]`.
            out: Contiguous; written and returned.
        """
        ...

    def stack_gradient(
        self, left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], ends: tuple[int, ...],
        like_EAB: Tensor,
    ) -> Tensor:  # fmt: skip
        """The sum over each expert's rows of outer products left x right, laid out and typed as `like`.

        Args:
            left: (S, A) in the work dtype, and which of its rows each row is, as in `multiply`.
            right: The same, (S, B).
        """
        ...

    def sum_over_experts(self, y_SD: Tensor, weight_TK: Tensor | None, pairs: SortedPairs) -> Tensor:
        """Each token's rows, times their weights if there are any, added up: (T, D), float32 or the wider dtype of `y`.

        Neither order nor rounding depends on the number of threads.
        """
        ...


class TorchProducts:
    """One matrix product of torch per expert that has rows."""

    name = "torch"

    def work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Products`."""
        if dtype == torch.bfloat16 and has_fast_bfloat16():
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def multiply(
        self, x_SA: Tensor, stack_EAB: Tensor, ends: tuple[int, ...], rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Products`."""
        x_SA = x_SA if rows is None else x_SA[rows]
        y_SB = x_SA.new_empty(x_SA.shape[0], stack_EAB.shape[-1]) if out is None else out
        buffer_AB = None
        if stack_EAB.dtype != x_SA.dtype:
            buffer_AB = torch.empty_like(stack_EAB[0], dtype=x_SA.dtype)  # keeps the strides: a plain cast
        with torch.autocast("cpu", enabled=False):
            for matrix_AB, (start, end) in zip(stack_EAB.unbind(), pairwise((0, *ends)), strict=True):
                if start < end:
                    right_AB = matrix_AB if buffer_AB is None else buffer_AB.copy_(matrix_AB)
                    torch.mm(x_SA[start:end], right_AB, out=y_SB[start:end])
        return y_SB

    def stack_gradient(
        self, left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], ends: tuple[int, ...],
        like_EAB: Tensor,
    ) -> Tensor:  # fmt: skip
        """See `Products`."""
        left_SA, right_SB = (rows if places is None else rows[places] for rows, places in (left, right))
        gradient_EAB = torch.empty_like(like_EAB)
        buffer_AB = None
        if gradient_EAB.dtype != left_SA.dtype:
            buffer_AB = torch.empty_like(gradient_EAB[0], dtype=left_SA.dtype)
        with torch.autocast("cpu", enabled=False):
            for matrix_AB, (start, end) in zip(gradient_EAB.unbind(), pairwise((0, *ends)), strict=True):
                if start == end:
                    matrix_AB.zero_()
                    continue
                _outer(matrix_AB if buffer_AB is None else buffer_AB, left_SA[start:end], right_SB[start:end])
                if buffer_AB is not None:
                    matrix_AB.copy_(buffer_AB)
        return gradient_EAB

    def sum_over_experts(self, y_SD: Tensor, weight_TK: Tensor | None, pairs: SortedPairs) -> Tensor:
        """See `Products`."""
        y_SD = y_SD.to(torch.promote_types(y_SD.dtype, torch.float32))
        weight_S = None if weight_TK is None else weight_TK.reshape(-1)[pairs.order_S].to(y_SD.dtype)
        return sum_over_experts(y_SD, weight_S, pairs)


def _outer(out_AB: Tensor, left_RA: Tensor, right_RB: Tensor) -> None:
    """Writes left^T right; into a transposed `out` as its transpose, which torch writes without a copy."""
    if out_AB.stride(-1) == 1:
        torch.mm(left_RA.mT, right_RB, out=out_AB)
    else:
        torch.mm(right_RB.mT, left_RA, out=out_AB.mT)


class SplitStack(NamedTuple):
    """The stack of a layer whose chosen experts are trained, and theirs, (C, A, B), which count as experts E to E + C.

    The `stack_EAB` and `like_EAB` of `SplitProducts`.
    """

    frozen: Tensor
    chosen: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        return self.frozen.dtype

    @property
    def mT(self) -> "SplitStack":
        """Both transposed."""
        return SplitStack(self.frozen.mT, self.chosen.mT)


class SplitProducts:
    """The products of another for rows that are sorted by expert, those of chosen experts behind all others."""

    def __init__(self, products: Products) -> None:
        self.products = products
        self.name = products.name

    def work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See `Products`."""
        return self.products.work_dtype(dtype)

    def multiply(
        self, x_SA: Tensor, stack_EAB: Any, ends: tuple[int, ...], rows: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Products`."""
        ends_E, ends_C, behind = _part(ends, stack_EAB)
        if out is None:
            out = torch.empty(ends[-1], stack_EAB.frozen.shape[-1], dtype=self.work_dtype(stack_EAB.dtype))
        for stack, its_ends, part in (
            (stack_EAB.frozen, ends_E, slice(behind.start)),
            (stack_EAB.chosen, ends_C, behind),
        ):
            if its_ends[-1]:
                x, its_rows = (x_SA[part], None) if rows is None else (x_SA, rows[part])
                self.products.multiply(x, stack, its_ends, its_rows, out[part])
        return out

    def stack_gradient(
        self, left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], ends: tuple[int, ...],
        like_EAB: Any,
    ) -> Tensor:  # fmt: skip
        """See `Products`; of the chosen experts alone."""
        _, ends_C, behind = _part(ends, like_EAB)
        left, right = (
            (rows[behind], None) if places is None else (rows, places[behind]) for rows, places in (left, right)
        )
        return self.products.stack_gradient(left, right, ends_C, like_EAB.chosen)

    def sum_over_experts(self, y_SD: Tensor, weight_TK: Tensor | None, pairs: SortedPairs) -> Tensor:
        """See `Products`."""
        return self.products.sum_over_experts(y_SD, weight_TK, pairs)


def _part(ends: tuple[int, ...], stack: SplitStack) -> tuple[tuple[int, ...], tuple[int, ...], slice]:
    """Where the rows of each frozen expert end, and those of each chosen one among theirs, and which those are."""
    num_experts = stack.frozen.shape[0]
    first = ends[num_experts - 1]
    return ends[:num_experts], tuple(end - first for end in ends[num_experts:]), slice(first, None)


_TORCH = TorchProducts()


def choose_products(dtype: torch.dtype) -> Products:
    """The products for weights of `dtype`.

    Raises:
        ConfigError: For another value of HUB_MOE_CPU_EXPERTS, or `compiled` where they cannot be had.
        UnsupportedModelError: For `compiled` and weights that are neither float32 nor bfloat16.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked == "torch":
        return _TORCH
    if asked == "compiled":
        if dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{VARIABLE}=compiled is for float32 and bfloat16 weights, not {dtype}; set it to torch, or unset it."
            )
        return load_compiled_products()
    if asked:
        raise ConfigError(f"{VARIABLE} is {asked!r}; compiled, torch or nothing was expected.")
    return _default()[0] if dtype in DTYPES else _TORCH


def describe_choice() -> tuple[str, str]:
    """The name of the products in use for float32 and bfloat16 weights, and why those.

    Raises:
        ConfigError: As `choose_products`.
    """
    asked = os.environ.get(VARIABLE, "")
    name = choose_products(torch.float32).name
    return name, f"{VARIABLE}={asked}" if asked else _default()[1]


def describe_for_record(implementation: str | None, device: str, dtype: torch.dtype) -> dict[str, str]:
    """What stands beside the versions in the record of a run, as other products round differently.

    Empty unless the run's experts implementation is ours and its device a CPU or a CUDA GPU; there
    `{"hub_moe experts": name}`.
    """
    kind = device.split(":")[0]
    ours = {"cpu": (IMPLEMENTATION, SPLIT_IMPLEMENTATION), "cuda": (IMPLEMENTATION,)}
    if implementation not in ours.get(kind, ()):
        return {}
    name = choose_products(dtype).name if kind == "cpu" else describe_gpu_choice()[0]
    return {f"{IMPLEMENTATION} experts": name}


@cache
def _default() -> tuple[Products, str]:
    try:
        return load_compiled_products(), "a compiler was found, and this processor is one of those it is for"
    except ConfigError as error:
        return _TORCH, str(error)
