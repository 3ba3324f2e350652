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

from .blobs import COPY_BYTES, make_folder, move_into_place, sync_folder
from .contents import Contents
from .errors import ConflictError, InvalidInputError, NotFoundError, TooLargeError
from .names import check_sha256
from .syncing import Syncing

_LIFE_S = 24 * 3600


@dataclass
class _Upload:
    path: Path
    lock: Lock = field(default_factory=Lock)
    done: set[int] = field(default_factory=set)
    writing: list[int] = field(default_factory=list)  # the number of each part that somebody holds open
    is_complete: bool = False
    hashed_bytes: int = 0
    forgotten: int = 0  # how often the hash was: one that began before knows bytes that are no more
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    used_at_s: float = field(default_factory=time.monotonic)

    def forget_hash(self) -> None:
        """What was hashed is being written again."""
        self.hashed_bytes, self.digest, self.forgotten = 0, hashlib.sha256(), self.forgotten + 1


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
        """Make the parts 1 to `parts` a stored content. Once done, a second time changes nothing.

        Raises:
            ConflictError: If one is being written: it would be written into what is stored.
            NotFoundError: If one is missing.
            InvalidInputError: If together they are not what was promised.
        """
        upload = self._find(name)
        with upload.lock:
            if upload.is_complete:
                return
            if upload.writing:
                raise ConflictError(f"Part {upload.writing[0]} is still being sent; complete the upload after it.")
            missing = next((number for number in range(1, parts + 1) if number not in upload.done), None)
            if missing:
                raise NotFoundError("upload", f"Part {missing} of {parts} has not been uploaded.")
            self._keep(upload, sha256=sha256, size_bytes=size_bytes)
            upload.is_complete = True

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
                make_folder(target.parent)
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
        with upload.lock:
            if upload.is_complete:
                raise ConflictError("This upload is complete; its parts cannot be sent again.")
            self._file = _open(upload.path)
            is_shared = number in upload.writing
            upload.writing.append(number)
            upload.done.discard(number)
            if offset < upload.hashed_bytes or is_shared:  # of two who write one part, nobody knows whose bytes stay
                upload.forget_hash()
            self._forgotten = upload.forgotten
            self._digest = upload.digest.copy() if offset == upload.hashed_bytes and not is_shared else None
        self._syncing = Syncing(self._file.fileno())

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
            is_next = self._upload.hashed_bytes == self._offset and self._upload.forgotten == self._forgotten
            if self._digest and is_next:
                self._upload.digest, self._upload.hashed_bytes = self._digest, self._offset + self._size_bytes

    def __enter__(self) -> "IncomingPart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            with self._file:
                self._syncing.wait()
        finally:
            with self._upload.lock:  # free, or soon: `complete` keeps it only while nobody writes
                self._upload.writing.remove(self._number)


def _open(path: Path) -> FileIO:
    try:
        return path.open("r+b", buffering=0)
    except FileNotFoundError:
        raise NotFoundError("upload", "This upload was given up because nobody went on with it; start again.") from None
