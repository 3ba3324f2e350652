"""Pictures, videos and sounds that people show in discussions. Each has a name that nobody can guess."""

import re
import secrets
from pathlib import Path
from typing import IO

from .blobs import COPY_BYTES, BlobStore, IncomingFile
from .errors import InvalidInputError, NotFoundError, TooLargeError

MAX_BYTES = 10_000_000
MAX_VIDEO_BYTES = 50_000_000
TYPES = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
    "image/webp": "webp",
    "video/mp4": "mp4",
    "video/quicktime": "mov",
    "video/webm": "webm",
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
}
_NAME = re.compile(r"[0-9a-f]{32}\.([a-z0-9]{3,4})")


class Attachments:
    """Files in one folder, by a random name."""

    def __init__(self, folder: Path, blobs: BlobStore) -> None:
        self._folder = folder
        self._incoming = blobs.incoming

    def add(self, body: IO[bytes], media_type: str) -> str:
        """Keep a file; the name to fetch it by. Its type is what its sender says: it is served as nothing else."""
        if media_type not in TYPES:
            raise InvalidInputError(f"An attachment is one of {', '.join(TYPES)}; got {media_type[:80]!r}.")
        size_bytes = body.seek(0, 2)
        most = MAX_VIDEO_BYTES if media_type.startswith("video/") else MAX_BYTES
        if not 0 < size_bytes <= most:
            raise TooLargeError(f"An attachment of type {media_type} has 1 to {most} bytes; got {size_bytes}.")
        body.seek(0)
        name = f"{secrets.token_hex(16)}.{TYPES[media_type]}"
        with IncomingFile(self._incoming, self._folder / name, size_bytes=size_bytes) as incoming:
            while chunk := body.read(COPY_BYTES):
                incoming.write(chunk)
            incoming.finish()
        return name

    def find(self, name: str) -> tuple[Path, str]:
        """Where an attachment lies, and its media type."""
        match = _NAME.fullmatch(name)
        path = self._folder / name
        if not match or not path.is_file():
            raise NotFoundError("upload", f"There is no attachment {name[:80]!r}.")
        return path, next(media_type for media_type, ending in TYPES.items() if ending == match.group(1))
