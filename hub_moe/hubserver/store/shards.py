"""Shards: what a client says its files are made of (hub-docs, docs/xet/shard.md). Only the part about files is read."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import InvalidInputError
from .xet_hashes import format_hash

MAX_SHARD_BYTES = 64 << 20
TAG = b"HFRepoMetaData\0\x55\x69\x67\x45\x6a\x7b\x81\x57\x83\xa5\xbd\xd9\x5c\xcd\xd1\x4a\xa9"
VERSION = 2
_BOOKEND = b"\xff" * 32
BOOKEND_RECORD = _BOOKEND + bytes(16)
HEADER = struct.Struct("<32sQQ")
_HAS_PROOFS = 1 << 31
_HAS_SHA256 = 1 << 30
RECORD_BYTES = 48


@dataclass(frozen=True, slots=True)
class Term:
    """A run of chunks of one xorb, `end` exclusive, and its unpacked size."""

    xorb: str
    size_bytes: int
    first: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it, with the proof for each term that the client knows its chunks."""

    name: str
    sha256: str
    terms: tuple[Term, ...]
    proofs: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the whole file."""
        return sum(term.size_bytes for term in self.terms)


def parse_shard(shard: bytes) -> list[ShardFile]:
    """The files that a shard describes. Each must carry its sha256 and its proofs."""
    if len(shard) < 2 * RECORD_BYTES or shard[: len(TAG)] != TAG:
        raise InvalidInputError("This is not a shard.")
    version = int.from_bytes(shard[len(TAG) : len(TAG) + 8], "little")
    if version != VERSION:
        raise InvalidInputError(f"Shards of version {version} are not known here; expected {VERSION}.")
    records = _read_records(shard)
    files = []
    while (header := next(records))[:32] != _BOOKEND:
        files.append(_read_file(header, records))
    return files


def _read_file(header: bytes, records: Iterator[bytes]) -> ShardFile:
    flags, count = struct.unpack_from("<II", header, 32)
    terms = tuple(_read_term(next(records)) for _ in range(count))
    if not flags & _HAS_PROOFS:
        raise InvalidInputError("A file of the shard has no verification entries.")
    proofs = tuple(next(records)[:32] for _ in range(count))
    if not flags & _HAS_SHA256:
        raise InvalidInputError("A file of the shard has no sha256.")
    return ShardFile(format_hash(header[:32]), format_hash(next(records)[:32]), terms, proofs)


def _read_records(shard: bytes) -> Iterator[bytes]:
    for start in range(RECORD_BYTES, len(shard) - RECORD_BYTES + 1, RECORD_BYTES):
        yield shard[start : start + RECORD_BYTES]
    raise InvalidInputError("The shard is cut short.")


def _read_term(record: bytes) -> Term:
    _, size_bytes, first, end = struct.unpack_from("<IIII", record, 32)
    return Term(format_hash(record[:32]), size_bytes, first, end)
