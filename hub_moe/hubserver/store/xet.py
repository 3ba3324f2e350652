"""What clients with hf_xet upload: chunks packed into xorbs, and shards that say which chunks make up which file.

Each file of a shard is put together at once, under its verified sha256, so that it is served like every other large
file. Xorbs are kept, because clients refer to chunks that they sent earlier. Formats: Hugging Face's Xet protocol
specification 1.1 (hub-docs, docs/xet/xorb.md and shard.md). Not done: checking a xorb's own BLAKE3 name; a false one
can make an upload fail, but no file becomes visible whose sha256 is wrong.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import lz4.frame

from .blobs import BlobStore, IncomingFile
from .commits import Commits
from .database import Database
from .errors import InvalidInputError, NotFoundError, TooLargeError

MAX_XORB_BYTES = 80 << 20
MAX_SHARD_BYTES = 256 << 20
_MAX_CHUNKS = 16_384
_MAX_FILE_BYTES = 1 << 40
_SHARD_TAG = b"HFRepoMetaData\0\x55\x69\x67\x45\x6a\x7b\x81\x57\x83\xa5\xbd\xd9\x5c\xcd\xd1\x4a\xa9"
_BOOKEND = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30
_RECORD_BYTES = 48
_CHUNK_HEADER_BYTES = 8
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb."""

    xorb: str
    size_bytes: int
    first: int
    end: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    name: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size_bytes(self) -> int:
        """The size of the whole file."""
        return sum(term.size_bytes for term in self.terms)


class XetStore:
    """Xorbs on disk, and the way from a shard to whole files."""

    def __init__(self, folder: Path, database: Database, blobs: BlobStore, commits: Commits) -> None:
        self._database = database
        self._folder = folder
        self._blobs = blobs
        self._commits = commits

    def add_xorb(self, name: str, body: IO[bytes]) -> bool:
        """Keep a xorb; False if one of this name is here already. InvalidInputError if it is malformed."""
        path = self.xorb_path(name)
        if path.exists():
            return False
        size_bytes = body.seek(0, 2)
        if size_bytes > MAX_XORB_BYTES:
            raise TooLargeError(f"A xorb has at most {MAX_XORB_BYTES} bytes.")
        find_chunks(body)
        body.seek(0)
        with IncomingFile(self._blobs.incoming, path, size_bytes=size_bytes) as incoming:
            while piece := body.read(1 << 20):
                incoming.write(piece)
            incoming.finish()
        return True

    def add_shard(self, repo_uid: str, body: bytes) -> None:
        """Put together every file of a shard and register it with a repo."""
        for file in parse_shard(body):
            if file.size_bytes > _MAX_FILE_BYTES:
                raise TooLargeError(f"A file has at most {_MAX_FILE_BYTES} bytes.")
            if self._blobs.size_bytes(file.sha256) is None or not self._commits.has_uploaded(repo_uid, file.sha256):
                self._blobs.store(self._read(file), sha256=file.sha256, size_bytes=file.size_bytes)
            self._commits.register(repo_uid, file.sha256)
            self._remember(file)

    def names(self, sha256s: Iterable[str]) -> dict[str, str]:
        """By sha256, the Xet names of those files that came by Xet."""
        found = {}
        for sha256 in set(sha256s):
            row = self._database.row("SELECT name FROM xet_files WHERE sha256 = ?", sha256)
            if row is not None:
                found[sha256] = row["name"]
        return found

    def find_file(self, repo_uid: str, name: str) -> ShardFile:
        """A file of a repo by its Xet name, with the terms it is made of."""
        row = self._database.row("SELECT sha256, terms FROM xet_files WHERE name = ?", name)
        if row is None or not self._commits.has_uploaded(repo_uid, row["sha256"]):
            raise NotFoundError("upload", f"This repo has no file with the Xet name {name[:64]}.")
        return ShardFile(name, row["sha256"], tuple(Term(*term) for term in json.loads(row["terms"])))

    def locate(self, name: str, first: int, end: int) -> tuple[int, int]:
        """The first and last byte of a run of chunks inside a xorb."""
        with self.xorb_path(name).open("rb") as xorb:
            chunks = find_chunks(xorb)
        start, (last, packed, _, _) = chunks[first][0], chunks[end - 1]
        return start - _CHUNK_HEADER_BYTES, last + packed - 1

    def _remember(self, file: ShardFile) -> None:
        terms = json.dumps([[term.xorb, term.size_bytes, term.first, term.end] for term in file.terms])
        with self._database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO xet_files VALUES (?, ?, ?)", (file.sha256, file.name, terms))

    def _read(self, file: ShardFile) -> Iterator[bytes]:
        for term in file.terms:
            try:
                xorb = self.xorb_path(term.xorb).open("rb")
            except FileNotFoundError:
                raise InvalidInputError(f"The xorb {term.xorb} has not been uploaded.") from None
            with xorb:
                yield from read_term(xorb, term)

    def xorb_path(self, name: str) -> Path:
        """Where a xorb lies, or would lie."""
        if not _HASH.fullmatch(name):
            raise InvalidInputError(f"{name[:80]!r} is not the name of a xorb: expected 64 lower-case hex digits.")
        return self._folder / name[:2] / name[2:4] / name


