"""Records in repos of strangers: read one by one up to limits, each with its table of answers where that is asked for.

What is damaged, edited or too large is left out and named; nothing of it is believed beyond its own hash.
"""

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from ..errors import EvaluationError, HubError, HubMoeError
from ..evals.records import Record, StoredRecord, is_record_name, read_record
from .contributions import one_line
from .pull_requests import Listed, read_bytes

RECORDS_FOLDER = "evals"

_MAX_RECORDS = 20  # of one model
_MAX_RECORD_BYTES = 2_000_000
_MAX_TABLE_BYTES = 64_000_000
_MAX_TABLE_ROWS = 200_000
_MAX_TABLE_VALUES = 4_000_000  # of a column; MMLU has 14,042 documents with 4 answers each
_MAX_ENTRIES = 200
_MAX_NUMBER = 1e15
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True)
class _Place:
    """Where a record is on the Hub, with the files of its repo."""

    repo: str
    revision: str
    folder: str
    files: Mapping[str, Listed]


class RecordReader:
    """Reads records into a scratch folder. `notes` say what was left out and why."""

    def __init__(self, api: HfApi, scratch: Path) -> None:
        self._api, self._scratch = api, scratch
        self._places: dict[Path, _Place] = {}
        self._is_there: dict[Path, bool] = {}
        self.notes: list[str] = []

    def read(
        self, repo: str, files: Mapping[str, Listed], *, revision: str, folder: str = RECORDS_FOLDER
    ) -> list[StoredRecord]:
        """The sound records in a folder of a repo, whose files at the revision are `files`."""
        place = _Place(repo, revision, folder, files)
        paths = sorted(path for path in files if _is_record(path, folder))
        if len(paths) > _MAX_RECORDS:
            self.notes.append(f"{_shown(repo, folder)} has {len(paths):,} records; {_MAX_RECORDS} of them were read.")
        return list(self._read_all(place, paths[:_MAX_RECORDS]))

    def fetch_table(self, stored: StoredRecord) -> bool:
        """Bring the table of answers to where `stored.read_samples` looks for it; False, with a note, if it cannot be.

        Whether its content is what the record says is for `read_samples` to find out.
        """
        path = stored.samples_path
        if path not in self._is_there:
            fault = self._fetch(stored, path)
            self._is_there[path] = fault is None
            if fault:
                place = self._places[stored.path]
                self.notes.append(f"No differences by document from {_shown(place.repo, place.folder)}: {fault}.")
        return self._is_there[path]

    def _read_all(self, place: _Place, paths: list[str]) -> Iterator[StoredRecord]:
        for number, path in enumerate(paths):
            folder = Path(tempfile.mkdtemp(dir=self._scratch))
            copy = folder / f"record-{number}.json"
            try:
                self._copy(place, path, copy, limit=_MAX_RECORD_BYTES)
                stored = read_record(copy)
                _require_sound(stored.record)
            except (HubMoeError, OSError) as error:
                reason = one_line(str(error).replace(str(copy), "it"))
                self.notes.append(f"{_shown(place.repo, path)} was left out: {reason}")
                continue
            self._places[stored.path] = place
            yield stored

    def _fetch(self, stored: StoredRecord, path: Path) -> str | None:
        """Why the table could not be had; None where it is there."""
        place = self._places[stored.path]
        if stored.record.samples.num_rows > _MAX_TABLE_ROWS:
            return f"its table claims {stored.record.samples.num_rows:,} answers, and {_MAX_TABLE_ROWS:,} are read"
        try:
            self._copy(place, f"{place.folder}/{path.name}", path, limit=_MAX_TABLE_BYTES)
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            most = max((g.column(c).num_values for g in groups for c in range(g.num_columns)), default=0)
        except (HubMoeError, OSError) as error:
            return one_line(str(error)).rstrip(".")
        except pa.ArrowException:
            return f"{one_line(path.name)} is no table of samples"
        return None if most <= _MAX_TABLE_VALUES else f"{one_line(path.name)} holds more values than any suite asks for"

    def _copy(self, place: _Place, path: str, target: Path, *, limit: int) -> None:
        listed = place.files.get(path)
        if listed is None:
            raise HubError(f"{path} is not there.")
        if listed.size_bytes > limit:
            raise HubError(f"it has {listed.size_bytes:,} bytes, and {limit:,} are read.")
        count = max(1, listed.size_bytes)
        target.write_bytes(read_bytes(self._api, place.repo, path, revision=place.revision, count=count))


def _is_record(path: str, folder: str) -> bool:
    inside, _, name = path.rpartition("/")
    return inside == folder and is_record_name(name)


def _require_sound(record: Record) -> None:
    """Refuse what has the hash that it claims and is no result all the same."""
    if len(record.entries) > _MAX_ENTRIES:
        raise EvaluationError(f"it has {len(record.entries):,} entries, more than any suite.")
    names = [entry.name for entry in record.entries]
    if len(set(names)) < len(names):
        raise EvaluationError("it has an entry twice.")
    if not _CREATED.fullmatch(record.created):
        raise EvaluationError("it does not say when it was made.")
    for entry in record.entries:
        if any(not name or one_line(name) != name for name in (entry.name, entry.main_metric)):
            raise EvaluationError("it has an entry or a metric whose name nobody could read.")
        if sum(metric.name == entry.main_metric for metric in entry.metrics) != 1:
            raise EvaluationError(f"its entry {entry.name!r} lacks its main metric.")
        value = entry.main.value
        if not (math.isfinite(value) and abs(value) < _MAX_NUMBER) or entry.main.num_documents < 1:
            raise EvaluationError(f"its entry {entry.name!r} has no value that is one.")


def _shown(repo: str, path: str) -> str:
    return one_line(f"{repo}/{path}")
