"""Large files: one file per content, named by its sha256, whole or absent."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO

from .errors import InvalidInputError, TooLargeError
from .names import check_sha256
from .syncing import Syncing

COPY_BYTES = 1 << 20
SEND_BYTES = 256 << 10
"""The size of the pieces in which contents are sent: each of many slow readers holds two or three."""


class BlobStore:
    """Contents under `root`, each at `ab/cd/<sha256>`; what is still arriving lies under `incoming`."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self.root = root
        self.incoming = incoming
        make_folder(root)
        incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the content with this sha256 lies, or would lie."""
        check_sha256(sha256)
        return self.root / sha256[:2] / sha256[2:4] / sha256

    def size_bytes(self, sha256: str) -> int | None:
        """The size of a stored content, None if it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, sha256: str) -> int:
        """Remove a content, if it is here; the bytes that this freed."""
        size_bytes = self.size_bytes(sha256) or 0
        self.path(sha256).unlink(missing_ok=True)
        return size_bytes

    def all(self) -> Iterator[str]:
        """The sha256 of every stored content."""
        for path in self.root.glob("??/??/*"):
            yield path.name

    def clear_incoming(self) -> None:
        """Delete what an earlier process left half-written. Only for the one process that serves this folder."""
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True, exist_ok=True)


class NewFile:
    """A file without a name yet, in `folder`; deleted on close unless it was published."""

    def __init__(self, folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder)
        self._file = FileIO(descriptor, "r+")
        self._path = Path(name)
        self._syncing = Syncing(descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._syncing.wrote(len(data))

    def truncate(self, size_bytes: int) -> None:
        """Cut what lies behind the first `size_bytes`; the next write goes there."""
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)

    def publish(self, target: Path) -> None:
        """Give the file its name for good, in place of what has it now."""
        self._syncing.wait()
        make_folder(target.parent)
        move_into_place(self._file, self._path, target)
        sync_folder(target.parent)

    def close(self) -> None:
        """Delete the file unless it was published."""
        self._syncing.wait()
        self._file.close()
        self._path.unlink(missing_ok=True)


class IncomingFile:
    """A file on its way in, counted and hashed as it is written; deleted unless finished."""

    def __init__(self, folder: Path, target: Path | None, *, size_bytes: int, sha256: str | None = None) -> None:
        self._target = target
        self._size_bytes = size_bytes
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        self._written_bytes = 0
        self._file = NewFile(folder)

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append a chunk; TooLargeError as soon as there is more than was promised."""
        self._written_bytes += len(chunk)
        if self._written_bytes > self._size_bytes:
            raise TooLargeError(f"More bytes than the {self._size_bytes} that were announced.")
        if self._sha256:
            self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Give the file its name, if it gets one; InvalidInputError if size or sha256 are not what was promised."""
        if self._written_bytes != self._size_bytes:
            raise InvalidInputError(f"Got {self._written_bytes} bytes of the {self._size_bytes} that were announced.")
        if self._sha256 and self._hash.hexdigest() != self._sha256:
            raise InvalidInputError(f"The content's sha256 is {self._hash.hexdigest()}, not {self._sha256}.")
        if self._target:
            self._file.publish(self._target)

    def __enter__(self) -> "IncomingFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


def read_file(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The bytes `start` to `end` of an open file, in pieces of 256 KiB; closes it."""
    with file:
        file.seek(start)
        while start < end and (piece := file.read(min(SEND_BYTES, end - start))):
            start += len(piece)
            yield piece


def move_into_place(file: IO[bytes], path: Path, target: Path) -> None:
    """Close an open temporary file and give it its name, so that a crash leaves the old state or the new one."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(path, target)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that their names survive a power cut."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
