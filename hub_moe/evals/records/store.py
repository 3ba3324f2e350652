"""Folders of records: `SUITE-ID.json` with `ID.parquet` beside it, written whole and never changed."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ConfigError, EvaluationError
from ...files.json_files import read_json, write_json
from .record import Record, SampleFile
from .samples import Sample, read_samples, write_samples

_ID_LETTERS = 16


@dataclass(frozen=True)
class StoredRecord:
    """A record and where it lies."""

    record: Record
    path: Path

    @property
    def samples_path(self) -> Path:
        """The table of answers beside it."""
        return self.path.with_name(self.record.samples.name)

    def read_samples(self) -> list[Sample]:
        """Every answer.

        Raises:
            EvaluationError: If the table is missing, or its hash is not the one in the record: it was edited.
        """
        expected = self.record.samples
        if not self.samples_path.is_file():
            raise EvaluationError(f"The samples of {self.path} are missing: {expected.name} should lie beside it.")
        found = _hash_file(self.samples_path)
        if found != expected.sha256:
            raise EvaluationError(
                f"{self.samples_path} was edited: it has the hash {found}, but the record says {expected.sha256}."
            )
        return read_samples(self.samples_path, num_rows=expected.num_rows)


def write_record(folder: Path, record: Record, samples: Sequence[Sample]) -> StoredRecord:
    """Write the samples and then the record, each whole; `record.samples` is filled in here.

    The same run twice is the same files. A reader never sees a record without its samples.

    Raises:
        OSError: If the folder cannot be written; no record is then there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".samples.{os.getpid()}.tmp"
    try:
        num_rows = write_samples(scratch, samples)
        sha256 = _hash_file(scratch)
        name = f"{record.suite.name}-{sha256[:_ID_LETTERS]}.parquet"
        scratch.replace(folder / name)
    finally:
        scratch.unlink(missing_ok=True)
    record = replace(record, samples=SampleFile(name, sha256, num_rows))
    path = folder / f"{record.suite.name}-{record.id[:_ID_LETTERS]}.json"
    write_json(path, record.to_dict())
    return StoredRecord(record, path)


def read_record(path: Path) -> StoredRecord:
    """A record, whose content has the hash that it claims. `path` may be a folder that holds just one.

    Raises:
        ConfigError: If it is damaged, of another format, or the folder holds none or several.
        EvaluationError: If it was edited.
        OSError: If it cannot be read.
    """
    if path.is_dir():
        found = find_records(path)
        if len(found) != 1:
            raise ConfigError(f"{path} holds {len(found)} records; name one of them.")
        return found[0]
    return StoredRecord(Record.from_dict(read_json(path, "a record"), where=str(path)), path)


def find_records(folder: Path) -> list[StoredRecord]:
    """Every record directly in a folder, oldest first; other JSON files are left alone.

    Raises:
        ConfigError, EvaluationError: If one of them is damaged or was edited.
    """
    found = [read_record(path) for path in sorted(folder.glob("*-*.json")) if is_record_name(path.name)]
    return sorted(found, key=lambda each: (each.record.created, each.path.name))


def is_record_name(name: str) -> bool:
    """Whether a file is named as records are."""
    return re.fullmatch(rf".+-[0-9a-f]{{{_ID_LETTERS}}}\.json", name) is not None


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
