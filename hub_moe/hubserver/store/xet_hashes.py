"""The hashes of the Xet protocol: of chunks, xorbs, files and terms (hub-docs, docs/xet/hashing.md)."""

import re
import struct
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from blake3 import blake3

from .errors import InvalidInputError

HASH_BYTES = 32
_DATA_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_TERM_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
_MEAN_CHILDREN = 4
_MOST_CHILDREN = 2 * _MEAN_CHILDREN + 1
_NAME = re.compile(r"[0-9a-f]{64}")

Node = tuple[bytes, int]
"""A hash and how many bytes of content it stands for."""


def hash_chunk(data: bytes | memoryview) -> bytes:
    """The hash of a chunk's unpacked bytes."""
    return blake3(data, key=_DATA_KEY).digest()


def hash_xorb(chunks: Iterable[Node]) -> bytes:
    """The hash that names a xorb, from the hashes and sizes of its chunks."""
    return _find_root(chunks)


def hash_file(chunks: Iterable[Node]) -> bytes:
    """The hash that names a file, from the hashes and sizes of its chunks in order; zeros for an empty file."""
    root = _find_root(chunks)
    return blake3(root, key=bytes(HASH_BYTES)).digest() if any(root) else root


def hash_term(chunk_hashes: bytes) -> bytes:
    """What proves that a client knows the chunks of a term: the hash of their hashes, one after another."""
    return blake3(chunk_hashes, key=_TERM_KEY).digest()


def format_hash(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian 64-bit numbers in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack("<QQQQ", raw))


def parse_hash(name: str) -> bytes:
    """The hash that `format_hash` wrote."""
    return struct.pack("<QQQQ", *(int(name[start : start + 16], 16) for start in range(0, 64, 16)))


def check_name(name: str) -> str:
    """`name` if it has the form of a hash as Xet writes it."""
    if not _NAME.fullmatch(name):
        raise InvalidInputError(f"{name[:80]!r} is not a Xet hash: expected 64 lower-case hex digits.")
    return name


def _find_root(chunks: Iterable[Node]) -> bytes:
    """The root of a tree whose groups end where a hash is divisible by 4, so that equal runs make equal groups."""
    nodes = iter(chunks)
    level = list(islice(nodes, 2))
    if len(level) == 2:
        level = list(_merge(chain(level, nodes)))
    while len(level) > 1:
        level = list(_merge(iter(level)))
    return level[0][0] if level else bytes(HASH_BYTES)


def _merge(nodes: Iterator[Node]) -> Iterator[Node]:
    window: list[Node] = []
    while window or (window := list(islice(nodes, _MOST_CHILDREN))):
        window.extend(islice(nodes, _MOST_CHILDREN - len(window)))
        end = _find_cut(window)
        text = "".join(f"{format_hash(raw)} : {size}\n" for raw, size in window[:end])
        yield blake3(text.encode(), key=_NODE_KEY).digest(), sum(size for _, size in window[:end])
        del window[:end]


def _find_cut(window: list[Node]) -> int:
    """How many of the next nodes go into one parent: at least 3 unless fewer are left, at most 9."""
    for index in range(2, len(window)):
        if int.from_bytes(window[index][0][24:], "little") % _MEAN_CHILDREN == 0:
            return index + 1
    return len(window)
