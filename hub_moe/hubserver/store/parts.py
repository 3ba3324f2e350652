"""Uploads that come in parts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from .blobs import COPY_BYTES, IncomingFile
from .contents import Contents
from .errors import NotFoundError
from .names import check_sha256


class PartStore:
    """The parts of multipart uploads, kept until the upload is completed or the server restarts."""

    def __init__(self, contents: Contents, incoming: Path) -> None:
        self._contents = contents
        self._incoming = incoming

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
        self._contents.store(_read_all(paths), sha256=sha256, size_bytes=size_bytes)
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, upload: str) -> Path:
        return self._incoming / f"parts-{check_sha256(upload)}"


def _read_all(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                yield chunk
