"""Rows to training data: duplicates out, bad rows told, split, packed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DatasetError
from .documents import DocumentEncoder, Documents, encode_documents
from .formats import Layout, find_layout
from .report import BadRow, DataReport, SideReport, bin_lengths, check_bad_rows
from .source import FormatName, LoadedRows
from .token_rows import PackedCollator, PaddingCollator, Span, TokenRows, concatenate_and_cut, pack_best_fit

# A text is cut into sections of so many times max_length characters, so that some of them can be held out.
_SECTION_CHARS_PER_TOKEN = 16


@dataclass(frozen=True)
class PreparedData:
    """Rows for a trainer: torch datasets of `input_ids`, `labels`, `position_ids`, and the report on all rows."""

    train: TokenRows
    held_out: TokenRows
    report: DataReport
    packing: bool
    pad_token_id: int | None

    def collator(self) -> PackedCollator | PaddingCollator:
        """Makes batches of rows: packed rows without padding, others padded.

        Raises:
            DatasetError: If rows need padding and the tokenizer has no `pad_token`.
        """
        if self.packing:
            return PackedCollator()
        if self.pad_token_id is None:
            raise DatasetError(
                "The tokenizer has no pad_token, and rows that are not packed are padded: set tokenizer.pad_token, to "
                "eos_token if nothing else fits, or use packing."
            )
        return PaddingCollator(self.pad_token_id)


@dataclass(frozen=True)
class _Settings:
    max_length: int
    packing: bool
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DatasetError(f"max_length={self.max_length} leaves nothing to predict; give 2 or more.")
        if not 0 <= self.held_out < 1:
            raise DatasetError(f"held_out={self.held_out} is a share of the rows, from 0 up to but not including 1.")


def prepare(
    rows: LoadedRows,
    tokenizer: Any,
    *,
    format: FormatName = "auto",
    max_length: int,
    packing: bool = True,
    held_out: float = 0.0,
    seed: int = 0,
    allow_bad_rows: float = 0.0,
) -> PreparedData:
    """Tokenize `rows`, leave out duplicates, hold some out, and pack.

    Duplicates are rows whose content is the same up to white space. The split and the order of the rows depend on
    `seed` and on each row's content only, not on its place in the file; rows with the same prompt are on one side.
    Chats and completions are packed whole; texts are laid end to end and cut at `max_length`. A text much longer than
    `max_length` is held out in sections.

    A row that cannot be used (no answer, an empty one, wrong types, more than `max_length` tokens) is never cut to fit
    nor passed over in silence: unless `allow_bad_rows` permits their share, it stops here, before hours of training on
    less than was meant.

    Args:
        rows: From `load_rows`, or `LoadedRows.from_list`.
        tokenizer: The model's fast tokenizer; see `check_tokenizer`.
        format: Overrides that of the source.
        max_length: Most tokens of a row.
        packing: Several documents to a row, none attending to another; otherwise one document a row, padded.
        held_out: Expected share that is held out.
        seed: Of the split and the order.
        allow_bad_rows: Largest share of rows that may be left out as bad.

    Raises:
        DatasetError: If rows or tokenizer do not fit, or a side of the split is empty.
    """
    prepared = survey(
        rows, tokenizer, format=format, max_length=max_length, packing=packing, held_out=held_out, seed=seed
    )
    report = prepared.report
    check_bad_rows(report.bad_rows, num_rows=report.rows, allowed=allow_bad_rows)
    for name, side, wanted in (("train", report.train, True), ("held_out", report.held_out, held_out > 0)):
        if wanted and not side.trained_tokens:
            raise DatasetError(
                f"No row of {rows.provenance.source} is left for {name}: of {report.rows:,} rows "
                f"{len(report.bad_rows):,} do not fit and {len(report.duplicate_rows):,} are duplicates; "
                "change held_out, or give more rows."
            )
    return prepared


def survey(
    rows: LoadedRows,
    tokenizer: Any,
    *,
    format: FormatName = "auto",
    max_length: int,
    packing: bool = True,
    held_out: float = 0.0,
    seed: int = 0,
) -> PreparedData:
    """What `prepare` returns, whatever the rows are like: bad rows and empty sides are only reported."""
    settings = _Settings(max_length, packing, held_out, seed)
    layout = find_layout(rows, format)
    is_text = layout.format == "text"
    section_chars = _SECTION_CHARS_PER_TOKEN * max_length if is_text and held_out else None
    encoder = DocumentEncoder(tokenizer, layout, section_chars=section_chars)
    documents = encode_documents(rows, encoder)
    if not documents.num_rows:
        raise DatasetError(f"{rows.provenance.source} holds no rows.")
    too_long = {} if is_text else _find_too_long(documents, max_length)
    fitting = [place for place in range(len(documents.spans)) if place not in too_long]
    unique = _first_of_each(documents, fitting)
    sides = _split(documents, unique, settings)
    train, held = (TokenRows(documents.store, _pack(documents, side, settings, is_text=is_text)) for side in sides)
    bad_rows = sorted([*documents.bad_rows, *too_long.values()], key=lambda bad: bad.row)
    kept = set(unique)
    report = DataReport(
        provenance=rows.provenance,
        format=layout.describe(),
        settings=vars(settings).copy(),
        rows=documents.num_rows,
        duplicate_rows=tuple(sorted({documents.rows[place] for place in fitting if place not in kept})),
        bad_rows=tuple(bad_rows),
        train=_report_side(train, sides[0], settings),
        held_out=_report_side(held, sides[1], settings),
        length_histogram=bin_lengths([end - start for start, end in (documents.spans[place] for place in unique)]),
        notes=_notes(rows, layout, encoder, documents),
    )
    return PreparedData(train, held, report, packing, tokenizer.pad_token_id)


def _find_too_long(documents: Documents, max_length: int) -> dict[int, BadRow]:
    found = {}
    for place, (start, end) in enumerate(documents.spans):
        if end - start <= max_length:
            continue
        prompt = int(np.argmax(documents.store.trained[start:end]))
        reason = f"{end - start:,} tokens, more than max_length = {max_length:,}"
        if prompt >= max_length:
            reason += ", which its prompt alone reaches, so that nothing of the answer would be left"
        found[place] = BadRow(documents.rows[place], reason)
    return found


def _first_of_each(documents: Documents, places: Sequence[int]) -> list[int]:
    first: dict[str, int] = {}
    for place in places:
        first.setdefault(documents.keys[place], place)
    return list(first.values())


def _split(documents: Documents, places: Sequence[int], settings: _Settings) -> tuple[list[int], list[int]]:
    """Places for training and held out, each in an order drawn by content."""
    ordered = sorted(places, key=lambda place: _draw("order", documents.keys[place], settings.seed))
    held = [_draw("side", documents.side_keys[place], settings.seed) < settings.held_out for place in ordered]
    train = [place for place, is_held in zip(ordered, held, strict=True) if not is_held]
    return train, [place for place, is_held in zip(ordered, held, strict=True) if is_held]


def _draw(purpose: str, key: str, seed: int) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}:{key}".encode()).digest()[:8]) / 2**64


def _pack(documents: Documents, places: Sequence[int], settings: _Settings, *, is_text: bool) -> list[list[Span]]:
    spans = [documents.spans[place] for place in places]
    if is_text:
        if settings.packing:
            return concatenate_and_cut(spans, max_length=settings.max_length)
        return [row for span in spans for row in concatenate_and_cut([span], max_length=settings.max_length)]
    if not settings.packing:
        return [[span] for span in spans]
    bins = pack_best_fit([end - start for start, end in spans], max_length=settings.max_length)
    rows = sorted(sorted(numbers) for numbers in bins)  # not by length, as they come: batches shall mix
    return [[spans[number] for number in row] for row in rows]


def _report_side(rows: TokenRows, places: Sequence[int], settings: _Settings) -> SideReport:
    tokens, trained = rows.count_tokens()
    fill = tokens / (len(rows) * settings.max_length) if len(rows) else 0.0
    return SideReport(len(places), len(rows), tokens, trained, fill)


def _notes(rows: LoadedRows, layout: Layout, encoder: DocumentEncoder, documents: Documents) -> tuple[str, ...]:
    notes = []
    used = {column for names in layout.columns.values() for column in names}
    unused = [column for column in rows.columns if column not in used]
    if unused:
        notes.append(f"Columns not used: {', '.join(unused)}.")
    if encoder.chat is not None:
        notes.append(f"Chat template: {encoder.chat.describe()}.")
    if encoder.section_chars is not None and len(documents.spans) > documents.num_rows - len(documents.bad_rows):
        notes.append(
            f"Long texts are cut into sections of about {encoder.section_chars:,} characters ({len(documents.spans):,} "
            "documents), so that some can be held out."
        )
    return tuple(notes)
