"""The body of a commit: one JSON object on each line, a header first. Read line by line, so that memory is bounded."""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from .store.commits import MAX_INLINE_BYTES, AddFile, AddLargeFile, DeleteFile, Operation
from .store.errors import InvalidInputError, TooLargeError

MAX_LINE_BYTES = MAX_INLINE_BYTES * 4 // 3 + 65_536


@dataclass(frozen=True)
class CommitHeader:
    """What a commit is called, and on which commit its author built it."""

    summary: str
    description: str
    parent: str | None

    @property
    def message(self) -> str:
        """Both parts as git keeps them."""
        return f"{self.summary}\n\n{self.description}".strip()


def read_header(body: IO[bytes]) -> CommitHeader:
    """The first line of the body."""
    key, value = _read_line(body.readline(MAX_LINE_BYTES), 1)
    if key != "header":
        raise InvalidInputError(f"The first line must be the header; got {key!r}.")
    summary, description = _text(value, "summary", 1), _text(value, "description", 1, default="")
    parent = _text(value, "parentCommit", 1) if value.get("parentCommit") else None
    return CommitHeader(summary, description, parent.lower() if parent else None)


def read_operations(body: IO[bytes]) -> Iterator[Operation]:
    """The lines after the header. An error names the line."""
    number = 1
    while line := body.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) >= MAX_LINE_BYTES:
            raise TooLargeError(f"Line {number} has {MAX_LINE_BYTES} bytes or more; upload large files as large files.")
        if line.strip():
            yield _operation(*_read_line(line, number), number)


def _read_line(line: bytes, number: int) -> tuple[str, dict[str, Any]]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInputError(f"Line {number} of the commit is not valid JSON.") from None
    if not isinstance(found, dict) or not isinstance(found.get("value"), dict) or not isinstance(found.get("key"), str):
        raise InvalidInputError(f'Line {number} of the commit is not {{"key": ..., "value": {{...}}}}.')
    return found["key"], found["value"]


def _operation(key: str, value: dict[str, Any], number: int) -> Operation:
    path = _text(value, "path", number)
    if key == "file":
        return AddFile(path, _content(value, number))
    if key == "lfsFile":
        if value.get("algo", "sha256") != "sha256":
            raise InvalidInputError(f"Line {number}: algo must be sha256.")
        return AddLargeFile(path, _text(value, "oid", number))
    if key == "deletedFile":
        return DeleteFile(path.removesuffix("/"))
    if key == "deletedFolder":
        return DeleteFile(path.removesuffix("/") + "/")
    raise InvalidInputError(f"Line {number}: {key[:40]!r} is not file, lfsFile, deletedFile or deletedFolder.")


def _content(value: dict[str, Any], number: int) -> bytes:
    content, encoding = _text(value, "content", number), _text(value, "encoding", number, default="utf-8")
    if encoding == "utf-8":
        return content.encode()
    if encoding != "base64":
        raise InvalidInputError(f"Line {number}: encoding must be base64 or utf-8; got {encoding[:40]!r}.")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInputError(f"Line {number}: content is not valid base64.") from None


def _text(value: dict[str, Any], name: str, number: int, default: str | None = None) -> str:
    text = value.get(name, default)
    if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidInputError(f"Line {number}: {name!r} must be a string.")
    return text
