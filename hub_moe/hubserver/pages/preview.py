"""The first rows of a dataset's file, from its first bytes."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

MAX_PREVIEW_BYTES = 256_000
_MAX_ROWS = 20
_MAX_COLUMNS = 20
_MAX_CELL = 300
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_NOT_DATA = {"dataset_infos.json", "config.json"}


@dataclass(frozen=True)
class Preview:
    """Rows as text, cut to what a page can show."""

    columns: list[str]
    rows: list[list[str]]
    more_columns: int = 0


def can_preview(path: str) -> bool:
    """Whether a file's name says that it holds rows."""
    return path.lower().endswith(_SUFFIXES) and path.rpartition("/")[2] not in _NOT_DATA


def read_preview(path: str, content: bytes, *, is_whole: bool) -> Preview | None:
    """The first rows of a file whose first bytes are `content`; None if it does not hold what its name says."""
    text = content.decode("utf-8-sig", "replace")
    try:
        rows = list(islice(_read_rows(path.lower(), text, is_whole), _MAX_ROWS))
    except (ValueError, csv.Error, RecursionError):
        return None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    shown = columns[:_MAX_COLUMNS]
    cells = [[_show(row[name]) if name in row else "" for name in shown] for row in rows]
    return Preview([_cut(name) for name in shown], cells, len(columns) - len(shown)) if rows else None


def _read_rows(path: str, text: str, is_whole: bool) -> Iterator[dict[str, Any]]:
    if path.endswith((".csv", ".tsv")):
        return _read_table(text if is_whole else text.rpartition("\n")[0], "\t" if path.endswith(".tsv") else ",")
    if path.endswith(".json"):
        return _read_json(text, is_whole)
    return _read_lines(text if is_whole else text.rpartition("\n")[0])


def _read_table(text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(lines, [])
    for values in lines:
        yield {
            name or f"column {number}": value for number, (name, value) in enumerate(zip(header, values, strict=False))
        }


def _read_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        if line.strip():
            yield _as_row(json.loads(line))


def _read_json(text: str, is_whole: bool) -> Iterator[dict[str, Any]]:
    """A list of rows, a mapping of columns, or a mapping that holds a list of rows; a cut file must be a list."""
    text = text.strip()
    if text.startswith("["):
        yield from _read_list(text[1:], is_whole)
        return
    found = json.loads(text)
    lists = [value for value in found.values() if isinstance(value, list)] if isinstance(found, dict) else []
    if lists and all(isinstance(row, dict) for row in lists[0]):
        yield from lists[0]
    elif lists and len(lists) == len(found):
        for values in zip(*lists, strict=False):
            yield dict(zip(found, values, strict=True))
    else:
        yield _as_row(found)


def _read_list(text: str, is_whole: bool) -> Iterator[dict[str, Any]]:
    """The items of a JSON list without its opening bracket, as far as they go."""
    decoder = json.JSONDecoder()
    text = text.lstrip()
    while text and not text.startswith("]"):
        try:
            item, end = decoder.raw_decode(text)
        except ValueError:
            if is_whole:
                raise
            return
        yield _as_row(item)
        text = text[end:].lstrip().removeprefix(",").lstrip()


def _as_row(item: Any) -> dict[str, Any]:
    return item if isinstance(item, dict) else {"value": item}


def _show(value: Any) -> str:
    return _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CELL else f"{text[:_MAX_CELL]}…"
