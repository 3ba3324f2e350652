"""git's pkt-line framing (gitprotocol-common): four hex digits of length, then the line."""

from collections.abc import Iterable, Iterator
from typing import IO

from .store.errors import InvalidInputError

FLUSH, DELIMITER = b"0000", b"0001"
MAX_LINE_BYTES = 65_520
_BAND_BYTES = MAX_LINE_BYTES - 5
_SPECIAL = {b"0000": FLUSH, b"0001": DELIMITER, b"0002": FLUSH}


def pkt(line: str | bytes) -> bytes:
    """One framed line; text gets a line feed."""
    content = f"{line}\n".encode() if isinstance(line, str) else line
    return b"%04x%s" % (len(content) + 4, content)


def read_pkt(body: IO[bytes]) -> bytes | None:
    """The next line without its line feed, FLUSH or DELIMITER, None at the end of the body."""
    head = body.read(4)
    if not head:
        return None
    if head in _SPECIAL:
        return _SPECIAL[head]
    try:
        length = int(head, 16) if len(head) == 4 and head.isalnum() else 0
    except ValueError:
        length = 0
    if not 4 <= length <= MAX_LINE_BYTES:
        raise InvalidInputError("The body is not made of git's pkt-lines.")
    line = body.read(length - 4)
    if len(line) != length - 4:
        raise InvalidInputError("The body is cut short.")
    return line.removesuffix(b"\n")


def read_words(body: IO[bytes]) -> Iterator[str]:
    """The lines up to the next FLUSH, DELIMITER or the end of the body, as text."""
    while (line := read_pkt(body)) not in {None, FLUSH, DELIMITER}:
        assert line is not None
        yield decode(line)


def decode(line: bytes) -> str:
    """A line as text; InvalidInputError if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise InvalidInputError("A line of the request is not valid UTF-8.") from None


def in_band(number: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks as lines of a side band: 1 data, 2 messages."""
    for chunk in chunks:
        view = memoryview(chunk)
        yield b"".join(
            pkt(bytes([number]) + view[start : start + _BAND_BYTES]) for start in range(0, len(view), _BAND_BYTES)
        )
