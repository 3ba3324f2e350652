"""What to train on, as a person names it, and what was really read."""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, DatasetError

RowFormat = Literal["chat", "prompt-completion", "text"]
FormatName = RowFormat | Literal["auto"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class DataSource:
    """Rows on the Hub or on disk, and how to read them.

    Args:
        source: A Hub dataset (`OWNER/NAME`), a folder, or one or more files (json, jsonl, parquet, csv, tsv, txt).
        revision: Branch, tag or commit of a Hub dataset; the commit it stands for is recorded.
        config: Subset of a Hub dataset.
        split: Name of a split, or a slice of one such as `train[:1000]`; without it the only one, or `train`.
        format: What a row is; `auto` decides by the columns and says so in the report.
        columns: Which columns hold what, where they have other names, say
            `{"prompt": "problem", "completion": "solution"}`. Several are joined by `+`:
            `{"prompt": "instruction+input", "completion": "output"}`.
        limit: Read this many rows from the start; None reads all.
        streaming: Read rows as they are needed and write none of them to disk.
    """

    source: str | Sequence[str]
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    format: FormatName = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise DatasetError("A data source needs a Hub dataset (OWNER/NAME), a folder or files.")
        if self.limit is not None and self.limit < 1:
            raise DatasetError(f"limit={self.limit} reads no rows; give 1 or more, or leave it out to read all.")

    @property
    def names(self) -> tuple[str, ...]:
        """`source` as a tuple."""
        return (self.source,) if isinstance(self.source, str) else tuple(map(str, self.source))


@dataclass(frozen=True)
class FileRecord:
    """One file that was read: its name as it was given (a path from the root is cut to the name), size and hash."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Provenance:
    """What was read, in a form to be published: no path of this machine in it.

    `revision` is the commit of a Hub dataset, never a branch. `files` are those of a local source.
    """

    source: str
    kind: Literal["hub", "files", "memory"]
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    limit: int | None = None
    streaming: bool = False
    files: tuple[FileRecord, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LoadedRows:
    """Rows and where they come from. Iterating gives dicts; a row's number counts from 0 in that order."""

    rows: Iterable[Row]
    columns: tuple[str, ...]
    provenance: Provenance
    format: FormatName = "auto"
    column_map: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @classmethod
    def from_list(cls, rows: Sequence[Row], *, name: str = "rows in memory") -> "LoadedRows":
        """Rows that are already here; `columns` are those that any row has.

        Raises:
            DatasetError: If there are none.
        """
        if not rows:
            raise DatasetError(f"{name} holds no rows.")
        columns = tuple(dict.fromkeys(column for row in rows for column in row))
        return cls(rows, columns, Provenance(name, "memory"))


def record_file(path: Path, name: str) -> FileRecord:
    """Size and sha256 of `path`, under `name`."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(name, path.stat().st_size, sha256)


def read_source(names: Sequence[str], settings: Mapping[str, str]) -> DataSource:
    """The source `names` with `settings`, whose keys are fields of `DataSource` or `columns.PART`.

    Raises:
        ConfigError: If a key is unknown (the message names the nearest) or a value does not fit.
    """
    known = [field.name for field in fields(DataSource) if field.name not in ("source", "columns")]
    values: dict[str, Any] = {"columns": {}}
    for key, value in settings.items():
        if key.startswith("columns."):
            values["columns"][key.removeprefix("columns.")] = value
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)} and columns.PART."
            raise ConfigError(f"{key!r} is no setting of a data source; {hint}")
        else:
            values[key] = _read_value(key, value)
    return DataSource(names[0] if len(names) == 1 else tuple(names), **values)


def _read_value(key: str, value: str) -> Any:
    if key == "limit":
        if not value.isdigit():
            raise ConfigError(f"limit={value} is not a number of rows.")
        return int(value)
    if key == "streaming":
        if value not in ("true", "false"):
            raise ConfigError(f"streaming={value} is neither true nor false.")
        return value == "true"
    return value
