"""Reads a pack that a stranger sent: every size is checked before memory is spent on it."""

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from dulwich.errors import ApplyDeltaError
from dulwich.pack import apply_delta

from .blobs import COPY_BYTES
from .commits import MAX_INLINE_BYTES
from .errors import InvalidInputError, TooLargeError
from .objects import Objects
from .packs import TYPE_NAMES

MAX_OBJECTS = 2_000_000
MAX_INFLATED_BYTES = 16 << 30
_OFFSET_DELTA, _NAMED_DELTA = 6, 7
_SLICE_BYTES = 65_536
_TRAILER_BYTES = 20
_MOST_HEADER_BYTES = 40

Check = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class _Header:
    """What stands before an object's zlib stream."""

    type_num: int
    size_bytes: int
    base: int | str | None
    data_offset: int


class PackReader:
    """Writes the objects of a pack to `objects` whole, each after `check` accepted its type and content."""

    def __init__(self, pack: IO[bytes], objects: Objects, check: Check) -> None:
        """`pack` is read from where it stands to its end."""
        self._file = pack
        self._start = pack.tell()
        self._end = max(0, pack.seek(0, 2) - self._start - _TRAILER_BYTES)
        self._objects = objects
        self._check = check
        self._inflated_bytes = 0
        self._deltas: dict[int | str, list[int]] = defaultdict(list)
        """Where the deltas against an offset in this pack, or against an object's id, begin."""
        if self._hash() != self._file.read(_TRAILER_BYTES):
            raise InvalidInputError("The pack is damaged or was cut short.")

    def read(self) -> None:
        """Read everything; InvalidInputError if the pack is not whole and well-formed."""
        count = self._read_count()
        position, whole = 12, list[tuple[int, str]]()
        for _ in range(count):
            header = self._read_header(position)
            start = position
            if header.base is None:
                content, position = self._inflate(header)
                stream = self._bytes(header.data_offset, position)
                whole.append((start, self._add(header.type_num, content, stream)))
            else:
                self._deltas[header.base].append(start)
                position = self._inflate(header)[1]
        if position != self._end:
            raise InvalidInputError("The pack has bytes after its last object.")
        self._resolve(whole)
        for base in list(self._deltas):  # what is left may build on objects that the repo has: a thin pack
            if isinstance(base, str) and base in self._deltas and base in self._objects:
                self._resolve([(-1, base)])
        if self._deltas:
            raise InvalidInputError("The pack holds a delta whose base is neither in it nor in the repo.")

    def _resolve(self, waiting: list[tuple[int, str]]) -> None:
        """Write the deltas on these objects, and the deltas on those, as whole objects; one base in memory at once."""
        while waiting:
            offset, oid = waiting.pop()
            deltas = self._deltas.pop(offset, []) + self._deltas.pop(oid, [])
            if not deltas:
                continue
            type_num, base = self._objects.read(oid)
            for start in deltas:
                delta, _ = self._inflate(self._read_header(start))
                waiting.append((start, self._add(type_num, self._apply(base, delta))))

    def _apply(self, base: bytes, delta: bytes) -> bytes:
        self._count_bytes(_read_result_size(delta))
        try:
            return b"".join(apply_delta(base, delta))
        except ApplyDeltaError as error:
            raise InvalidInputError(f"The pack holds a delta that does not fit its base: {error}.") from None

    def _add(self, type_num: int, content: bytes, stream: bytes | None = None) -> str:
        self._check(type_num, content)
        return self._objects.write(type_num, content, compressed=stream)

    def _read_count(self) -> int:
        head = self._bytes(0, 12)
        if len(head) < 12 or head[:4] != b"PACK" or head[4:8] not in {b"\0\0\0\2", b"\0\0\0\3"}:
            raise InvalidInputError("The body holds no git pack.")
        count = int.from_bytes(head[8:], "big")
        if count > MAX_OBJECTS:
            raise TooLargeError(f"A pack has at most {MAX_OBJECTS} objects; push in smaller steps.")
        return count

    def _read_header(self, start: int) -> _Header:
        head = self._bytes(start, start + _MOST_HEADER_BYTES)
        byte, position = _byte(head, 0), 1
        type_num, size, shift = (byte >> 4) & 7, byte & 15, 4
        while byte & 0x80:
            byte, position = _byte(head, position), position + 1
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            if shift > 60:
                raise InvalidInputError("The pack holds an object whose size is not a number.")
        if type_num in TYPE_NAMES:
            return _Header(type_num, size, None, start + position)
        if type_num == _OFFSET_DELTA:
            back, position = _read_distance(head, position)
            return _Header(type_num, size, start - back, start + position)
        if type_num == _NAMED_DELTA:
            return _Header(type_num, size, head[position : position + 20].hex(), start + position + 20)
        raise InvalidInputError(f"The pack holds an object of the unknown type {type_num}.")

    def _inflate(self, header: _Header) -> tuple[bytes, int]:
        """The content of a zlib stream of exactly the size that its header promises, and where it ends."""
        self._count_bytes(header.size_bytes)
        engine, parts, left, position = zlib.decompressobj(), [], header.size_bytes, header.data_offset
        while not engine.eof:
            piece = self._bytes(position, position + _SLICE_BYTES)
            try:
                parts.append(engine.decompress(piece, left + 1))
            except zlib.error as error:
                raise InvalidInputError(f"The pack holds a damaged object: {error}.") from None
            left -= len(parts[-1])
            position += len(piece) - len(engine.unused_data)
            if left < 0 or engine.unconsumed_tail or not piece:
                break
        if left or not engine.eof:
            raise InvalidInputError("The pack holds an object that has not the size it says.")
        return b"".join(parts), position

    def _bytes(self, start: int, end: int) -> bytes:
        self._file.seek(self._start + start)
        return self._file.read(max(0, min(end, self._end) - start))

    def _hash(self) -> bytes:
        digest, left = hashlib.sha1(usedforsecurity=False), self._end
        self._file.seek(self._start)
        while left and (chunk := self._file.read(min(left, COPY_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
        return digest.digest()

    def _count_bytes(self, size_bytes: int) -> None:
        if size_bytes > MAX_INLINE_BYTES:
            raise TooLargeError(
                f"A file of {size_bytes} bytes is too large for git, which takes at most {MAX_INLINE_BYTES}; "
                "track it with git-lfs."
            )
        self._inflated_bytes += size_bytes
        if self._inflated_bytes > MAX_INFLATED_BYTES:
            raise TooLargeError("The pack unfolds to too many bytes; push in smaller steps.")


def _byte(head: bytes, position: int) -> int:
    if position >= len(head):
        raise InvalidInputError("The pack is cut short.")
    return head[position]


def _read_distance(head: bytes, position: int) -> tuple[int, int]:
    """How far back the base of a delta lies, and where this number ends."""
    byte = _byte(head, position)
    distance = byte & 0x7F
    for place in range(position + 1, position + 9):
        if not byte & 0x80:
            break
        byte = _byte(head, place)
        distance = (distance + 1) << 7 | byte & 0x7F
        position = place
    if byte & 0x80 or not distance:
        raise InvalidInputError("The pack holds a delta whose base lies nowhere.")
    return distance, position + 1


def _read_result_size(delta: bytes) -> int:
    """The second number at the beginning of a delta."""
    position = size = 0
    for _ in range(2):
        size = shift = 0
        for place in range(position, position + 10):
            byte = delta[place] if place < len(delta) else 0
            size, shift = size | (byte & 0x7F) << shift, shift + 7
            position = place + 1
            if not byte & 0x80:
                break
    return size