def find_chunks(xorb: IO[bytes]) -> list[tuple[int, int, int, int]]:
    """Of each chunk: where its data starts, its size there, its scheme, and its size when unpacked."""
    end = xorb.seek(0, 2)
    chunks: list[tuple[int, int, int, int]] = []
    position = 0
    while position < end:
        xorb.seek(position)
        header = xorb.read(8)
        if header.startswith(b"XETBLOB"):  # an optional index, which we do not need
            break
        if len(header) < 8 or header[0] != 0 or header[4] > 2 or len(chunks) >= _MAX_CHUNKS:
            raise InvalidInputError(f"The xorb is malformed at byte {position}.")
        packed, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
        position += 8 + packed
        chunks.append((position - packed, packed, header[4], size))
    if not chunks or position > end:
        raise InvalidInputError("The xorb is cut short.")
    return chunks


def read_term(xorb: IO[bytes], term: Term) -> Iterator[bytes]:
    """The unpacked chunks of a term; InvalidInputError unless they have the promised size."""
    chunks = find_chunks(xorb)
    if not term.first < term.end <= len(chunks):
        raise InvalidInputError(f"The xorb {term.xorb} has no chunks {term.first} to {term.end}.")
    size_bytes = 0
    for start, packed, scheme, size in chunks[term.first : term.end]:
        xorb.seek(start)
        chunk = unpack_chunk(xorb.read(packed), scheme=scheme, size_bytes=size)
        size_bytes += len(chunk)
        yield chunk
    if size_bytes != term.size_bytes:
        raise InvalidInputError(f"A term of the xorb {term.xorb} has {size_bytes} bytes, not {term.size_bytes}.")


def unpack_chunk(data: bytes, *, scheme: int, size_bytes: int) -> bytes:
    """A chunk's bytes. Scheme 0 is plain, 1 an LZ4 frame, 2 an LZ4 frame of the bytes grouped by position modulo 4."""
    if scheme:
        try:
            data = lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size_bytes + 1)
        except RuntimeError as error:
            raise InvalidInputError(f"A chunk is not valid LZ4: {error}") from None
    if len(data) != size_bytes:
        raise InvalidInputError(f"A chunk has not the {size_bytes} bytes that its header says.")
    if scheme == 2:
        whole, start = bytearray(size_bytes), 0
        for place in range(4):
            length = (size_bytes - place + 3) // 4
            whole[place::4] = data[start : start + length]
            start += length
        return bytes(whole)
    return data


def parse_shard(shard: bytes) -> list[ShardFile]:
    """The files that a shard describes. Each must carry its sha256."""
    if len(shard) < 2 * _RECORD_BYTES or shard[:32] != _SHARD_TAG:
        raise InvalidInputError("This is not a shard.")
    records = _Records(shard)
    files = []
    while (header := records.next())[:32] != _BOOKEND:
        flags, count = struct.unpack_from("<II", header, 32)
        terms = tuple(_read_term_record(records.next()) for _ in range(count))
        if flags & _HAS_VERIFICATION:
            for _ in range(count):
                records.next()
        if not flags & _HAS_SHA256:
            raise InvalidInputError("A file of the shard has no sha256.")
        files.append(ShardFile(_format_hash(header[:32]), _format_hash(records.next()[:32]), terms))
    return files


class _Records:
    """The 48-byte records after a shard's header, one after another."""

    def __init__(self, shard: bytes) -> None:
        self._shard = shard
        self._position = _RECORD_BYTES

    def next(self) -> bytes:
        record = self._shard[self._position : self._position + _RECORD_BYTES]
        if len(record) < _RECORD_BYTES:
            raise InvalidInputError("The shard is cut short.")
        self._position += _RECORD_BYTES
        return record


def _read_term_record(record: bytes) -> Term:
    _, size_bytes, first, end = struct.unpack_from("<IIII", record, 32)
    return Term(_format_hash(record[:32]), size_bytes, first, end)


def _format_hash(raw: bytes) -> str:
    """Xet writes a hash as four little-endian 64-bit numbers in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack("<QQQQ", raw))
