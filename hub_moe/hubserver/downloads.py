"""Answers that carry the bytes of a file, whole or a range of it."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .store.blobs import read_file
from .store.contents import Contents
from .store.errors import NotFoundError

_BINARY = "application/octet-stream"
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


def answer_content(contents: Contents, sha256: str, *, request: Request, headers: Mapping[str, str]) -> Response:
    """A large content, however it is kept, with Range and HEAD."""
    size_bytes = contents.size_bytes(sha256)
    if size_bytes is None:
        raise NotFoundError("entry", f"The content {sha256} is not here.")
    asked = None if _is_stale(request, headers) else request.headers.get("range")
    start, end, status, range_headers = _choose_range(asked, size_bytes)
    all_headers = {**headers, **SAFE_HEADERS, "Accept-Ranges": "bytes", **range_headers}
    all_headers["Content-Length"] = str(end - start)
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=all_headers, media_type=_BINARY)
    return StreamingResponse(contents.read(sha256, start, end), status, all_headers, media_type=_BINARY)


def answer_part(file: BinaryIO, first: int, last: int) -> Response:
    """The bytes `first` to `last` of an open file, both inclusive."""
    headers = {"Content-Range": f"bytes {first}-{last}/*", "Content-Length": str(last + 1 - first), **SAFE_HEADERS}
    return StreamingResponse(read_file(file, first, last + 1), 206, headers, media_type=_BINARY)


def answer_bytes(content: bytes, *, range_header: str | None, headers: Mapping[str, str]) -> Response:
    """A small file from memory: 200, 206 with Content-Range, or 416 for a range past the end."""
    start, end, status, range_headers = _choose_range(range_header, len(content))
    all_headers = {**headers, **SAFE_HEADERS, "Accept-Ranges": "bytes", **range_headers}
    return Response(content[start:end], status_code=status, headers=all_headers, media_type="text/plain; charset=utf-8")


def name_picture(path: str) -> dict[str, str]:
    """The header by which a browser shows a picture in a card; nothing for other files."""
    suffix = PurePosixPath(path).suffix.lower()
    return {"Content-Type": _PICTURES[suffix]} if suffix in _PICTURES else {}


def find_range(first: str, last: str, *, size_bytes: int) -> tuple[int, int]:
    """The inclusive bounds that `bytes=first-last` asks for (RFC 9110, 14.1.2); start > end if it is past the end."""
    if not first:
        return max(0, size_bytes - int(last)), size_bytes - 1 if int(last) else -1
    return int(first), min(int(last), size_bytes - 1) if last else size_bytes - 1


def _choose_range(asked: str | None, size_bytes: int) -> tuple[int, int, int, dict[str, str]]:
    """Where to start and end (exclusive), the status and the header for a Range header; what it does not say is all."""
    match = _RANGE.fullmatch(asked or "")
    if not match or match.groups() == ("", ""):
        return 0, size_bytes, 200, {}
    start, last = find_range(*match.groups(), size_bytes=size_bytes)
    if start > last:
        return 0, 0, 416, {"Content-Range": f"bytes */{size_bytes}"}
    return start, last + 1, 206, {"Content-Range": f"bytes {start}-{last}/{size_bytes}"}


def _is_stale(request: Request, headers: Mapping[str, str]) -> bool:
    """Whether the client has a part of another version: then it needs all of this one."""
    condition = request.headers.get("if-range")
    return condition is not None and condition != headers.get("ETag")
