"""In which order rows are trained on."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RowOrder(Sampler[int]):
    """`num_draws` row numbers: every row once in random order, then all again in another order, and so on.

    The order depends on the seed alone. A run has one such order, as long as its steps need, whose epochs run into each
    other: a step never has fewer rows than the others, and any number of processes takes the same rows in a step.
    """

    def __init__(self, num_rows: int, *, num_draws: int, seed: int) -> None:
        self._num_rows = num_rows
        self._num_draws = num_draws
        self._seed = seed

    def __len__(self) -> int:
        return self._num_draws

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        left = self._num_draws
        while left > 0:
            order = torch.randperm(self._num_rows, generator=generator)[:left].tolist()
            yield from order
            left -= len(order)
