"""Training rows over one store of tokens, and how rows become a batch.

A row is a list of spans of the store, each a document or a piece of one. Shape letters: B batch, L sequence.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Span = tuple[int, int]
IGNORED = -100


@dataclass(frozen=True)
class TokenStore:
    """Token ids (int32) of all documents end to end, and which of them are trained on (bool)."""

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of `input_ids`, `labels` and `position_ids`, each int64 of shape (L,).

    In a row that holds several documents, positions start at 0 in each, which is how transformers keeps documents
    apart. The first token of each document has the label -100, as nothing in its document comes before it.
    """

    def __init__(self, store: TokenStore, rows: Sequence[Sequence[Span]]) -> None:
        self.store = store
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spans = self.rows[index]
        input_ids = np.concatenate([self.store.input_ids[start:end] for start, end in spans]).astype(np.int64)
        trained = np.concatenate([self.store.trained[start:end] for start, end in spans])
        lengths = [end - start for start, end in spans]
        labels = np.where(trained, input_ids, IGNORED)
        labels[np.cumsum([0, *lengths[:-1]])] = IGNORED
        positions = np.concatenate([np.arange(length) for length in lengths])
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def count_tokens(self) -> tuple[int, int]:
        """All tokens, and those with a label."""
        spans = [span for row in self.rows for span in row]
        total = sum(end - start for start, end in spans)
        trained = sum(int(self.store.trained[start + 1 : end].sum()) for start, end in spans)
        return total, trained


def pack_best_fit(lengths: Sequence[int], *, max_length: int) -> list[list[int]]:
    """Documents, by number, in as few rows of `max_length` tokens as best-fit-decreasing finds; none is cut.

    Longest first, each goes into the row with the least room that still holds it (arXiv:2404.10830, section 3).
    Every length must be at most `max_length`.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(rooms, (lengths[number], -1))
        if place == len(rooms):
            rows.append([])
            room, row = max_length, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        bisect.insort(rooms, (room - lengths[number], row))
    return rows


def concatenate_and_cut(documents: Sequence[Span], *, max_length: int) -> list[list[Span]]:
    """Rows of exactly `max_length` tokens, the last one shorter: documents end to end, cut where a row is full."""
    rows: list[list[Span]] = [[]]
    room = max_length
    for start, end in documents:
        while start < end:
            if not room:
                rows.append([])
                room = max_length
            piece = min(room, end - start)
            rows[-1].append((start, start + piece))
            start, room = start + piece, room - piece
    return rows if rows[0] else []


@dataclass(frozen=True)
class PackedCollator:
    """Rows without padding and attention mask: (B, L) where all are equally long, else end to end as (1, total).

    Attention over one long row computes, and masks away, what no document attends to. `use_cache` is False because
    transformers looks for packed documents only where there is no cache, and attends across them otherwise
    (`masking_utils._preprocess_mask_arguments`, 5.23).
    """

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        names = ("input_ids", "labels", "position_ids")
        is_even = len({len(row["input_ids"]) for row in rows}) == 1
        join = torch.stack if is_even else lambda parts: torch.cat(parts)[None]
        return {**{name: join([row[name] for row in rows]) for name in names}, "use_cache": False}


@dataclass(frozen=True)
class PaddingCollator:
    """Rows padded on the right to the longest, shape (B, L), with an attention mask; padding has the label -100."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        def pad(name: str, value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

        ones = [{"mask": torch.ones_like(row["input_ids"])} for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence([row["mask"] for row in ones], batch_first=True)
        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", IGNORED),
            "attention_mask": mask,
        }
