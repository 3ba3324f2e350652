"""Products of rows that are sorted by expert with the weights of their experts, which lie in one or two stacks.

Shape letters: S rows, N experts of a stack, A what goes into a product, B what comes out.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_mm


class Part(NamedTuple):
    """Consecutive rows: the stack (N, A, B) or biases (N, B) of their experts, and how many rows each expert gets."""

    stack: Tensor
    counts: tuple[int, ...]


def multiply(x_SA: Tensor, parts: Sequence[Part], biases: Sequence[Part] = ()) -> Tensor:
    """Each row times its expert's matrix, (S, B); the parts follow each other and cover all rows."""
    y_SB = x_SA.new_empty(x_SA.shape[0], parts[0].stack.shape[-1])
    product = _multiply_one_by_one if x_SA.device.type == "cpu" else multiply_at_once
    start = 0
    for part in parts:
        rows = slice(start, start + sum(part.counts))
        product(x_SA[rows], part, y_SB[rows])
        start = rows.stop
    return y_SB.add_(repeat_rows(biases)) if biases else y_SB


def _multiply_one_by_one(x_SA: Tensor, part: Part, out_SB: Tensor) -> None:
    start = 0
    for matrix_AB, count in zip(part.stack.unbind(), part.counts, strict=True):
        if count:
            multiply_into(out_SB[start : start + count], x_SA[start : start + count], matrix_AB)
            start += count


def multiply_at_once(x_SA: Tensor, part: Part, out_SB: Tensor) -> None:
    """All experts in one kernel."""
    ends = torch.tensor(list(accumulate(part.counts)), dtype=torch.int32, device=x_SA.device)
    if x_SA.shape[0]:
        out_SB.copy_(_grouped_mm(x_SA, part.stack, ends))


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """One matrix product, written to `out`.

    On a CPU without bfloat16 units torch is up to 100 times slower in bfloat16 than in float32, so it converts.
    """
    if left.device.type == "cpu" and left.dtype.itemsize < 4:
        out.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out=out)


def repeat_rows(biases: Sequence[Part]) -> Tensor:
    """Each row's own bias, (S, B)."""
    rows = [
        bias.stack.repeat_interleave(
            torch.tensor(bias.counts, device=bias.stack.device), 0, output_size=sum(bias.counts)
        )
        for bias in biases
    ]
    return torch.cat(rows)


def weight_gradient(like: Tensor, x_SA: Tensor, dy_SB: Tensor, counts: Sequence[int]) -> Tensor:
    """Of a stack (N, A, B) that made `y` from `x`, laid out as `like`; zero for experts without rows."""
    gradient = torch.empty_like(like)
    start = 0
    for matrix_AB, count in zip(gradient.unbind(), counts, strict=True):
        if count:
            multiply_into(matrix_AB, x_SA[start : start + count].mT, dy_SB[start : start + count])
        else:
            matrix_AB.zero_()
        start += count
    return gradient


def bias_gradient(dy_SB: Tensor, counts: Sequence[int]) -> Tensor:
    """Of biases (N, B); zero for experts without rows."""
    return torch.stack([rows.sum(0) for rows in dy_SB.split(list(counts))])
