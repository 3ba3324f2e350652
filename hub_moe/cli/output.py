"""How commands speak: data on stdout, as tables for people or JSON for machines; everything else on stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Row = Sequence[str]


def print_json(data: Any) -> None:
    """Write `data` to stdout as indented JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    columns: Row, rows: Sequence[Row], totals: Sequence[Row] = (), *, min_widths: tuple[int, int] = (0, 0)
) -> None:
    """Write a table to stdout: first column to the left, the others to the right, `totals` below a gap.

    `min_widths`, of the first column and of the others, line up tables that stand below each other.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column(columns[0], min_width=min_widths[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", min_width=min_widths[1], overflow="fold")
    for row in rows:
        table.add_row(*row)
    if totals:
        table.add_section()
    for row in totals:
        table.add_row(*row, style="bold")
    Console(markup=False, highlight=False).print(table)


def print_text(text: str = "") -> None:
    """Write a line of data to stdout."""
    print(text)


def say(text: str) -> None:
    """Tell the person at the terminal something that is not data."""
    print(text, file=sys.stderr)


def describe_count(number: float) -> str:
    """A count in three or four digits: `671.0 B`, `2.45 B`, `44.0 M`."""
    return _scale(number, ("", "K", "M", "B", "T"))


def describe_flops(operations: float) -> str:
    """Floating-point operations: `93.7 GFLOP`."""
    return _scale(operations, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def describe_bytes(size_bytes: float) -> str:
    """A size in powers of ten, as disks and the Hub count: `1.34 TB`, `288 MB`."""
    return _scale(size_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def _scale(number: float, units: Sequence[str]) -> str:
    place = 0
    while number >= 999.95 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    digits = 0 if not place else 2 if number < 9.995 else 1
    return f"{number:.{digits}f} {units[place]}".rstrip()


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told what is done and what there is in all; shows nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
