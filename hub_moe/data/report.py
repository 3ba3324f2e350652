"""What became of the rows: counts, and every row that was left out, by its number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import DatasetError
from .source import Provenance


@dataclass(frozen=True)
class BadRow:
    """A row that does not fit, by its number (counted from 0), and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class SideReport:
    """One side of the split. `fill` is the share of a batch of full rows that is tokens rather than empty."""

    documents: int
    rows: int
    tokens: int
    trained_tokens: int
    fill: float


@dataclass(frozen=True)
class DataReport:
    """Counts of everything that was read. `notes` say in sentences what was decided for the person."""

    provenance: Provenance
    format: str
    settings: dict[str, Any]
    rows: int
    duplicate_rows: tuple[int, ...]
    bad_rows: tuple[BadRow, ...]
    train: SideReport
    held_out: SideReport
    length_histogram: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_bad_rows(bad_rows: Sequence[BadRow], *, shown: int = 5) -> str:
    """The first of them in one line: `row 3 (answer is empty), row 8 (...) and 2 more`."""
    first = ", ".join(f"row {bad.row} ({bad.reason})" for bad in bad_rows[:shown])
    return first + (f" and {len(bad_rows) - shown:,} more" if len(bad_rows) > shown else "")


def check_bad_rows(bad_rows: Sequence[BadRow], *, num_rows: int, allowed: float) -> None:
    """Stop if a larger share than `allowed` does not fit.

    Raises:
        DatasetError: Naming the first of them.
    """
    if len(bad_rows) <= allowed * num_rows:
        return
    raise DatasetError(
        f"{len(bad_rows):,} of {num_rows:,} rows do not fit, more than allow_bad_rows = {allowed:g} permits: "
        f"{describe_bad_rows(bad_rows)}; mend them, or allow their share to leave them out "
        "(`hub-moe data check` lists all, rows counted from 0)."
    )


def bin_lengths(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """How many documents have up to 16, 32, 64, ... tokens: (limit, count), from the first to the last in use."""
    counts: dict[int, int] = {}
    for length in lengths:
        limit = max(16, 1 << max(length - 1, 0).bit_length())
        counts[limit] = counts.get(limit, 0) + 1
    if not counts:
        return ()
    limits = [min(counts)]
    while limits[-1] < max(counts):
        limits.append(limits[-1] * 2)
    return tuple((limit, counts.get(limit, 0)) for limit in limits)
