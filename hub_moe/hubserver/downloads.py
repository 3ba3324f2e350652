"""Answers that carry the bytes of a file, whole or a range of it."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from starlette.responses import FileResponse, Response

# Browsers show a picture only under its own name; every other file is plain text or bytes to them.
_PICTURES = {
    ".avif": "image/avif",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

# A repo's files are written by strangers and come from the address of the pages: no browser may run them.
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}


class BlobResponse(FileResponse):
    """A large file from disk, with Range and HEAD, in pieces of 1 MiB."""

    chunk_size = 1 << 20

    def __init__(self, path: Path, *, headers: Mapping[str, str]) -> None:
        super().__init__(path, headers={**headers, **SAFE_HEADERS}, media_type="application/octet-stream")


def answer_bytes(content: bytes, *, range_header: str | None, headers: Mapping[str, str]) -> Response:
    """A small file from memory: 200, 206 with Content-Range, or 416 for a range past the end."""
    all_headers = {**headers, **SAFE_HEADERS, "Accept-Ranges": "bytes"}
    match = _RANGE.fullmatch(range_header or "")
    if not match or match.groups() == ("", ""):
        return Response(content, headers=all_headers, media_type="text/plain; charset=utf-8")
    start, end = find_range(*match.groups(), size_bytes=len(content))
    if start > end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    all_headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    part = content[start : end + 1]
    return Response(part, status_code=206, headers=all_headers, media_type="text/plain; charset=utf-8")


def name_picture(path: str) -> dict[str, str]:
    """The header by which a browser shows a picture in a card; nothing for other files."""
    suffix = PurePosixPath(path).suffix.lower()
    return {"Content-Type": _PICTURES[suffix]} if suffix in _PICTURES else {}


def find_range(first: str, last: str, *, size_bytes: int) -> tuple[int, int]:
    """The inclusive bounds that `bytes=first-last` asks for (RFC 9110, 14.1.2); start > end if it is past the end."""
    if not first:
        return max(0, size_bytes - int(last)), size_bytes - 1 if int(last) else -1
    return int(first), min(int(last), size_bytes - 1) if last else size_bytes - 1
