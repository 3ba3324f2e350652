"""Xorbs on disk: each under its verified name, whole or absent, with an index that finds any chunk at once."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import BinaryIO

from .blobs import COPY_BYTES, NewFile, make_folder
from .errors import InvalidInputError, NotFoundError, TooLargeError
from .xet_hashes import check_name, format_hash, hash_xorb
from .xorb_format import TRAILER_BYTES, XorbIndex, XorbReader, count_index_bytes, unpack_index, unpack_run

MAX_XORB_BYTES = 80 << 20
_MAX_CACHED_CHUNKS = 1 << 19
_Stamp = tuple[int, int]  # by which a file that was put in place of another is told from it


class XorbStore:
    """Xorbs under `root`, each at `ab/cd/<name>`."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self.root = root
        self._incoming = incoming
        self._indexes: OrderedDict[str, tuple[_Stamp, XorbIndex]] = OrderedDict()
        self._cached_chunks = 0
        self._lock = Lock()
        self._publishing = Lock()
        make_folder(root)

    def path(self, name: str) -> Path:
        """Where the xorb of this name lies, or would lie."""
        check_name(name)
        return self.root / name[:2] / name[2:4] / name

    def has(self, name: str) -> bool:
        """Whether a xorb is here."""
        return self.path(name).is_file()

    def open(self, name: str) -> BinaryIO:
        """The file of a stored xorb; NotFoundError("upload") if it is not here."""
        try:
            return self.path(name).open("rb")
        except FileNotFoundError:
            raise NotFoundError("upload", f"The xorb {name} has not been uploaded.") from None

    def receive(self, name: str) -> "IncomingXorb":
        """A place to write a xorb into; it becomes visible by `finish` if its name is true."""
        return IncomingXorb(self._incoming, self._publish, name)

    def _publish(self, file: NewFile, name: str) -> None:
        """Chunks packed in another way have the same name: the first stay, because links and readers count on them."""
        with self._publishing:
            if not self.has(name):
                file.publish(self.path(name))

    def index(self, name: str) -> XorbIndex:
        """The index of a stored xorb; NotFoundError("upload") if it is not here."""
        try:
            known = self._recall(name, self.path(name).stat())  # a shard may ask a million times
        except FileNotFoundError:
            known = None
        if known is not None:
            return known
        with self.open(name) as file:
            return self._index_of(name, file)

    def read(self, name: str, first: int, end: int) -> memoryview:
        """The unpacked chunks `first` to `end` (exclusive), all at once; `split` says how many are few enough."""
        with self.open(name) as file:
            index = self._index_of(name, file)
            data = os.pread(file.fileno(), index.ends[end] - index.ends[first], index.ends[first])
        return unpack_run(data, size_bytes=index.size_bytes(first, end))

    def split(self, name: str, first: int, end: int, *, size_bytes: int = COPY_BYTES) -> Iterator[tuple[str, int, int]]:
        """A run of chunks in runs of at most `size_bytes` unpacked bytes, as `read` takes them."""
        ends = self.index(name).unpacked_ends
        while first < end:
            last = first + 1
            while last < end and ends[last + 1] - ends[first] <= size_bytes:
                last += 1
            yield name, first, last
            first = last

    def is_true(self, name: str) -> bool:
        """Whether a stored xorb still is what its name says; reads it through."""
        reader = XorbReader()
        try:
            with self.open(name) as file:
                index = _read_index(file)
                for start in range(0, index.ends[-1], COPY_BYTES):
                    reader.feed(os.pread(file.fileno(), min(COPY_BYTES, index.ends[-1] - start), start))
            reader.finish()
        except InvalidInputError:
            return False
        return reader.index == index and format_hash(hash_xorb(index.nodes())) == name

    def all(self) -> Iterator[str]:
        """The name of every stored xorb."""
        for path in self.root.glob("??/??/*"):
            yield path.name

    def delete(self, name: str) -> int:
        """Remove a xorb; the bytes that this freed."""
        path = self.path(name)
        size_bytes = path.stat().st_size
        path.unlink()
        with self._lock:
            self._forget(name)
        return size_bytes

    def _index_of(self, name: str, file: BinaryIO) -> XorbIndex:
        """The index of an open xorb. A remembered one is good for the same file only: `hub gc` may have deleted it."""
        status = os.fstat(file.fileno())
        known = self._recall(name, status)
        if known is not None:
            return known
        index = _read_index(file)
        with self._lock:
            self._forget(name)
            self._indexes[name] = (status.st_ino, status.st_mtime_ns), index
            self._cached_chunks += len(index)
            while self._cached_chunks > _MAX_CACHED_CHUNKS:
                self._forget(next(iter(self._indexes)))
        return index

    def _recall(self, name: str, status: os.stat_result) -> XorbIndex | None:
        with self._lock:
            stamp, index = self._indexes.get(name, (None, None))
            if stamp != (status.st_ino, status.st_mtime_ns):
                return None
            self._indexes.move_to_end(name)
            return index

    def _forget(self, name: str) -> None:
        known = self._indexes.pop(name, None)
        self._cached_chunks -= len(known[1]) if known else 0


def _read_index(file: BinaryIO) -> XorbIndex:
    size_bytes = file.seek(0, os.SEEK_END)
    trailer = os.pread(file.fileno(), TRAILER_BYTES, max(0, size_bytes - TRAILER_BYTES))
    length = min(count_index_bytes(trailer), size_bytes)
    return unpack_index(os.pread(file.fileno(), length, size_bytes - length))


class IncomingXorb:
    """A xorb on its way in, unpacked and hashed as it is written; deleted unless finished."""

    def __init__(self, folder: Path, publish: Callable[[NewFile, str], None], name: str) -> None:
        check_name(name)
        self._publish = publish
        self._name = name
        self._reader = XorbReader()
        self._written_bytes = 0
        self._file = NewFile(folder)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; InvalidInputError as soon as a chunk is malformed."""
        self._written_bytes += len(data)
        if self._written_bytes > MAX_XORB_BYTES:
            raise TooLargeError(f"A xorb has at most {MAX_XORB_BYTES} bytes.")
        self._reader.feed(data)
        self._file.write(data)

    def finish(self) -> None:
        """Give the xorb its name, if none has it yet; InvalidInputError if its chunks have another."""
        self._reader.finish()
        index = self._reader.index
        name = format_hash(hash_xorb(index.nodes()))
        if name != self._name:
            raise InvalidInputError(f"The chunks of this xorb have the hash {name}, not {self._name}.")
        self._file.truncate(index.ends[-1])
        self._file.write(index.pack())
        self._publish(self._file, name)

    def __enter__(self) -> "IncomingXorb":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
