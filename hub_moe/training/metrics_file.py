"""`metrics.jsonl`: one JSON object for each logged step, in order, no step twice."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


class MetricsFile:
    """Appends rows to a file and takes back what lies after a step, when training goes on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, Any] = {}
        self._last_offset = 0

    def open_after(self, step: int) -> None:
        """Keep the rows up to `step` and remove the others, all at once: they will be written anew."""
        rows = read_metrics(self.path) if self.path.exists() else []
        kept = [row for row in rows if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f"{self.path.name}.new")
        scratch.write_text("".join(_line(row) for row in kept), "utf-8")
        os.replace(scratch, self.path)
        self._last = kept[-1] if kept else {}
        self._last_offset = self.path.stat().st_size - (len(_line(self._last).encode()) if kept else 0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, or add its values to the last one if that is of the same step."""
        is_same_step = self._last.get("step") == row["step"]
        self._last = {**self._last, **row} if is_same_step else dict(row)
        with self.path.open("r+b") as file:
            self._last_offset = self._last_offset if is_same_step else file.seek(0, os.SEEK_END)
            file.seek(self._last_offset)
            file.write(_line(self._last).encode())
            file.truncate()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a killed run left unfinished is passed over.

    Raises:
        CheckpointError: If the file cannot be read, or another line is not a JSON object with a step.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Cannot read the metrics in {path}: {error}.") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise CheckpointError(f"{place} is not a JSON object with a step; remove the line.")
    return row


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _storable(value) for name, value in row.items()}) + "\n"


def _storable(value: Any) -> Any:
    """JSON has no NaN; null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
