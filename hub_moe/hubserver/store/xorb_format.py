"""A xorb: chunks one after another, each packed by itself (hub-docs, docs/xet/xorb.md), and our index behind them."""

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import local
from typing import Any

import lz4.frame
import numpy as np

from .errors import InvalidInputError, TooLargeError
from .xet_hashes import HASH_BYTES, Node, hash_chunk

MAX_CHUNK_BYTES = 128 << 10
_MAX_PACKED_BYTES = 2 * MAX_CHUNK_BYTES
_MAX_CHUNKS = 1 << 16
_HEADER_BYTES = 8
_FOOTER_START = b"XETBLOB"  # the client's own footer; ours has what it has, checked
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)
_RECORD = struct.Struct(f"<II{HASH_BYTES}s")
_TRAILER = struct.Struct("<8sI")
_TRAILER_TAG = b"hubmoe\x00\x01"
TRAILER_BYTES = _TRAILER.size
_THREAD = local()


@dataclass(slots=True)
class XorbIndex:
    """Where each chunk of a xorb ends, packed (`ends`, its header included) and unpacked, and the chunks' hashes."""

    ends: "array[int]" = field(default_factory=lambda: array("I", [0]))
    unpacked_ends: "array[int]" = field(default_factory=lambda: array("I", [0]))
    hashes: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, *, packed_bytes: int, size_bytes: int, chunk_hash: bytes) -> None:
        """Append a chunk; `packed_bytes` with its header."""
        if len(self) >= _MAX_CHUNKS:
            raise TooLargeError(f"A xorb has at most {_MAX_CHUNKS} chunks.")
        self.ends.append(self.ends[-1] + packed_bytes)
        self.unpacked_ends.append(self.unpacked_ends[-1] + size_bytes)
        self.hashes += chunk_hash

    def size_bytes(self, first: int, end: int) -> int:
        """The unpacked size of a run of chunks."""
        return self.unpacked_ends[end] - self.unpacked_ends[first]

    def find(self, first: int, offset: int) -> int:
        """The chunk that holds the byte `offset` of what begins with the chunk `first`."""
        return bisect_right(self.unpacked_ends, self.unpacked_ends[first] + offset) - 1

    def nodes(self, first: int = 0, end: int | None = None) -> Iterator[Node]:
        """The hash and size of each chunk."""
        for number in range(first, len(self) if end is None else end):
            size = self.unpacked_ends[number + 1] - self.unpacked_ends[number]
            yield bytes(self.hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES]), size

    def hashes_of(self, first: int, end: int) -> bytes:
        """The hashes of a run of chunks, one after another."""
        return bytes(self.hashes[first * HASH_BYTES : end * HASH_BYTES])

    def pack(self) -> bytes:
        """The index as it stands behind the chunks in a stored xorb."""
        records = b"".join(
            _RECORD.pack(self.ends[number + 1], size, chunk_hash)
            for number, (chunk_hash, size) in enumerate(self.nodes())
        )
        return records + _TRAILER.pack(_TRAILER_TAG, len(self))


def count_index_bytes(trailer: bytes) -> int:
    """From the last bytes of a stored xorb, how long its index is, the trailer included."""
    if len(trailer) == TRAILER_BYTES:
        tag, count = _TRAILER.unpack(trailer)
        if tag == _TRAILER_TAG and count <= _MAX_CHUNKS:
            return int(count * _RECORD.size + TRAILER_BYTES)
    raise InvalidInputError("A stored xorb is damaged: it has no index.")


def unpack_index(content: bytes) -> XorbIndex:
    """The index that `XorbIndex.pack` wrote."""
    index = XorbIndex()
    for end, size_bytes, chunk_hash in _RECORD.iter_unpack(content[:-TRAILER_BYTES]):
        if end < index.ends[-1] or size_bytes > MAX_CHUNK_BYTES:
            raise InvalidInputError("A stored xorb is damaged: its index is out of order.")
        index.add(packed_bytes=end - index.ends[-1], size_bytes=size_bytes, chunk_hash=chunk_hash)
    return index


