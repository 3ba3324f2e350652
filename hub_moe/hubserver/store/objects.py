"""The git objects of one repository. What is written stays with its writer until `flush` makes it part of the repo."""

import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dulwich.object_store import DiskObjectStore
from dulwich.objects import ObjectID

from .blobs import move_into_place, sync_folder
from .packs import BLOB, COMMIT, TAG, TREE, TYPE_NAMES, PackWriter, hash_object

_LOOSE_OBJECTS = 64
_LOOSE_BYTES = 4 << 20
_TYPES = {name: number for number, name in TYPE_NAMES.items()}


class Objects:
    """Reads objects wherever they are; writes few of them as loose files and many as one pack."""

    def __init__(self, path: Path, stored: DiskObjectStore) -> None:
        self._path = path
        self._folder = str(path)  # joined as text: a Path for each object is slow
        self._stored = stored
        self._waiting: dict[str, tuple[int, bytes]] = {}
        self._waiting_bytes = 0
        self._pack: PackWriter | None = None

    def __contains__(self, oid: str) -> bool:
        return self.is_new(oid) or self.is_stored(oid)

    def is_new(self, oid: str) -> bool:
        """Whether an object was written here and not flushed yet."""
        return oid in self._waiting or (self._pack is not None and oid in self._pack)

    def new(self) -> Iterator[str]:
        """Every object that was written here and not flushed yet."""
        yield from self._waiting
        yield from self._pack or ()

    def is_stored(self, oid: str) -> bool:
        """Whether an object is part of the repository."""
        return os.path.exists(self._loose(oid)) or self._stored.contains_packed(ObjectID(oid.encode()))

    def read(self, oid: str) -> tuple[int, bytes]:
        """The type and content of an object; KeyError if there is none."""
        found = self._waiting.get(oid) or (self._pack and self._pack.read(oid))
        if found:
            return found
        try:
            with open(self._loose(oid), "rb") as file:
                return _parse_loose(file.read())
        except FileNotFoundError:
            return self._stored.get_raw(ObjectID(oid.encode()))

    def type_of(self, oid: str) -> int:
        """The type of an object; KeyError if there is none. Reads no more than it must."""
        if oid in self._waiting:
            return self._waiting[oid][0]
        if self._pack is not None and (found := self._pack.type_of(oid)):
            return found
        try:
            with open(self._loose(oid), "rb") as file:
                head = zlib.decompressobj().decompress(file.read(1024), 16)  # a Huffman table may come first
        except FileNotFoundError:
            return self._stored.get_raw(ObjectID(oid.encode()))[0]
        return _TYPES[head.partition(b" ")[0]]

    def write(self, type_num: int, content: bytes, *, compressed: bytes | None = None) -> str:
        """Add an object; its id. `compressed` is its content as a zlib stream, where that exists already."""
        oid = hash_object(type_num, content)
        if oid in self:
            return oid
        if self._pack is None and (len(self._waiting) >= _LOOSE_OBJECTS or self._waiting_bytes > _LOOSE_BYTES):
            self._pack = PackWriter(self._path)
            for waiting, (waiting_type, waiting_content) in self._waiting.items():
                self._pack.add(waiting, waiting_type, waiting_content)
            self._waiting.clear()
        if self._pack is None:
            self._waiting[oid] = (type_num, content)
            self._waiting_bytes += len(content)
        else:
            self._pack.add(oid, type_num, content, compressed=compressed)
        return oid

    def flush(self) -> None:
        """Make everything that was written part of the repository, for good: it survives a kill and a power cut."""
        if self._pack is not None:
            self._pack.finish()
            self._pack = None
        for group in _in_safe_order(self._waiting):
            folders = {self._write_loose(oid, *self._waiting[oid]) for oid in group}
            for folder in [*folders, self._path]:
                sync_folder(folder)
        self._forget_waiting()

    def discard(self) -> None:
        """Forget what was written and not flushed."""
        if self._pack is not None:
            self._pack.discard()
            self._pack = None
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._waiting_bytes = 0

    def _write_loose(self, oid: str, type_num: int, content: bytes) -> Path:
        """By a temporary name: unlike dulwich's lock files, nothing stays locked after a kill."""
        path = Path(self._loose(oid))
        path.parent.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._path, prefix="tmp_obj_")
        file = os.fdopen(descriptor, "wb")
        file.write(zlib.compress(b"%s %d\0" % (TYPE_NAMES[type_num], len(content)) + content))
        move_into_place(file, Path(name), path)
        return path.parent

    def _loose(self, oid: str) -> str:
        return f"{self._folder}/{oid[:2]}/{oid[2:]}"


def _in_safe_order(things: dict[str, tuple[int, bytes]]) -> Iterator[list[str]]:
    """Groups in which to write objects, so that a crash between two leaves no commit without what it needs."""
    if contents := [oid for oid, (type_num, _) in things.items() if type_num in {BLOB, TREE}]:
        yield contents
    left = {oid: _parents(content) for oid, (type_num, content) in things.items() if type_num == COMMIT}
    while left:
        ready = [oid for oid, parents in left.items() if not parents & left.keys()]
        yield ready
        left = {oid: parents for oid, parents in left.items() if oid not in ready}
    if tags := [oid for oid, (type_num, _) in things.items() if type_num == TAG]:
        yield tags


def _parents(commit: bytes) -> set[str]:
    header = commit.partition(b"\n\n")[0].split(b"\n")
    return {line.removeprefix(b"parent ").decode() for line in header if line.startswith(b"parent ")}


def _parse_loose(stream: bytes) -> tuple[int, bytes]:
    header, _, content = zlib.decompress(stream).partition(b"\0")
    name, _, size = header.partition(b" ")
    if name not in _TYPES or size != b"%d" % len(content):
        raise ValueError("A loose object is damaged.")
    return _TYPES[name], content
