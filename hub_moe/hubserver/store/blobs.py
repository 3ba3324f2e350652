"""Large files: one file per content, named by its sha256, whole or absent."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from .errors import InvalidInputError, NotFoundError, TooLargeError
from .names import check_sha256

COPY_BYTES = 1 << 20


class BlobStore:
    """Contents under `root`, each at `ab/cd/<sha256>`; what is still arriving lies under `incoming`."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self.root = root
        self.incoming = incoming
        root.mkdir(parents=True, exist_ok=True)
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

    def receive(self, *, sha256: str, size_bytes: int) -> "IncomingFile":
        """A place to write a content into; it becomes visible by `finish` if it is what was promised."""
        return IncomingFile(self.incoming, self.path(sha256), size_bytes=size_bytes, sha256=sha256)

    def store(self, chunks: Iterable[bytes], *, sha256: str, size_bytes: int) -> None:
        """Write a whole content; InvalidInputError if its sha256 or size differ from what was promised."""
        with self.receive(sha256=sha256, size_bytes=size_bytes) as incoming:
            for chunk in chunks:
                incoming.write(chunk)
            incoming.finish()

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
        self._file = os.fdopen(descriptor, "r+b")
        self._path = Path(name)
        self.write = self._file.write

    def truncate(self, size_bytes: int) -> None:
        """Cut what lies behind the first `size_bytes`; the next write goes there."""
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)

    def publish(self, target: Path) -> None:
        """Give the file its name for good, in place of what has it now."""
        target.parent.mkdir(parents=True, exist_ok=True)
        move_into_place(self._file, self._path, target)
        sync_folder(target.parent)

    def close(self) -> None:
        """Delete the file unless it was published."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class IncomingFile:
    """A file on its way in, counted and hashed as it is written; deleted unless finished."""

    def __init__(self, folder: Path, target: Path, *, size_bytes: int, sha256: str | None = None) -> None:
        self._target = target
        self._size_bytes = size_bytes
        self._sha256 = sha256
        self._hash = hashlib.sha256()
        self._written_bytes = 0
        self._file = NewFile(folder)

    def write(self, chunk: bytes) -> None:
        """Append a chunk; TooLargeError as soon as there is more than was promised."""
        self._written_bytes += len(chunk)
        if self._written_bytes > self._size_bytes:
            raise TooLargeError(f"More bytes than the {self._size_bytes} that were announced.")
        if self._sha256:
            self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> None:
        """Give the file its name; InvalidInputError if size or sha256 are not what was promised."""
        if self._written_bytes != self._size_bytes:
            raise InvalidInputError(f"Got {self._written_bytes} bytes of the {self._size_bytes} that were announced.")
        if self._sha256 and self._hash.hexdigest() != self._sha256:
            raise InvalidInputError(f"The content's sha256 is {self._hash.hexdigest()}, not {self._sha256}.")
        self._file.publish(self._target)

    def __enter__(self) -> "IncomingFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()


class PartStore:
    """The parts of multipart uploads, kept until the upload is completed or the server restarts."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def receive(self, upload: str, number: int, *, size_bytes: int) -> IncomingFile:
        """A place to write part `number` (from 1) of an upload into; a second one replaces the first."""
        folder = self._folder(upload)
        folder.mkdir(exist_ok=True)
        return IncomingFile(folder, folder / str(number), size_bytes=size_bytes)

    def complete(self, upload: str, *, parts: int, sha256: str, size_bytes: int) -> None:
        """Join the parts 1 to `parts` into a stored content and forget them."""
        folder = self._folder(upload)
        paths = [folder / str(number) for number in range(1, parts + 1)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise NotFoundError("upload", f"Part {missing[0]} of {parts} has not been uploaded.")
        self._blobs.store(_read_all(paths), sha256=sha256, size_bytes=size_bytes)
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, upload: str) -> Path:
        return self._blobs.incoming / f"parts-{check_sha256(upload)}"


def _read_all(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                yield chunk


def move_into_place(file: IO[bytes], path: Path, target: Path) -> None:
    """Close an open temporary file and give it its name, so that a crash leaves the old state or the new one."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(path, target)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
