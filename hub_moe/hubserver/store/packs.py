"""A pack on its way into a repository: git objects in one file, of which nothing is visible until it is finished."""

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dulwich.pack import write_pack_index_v2

from .blobs import COPY_BYTES, move_into_place, sync_folder

TYPE_NAMES = {1: b"commit", 2: b"tree", 3: b"blob", 4: b"tag"}
COMMIT, TREE, BLOB, TAG = TYPE_NAMES
_PREFIX = "tmp_obj_"  # what a killed server leaves by this name is deleted at the next start


@dataclass(frozen=True, slots=True)
class _Place:
    type_num: int
    size_bytes: int
    offset: int
    data_offset: int
    end: int
    crc: int


class PackWriter:
    """Appends whole objects, without deltas: reading one back never needs another."""

    def __init__(self, objects: Path) -> None:
        self._folder = objects / "pack"
        descriptor, name = tempfile.mkstemp(dir=objects, prefix=_PREFIX)
        self._path = Path(name)
        self._file = os.fdopen(descriptor, "w+b")
        self._end = self._file.write(pack_header(0))
        self._places: dict[bytes, _Place] = {}

    def __contains__(self, oid: str) -> bool:
        return bytes.fromhex(oid) in self._places

    def __iter__(self) -> Iterator[str]:
        return (raw.hex() for raw in self._places)

    def add(self, oid: str, type_num: int, content: bytes, *, compressed: bytes | None = None) -> None:
        """Append an object; `compressed` is its content as a zlib stream, where that exists already."""
        stream = zlib.compress(content) if compressed is None else compressed
        header = object_header(type_num, len(content))
        start, end = self._end + len(header), self._end + len(header) + len(stream)
        crc = zlib.crc32(stream, zlib.crc32(header))
        self._file.write(header)
        self._file.write(stream)
        self._places[bytes.fromhex(oid)] = _Place(type_num, len(content), self._end, start, end, crc)
        self._end = end

    def read(self, oid: str) -> tuple[int, bytes] | None:
        """The type and content of an object that was added, None for another."""
        place = self._places.get(bytes.fromhex(oid))
        if place is None:
            return None
        self._file.flush()
        stream = os.pread(self._file.fileno(), place.end - place.data_offset, place.data_offset)
        return place.type_num, zlib.decompress(stream, bufsize=max(1, place.size_bytes))

    def type_of(self, oid: str) -> int | None:
        """The type of an object that was added, None for another."""
        place = self._places.get(bytes.fromhex(oid))
        return place.type_num if place else None

    def finish(self) -> Path:
        """Make the objects part of the repository, so that a crash leaves all of them or none; the new pack."""
        self._file.seek(0)
        self._file.write(pack_header(len(self._places)))
        checksum = self._hash()
        self._file.seek(self._end)
        self._file.write(checksum)
        target = self._folder / f"pack-{checksum.hex()}.pack"
        self._path.chmod(0o644)
        index = self._write_index(checksum)
        move_into_place(self._file, self._path, target)
        os.replace(index, target.with_suffix(".idx"))
        sync_folder(self._folder)
        return target

    def discard(self) -> None:
        """Forget everything that was added and not finished."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _hash(self) -> bytes:
        digest = hashlib.sha1(usedforsecurity=False)
        self._file.flush()
        self._file.seek(0)
        while chunk := self._file.read(COPY_BYTES):
            digest.update(chunk)
        return digest.digest()

    def _write_index(self, checksum: bytes) -> Path:
        descriptor, name = tempfile.mkstemp(dir=self._folder.parent, prefix=_PREFIX)
        with os.fdopen(descriptor, "wb") as file:
            entries = [(raw, place.offset, place.crc) for raw, place in sorted(self._places.items())]
            write_pack_index_v2(file, entries, checksum)
            file.flush()
            os.fsync(file.fileno())
        path = Path(name)
        path.chmod(0o644)
        return path


def pack_header(count: int) -> bytes:
    """The first bytes of a pack of `count` objects (gitformat-pack)."""
    return struct.pack(">4sII", b"PACK", 2, count)


def object_header(type_num: int, size_bytes: int) -> bytes:
    """What stands before an object's zlib stream in a pack: type and size, seven bits to a byte."""
    header = bytearray()
    byte, rest = (type_num << 4) | (size_bytes & 15), size_bytes >> 4
    while rest:
        header.append(byte | 0x80)
        byte, rest = rest & 0x7F, rest >> 7
    header.append(byte)
    return bytes(header)


def hash_object(type_num: int, content: bytes) -> str:
    """The id of a git object."""
    digest = hashlib.sha1(b"%s %d\0" % (TYPE_NAMES[type_num], len(content)), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()