class XorbReader:
    """Reads a xorb piece by piece as it arrives: unpacks and hashes every chunk, and builds the index."""

    def __init__(self) -> None:
        self.index = XorbIndex()
        self._waiting = bytearray()
        self._is_over = False
        self._scratch = np.empty(MAX_CHUNK_BYTES, np.uint8)

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes; InvalidInputError if they are no chunks."""
        if not self._is_over:
            self._waiting += data
            with memoryview(self._waiting) as waiting:
                used = self._read_chunks(waiting)
            del self._waiting[:used]

    def finish(self) -> None:
        """Say that there is no more; InvalidInputError if a chunk is cut or there is none."""
        if not len(self.index) or (self._waiting and not self._is_over):
            raise InvalidInputError("The xorb is cut short.")

    def _read_chunks(self, waiting: memoryview) -> int:
        start = 0
        while len(waiting) - start >= _HEADER_BYTES:
            header = bytes(waiting[start : start + _HEADER_BYTES])
            if header.startswith(_FOOTER_START):
                self._is_over = True
                break
            packed, size, scheme = _read_header(header, self.index.ends[-1])
            end = start + _HEADER_BYTES + packed
            if end > len(waiting):
                break
            chunk = self._scratch[:size]
            _unpack_chunk(waiting[start + _HEADER_BYTES : end], scheme, chunk)
            self.index.add(packed_bytes=end - start, size_bytes=size, chunk_hash=hash_chunk(chunk.data))
            start = end
        return start


def unpack_run(data: bytes, *, size_bytes: int) -> memoryview:
    """The unpacked bytes of whole packed chunks that lie one after another."""
    whole, start, done = np.empty(size_bytes, np.uint8), 0, 0
    view = memoryview(data)
    while start < len(data):
        packed, size, scheme = _read_header(bytes(view[start : start + _HEADER_BYTES]), start)
        end = start + _HEADER_BYTES + packed
        if done + size > size_bytes:
            raise InvalidInputError("A stored xorb is damaged: a chunk has another size than its index says.")
        _unpack_chunk(view[start + _HEADER_BYTES : end], scheme, whole[done : done + size])
        start, done = end, done + size
    if done != size_bytes:  # what was not filled would be whatever the memory held before
        raise InvalidInputError("A stored xorb is damaged: it is cut short.")
    return whole.data


def _unpack_chunk(data: memoryview, scheme: int, chunk: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
    """Fill `chunk`. Scheme 0 is plain, 1 an LZ4 frame, 2 an LZ4 frame of the bytes grouped by position modulo 4."""
    unpacked = data if scheme == _PLAIN else _decompress(data, len(chunk))
    if len(unpacked) != len(chunk):
        raise InvalidInputError(f"A chunk has not the {len(chunk)} bytes that its header says.")
    source = np.frombuffer(unpacked, np.uint8)
    if scheme != _GROUPED_LZ4:
        chunk[:] = source
        return
    start = 0
    for place in range(4):
        length = (len(source) - place + 3) // 4
        chunk[place::4] = source[start : start + length]
        start += length


def _decompress(data: memoryview, size_bytes: int) -> bytes:
    """An LZ4 frame that is whole and nothing but a frame. A new decompressor for each would take twice the time."""
    frame = getattr(_THREAD, "frame", None) or lz4.frame.LZ4FrameDecompressor()
    _THREAD.frame = None
    try:
        frame.reset()
        unpacked: bytes = frame.decompress(data, max_length=size_bytes + 1)
    except RuntimeError as error:
        raise InvalidInputError(f"A chunk is not valid LZ4: {error}") from None
    if not frame.eof or frame.unused_data:
        raise InvalidInputError(f"A chunk has not the {size_bytes} bytes that its header says.")
    _THREAD.frame = frame
    return unpacked


def _read_header(header: bytes, position: int) -> tuple[int, int, int]:
    packed, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
    is_good = len(header) == _HEADER_BYTES and header[0] == 0 and header[4] <= _GROUPED_LZ4
    if not is_good or not 0 < size <= MAX_CHUNK_BYTES or packed > _MAX_PACKED_BYTES:
        raise InvalidInputError(f"The xorb is malformed at byte {position}.")
    return packed, size, header[4]
