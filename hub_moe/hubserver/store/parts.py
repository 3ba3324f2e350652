"""Uploads that come in parts, each written at its place in one file, so that nothing is left to do at the end.

What is known of an upload lives in memory: when the server restarts, its client starts again.
"""

import hashlib
import os
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType

from .blobs import COPY_BYTES, move_into_place, sync_folder
from .contents import Contents
from .errors import InvalidInputError, NotFoundError, TooLargeError
from .names import check_sha256
from .syncing import Syncing

_LIFE_S = 24 * 3600


@dataclass
class _Upload:
    path: Path
    lock: Lock = field(default_factory=Lock)
    done: set[int] = field(default_factory=set)
    hashed_bytes: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    used_at_s: float = field(default_factory=time.monotonic)

    def forget_hash(self) -> None:
        """What was hashed is being written again."""
        self.hashed_bytes, self.digest = 0, hashlib.sha256()


class PartStore:
    """The uploads that are under way."""

    def __init__(self, contents: Contents, incoming: Path) -> None:
        self._contents = contents
        self._incoming = incoming
        self._uploads: dict[str, _Upload] = {}
        self._lock = Lock()

    def receive(self, name: str, number: int, *, offset: int, size_bytes: int) -> "IncomingPart":
        """A place to write part `number` (from 1) of an upload into; a second one replaces the first."""
        return IncomingPart(self._find(name), number, offset=offset, size_bytes=size_bytes)

    def complete(self, name: str, *, parts: int, sha256: str, size_bytes: int) -> None:
        """Make the parts 1 to `parts` a stored content.

        Raises:
            NotFoundError: If one is missing.
            InvalidInputError: If together they are not what was promised.
        """
        upload = self._find(name)
        with upload.lock:
            missing = next((number for number in range(1, parts + 1) if number not in upload.done), None)
            if missing:
                raise NotFoundError("upload", f"Part {missing} of {parts} has not been uploaded.")
            self._keep(upload, sha256=sha256, size_bytes=size_bytes)
        with self._lock:
            self._uploads.pop(name, None)

    def _keep(self, upload: _Upload, *, sha256: str, size_bytes: int) -> None:
        with _open(upload.path) as file:
            file.seek(upload.hashed_bytes)
            while piece := file.read(COPY_BYTES):
                upload.digest.update(piece)
                upload.hashed_bytes += len(piece)
            if upload.digest.hexdigest() != sha256 or upload.hashed_bytes != size_bytes:
                upload.forget_hash()
                raise InvalidInputError(f"The parts together have not the sha256 {sha256} and {size_bytes} bytes.")
            target = self._contents.place(sha256)
            if target:
                target.parent.mkdir(parents=True, exist_ok=True)
                move_into_place(file, upload.path, target)
                sync_folder(target.parent)
        upload.path.unlink(missing_ok=True)

    def _find(self, name: str) -> _Upload:
        now_s = time.monotonic()
        with self._lock:
            for old in [one for one, upload in self._uploads.items() if upload.used_at_s < now_s - _LIFE_S]:
                self._uploads.pop(old).path.unlink(missing_ok=True)
            if name not in self._uploads:
                path = self._incoming / f"parts-{check_sha256(name)}"
                path.touch()
                self._uploads[name] = _Upload(path)
            self._uploads[name].used_at_s = now_s
            return self._uploads[name]


class IncomingPart:
    """A part on its way in, hashed as it is written if all parts before it are here."""

    def __init__(self, upload: _Upload, number: int, *, offset: int, size_bytes: int) -> None:
        self._upload = upload
        self._number = number
        self._offset = offset
        self._size_bytes = size_bytes
        self._written_bytes = 0
        self._file = _open(upload.path)
        self._syncing = Syncing(self._file.fileno())
        with upload.lock:
            upload.done.discard(number)
            if offset < upload.hashed_bytes:
                upload.forget_hash()
            self._digest = upload.digest.copy() if offset == upload.hashed_bytes else None

    def write(self, chunk: bytes | memoryview) -> None:
        """Append a chunk; TooLargeError as soon as there is more than was promised."""
        if self._written_bytes + len(chunk) > self._size_bytes:
            raise TooLargeError(f"More bytes than the {self._size_bytes} that were announced.")
        view = memoryview(chunk)
        while view:
            done = os.pwrite(self._file.fileno(), view, self._offset + self._written_bytes)
            self._written_bytes += done
            view = view[done:]
        if self._digest:
            self._digest.update(chunk)
        self._syncing.wrote(len(chunk))

    def finish(self) -> None:
        """Count the part as done; InvalidInputError if it is shorter than was promised."""
        if self._written_bytes != self._size_bytes:
            raise InvalidInputError(f"Got {self._written_bytes} bytes of the {self._size_bytes} that were announced.")
        with self._upload.lock:
            self._upload.done.add(self._number)
            if self._digest and self._upload.hashed_bytes == self._offset:
                self._upload.digest, self._upload.hashed_bytes = self._digest, self._offset + self._size_bytes

    def __enter__(self) -> "IncomingPart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            self._syncing.wait()


def _open(path: Path) -> FileIO:
    try:
        return path.open("r+b", buffering=0)
    except FileNotFoundError:
        raise NotFoundError("upload", "This upload was given up because nobody went on with it; start again.") from None
