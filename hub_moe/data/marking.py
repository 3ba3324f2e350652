"""One row as the model will see it, with what is trained on marked."""

from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from ..errors import DatasetError
from .documents import DocumentEncoder
from .formats import find_layout
from .source import LoadedRows, Row


@dataclass(frozen=True)
class MarkedRow:
    """Pieces of text in order, each with whether its tokens are trained on, and the counts."""

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    trained_tokens: int


def mark_row(rows: LoadedRows, number: int, tokenizer: Any, *, max_tokens: int | None = None) -> MarkedRow:
    """Row `number` (from 0) decoded from its tokens; of a row of more than `max_tokens`, the pieces show the first.

    Raises:
        DatasetError: If there is no such row, or it does not fit its format.
    """
    encoder = DocumentEncoder(tokenizer, find_layout(rows), section_chars=None)
    row = _pick(rows.rows, number)
    if row is None:
        raise DatasetError(f"{rows.provenance.source} has no row {number:,}; rows count from 0.")
    document = encoder({name: [row.get(name)] for name in rows.columns}, [number])
    if document["reason"][0] is not None:
        raise DatasetError(f"Row {number:,} does not fit: {document['reason'][0]}.")
    ids, trained = document["input_ids"][0], document["trained"][0]
    trained[0] = False  # nothing comes before it
    shown = list(zip(ids, trained, strict=True))[:max_tokens]
    pieces = [
        (tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False), is_trained)
        for is_trained, run in groupby(shown, key=lambda pair: pair[1])
    ]
    return MarkedRow(tuple(pieces), len(ids), sum(trained))


def _pick(rows: Any, number: int) -> Row | None:
    if hasattr(rows, "__getitem__") and number < len(rows):
        picked: Row = rows[number]
        return picked
    return next(islice(rows, number, None), None)
