"""Reads safetensors files tensor by tensor, straight into memory that is already there.

The format: 8 bytes header length, a JSON header of name -> dtype, shape, offsets, then the data
(https://github.com/huggingface/safetensors#format).
"""

import ctypes
import json
import math
import mmap
import os
import struct
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PIECE_BYTES = 8 * 2**20  # what a thread reads at a time
_MAX_THREADS = 4
_MADV_POPULATE_WRITE = 23  # of Linux 5.14


class WeightFile:
    """A file that is opened once, read from several threads, and closed with the last tensor that lies in it.

    What it reads is the file that was opened, whatever takes its name later. Reading rather than mapping it costs one
    page fault less per page, and a file that became shorter is an error instead of the end of the process.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is missing, though the checkpoint's index names it.")
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        self._state_when_opened = self._state()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when Python ends
        if self._descriptor >= 0:
            close(self._descriptor)

    @property
    def size_bytes(self) -> int:
        """As it was when it was opened."""
        return self._state_when_opened[0]

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was written to since it was opened."""
        if self._state() != self._state_when_opened:
            raise CheckpointError(f"{self.path} was changed while the model was in use; load the model again.")

    def announce(self, offset: int, size_bytes: int) -> None:
        """Let the system start to read from `offset` on, which it then does beside us, all that was announced at once.

        A hint: where it is not taken, reading takes longer.
        """
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` with the bytes from `offset` on.

        Raises:
            CheckpointError: If the file ends before.
        """
        done = 0
        while done < len(memory):
            count = self._read_some(memory[done:], offset + done)
            if not count:
                raise CheckpointError(f"{self.path} ended while it was read.")
            done += count

    def _read_some(self, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [memory], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(memory))
        memory[: len(data)] = data
        return len(data)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


class StoredTensor(NamedTuple):
    """Where one tensor lies. `dtype` is None for a format this module does not read."""

    name: str
    file: WeightFile
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def path(self) -> str:
        """Of its file."""
        return self.file.path

    def row(self, index: int) -> "StoredTensor":
        """`self[index]`, along the first dimension."""
        size = self.size_bytes // self.shape[0]
        return self._replace(shape=self.shape[1:], offset=self.offset + index * size, size_bytes=size)

    def announce(self) -> None:
        """Let the system start to read it; see `WeightFile.announce`."""
        self.file.announce(self.offset, self.size_bytes)

    def read_into(self, target: Tensor) -> None:
        """Fill `target`, which has this tensor's shape; converts where dtype or device differ."""
        if self._is_copied(target):
            self._fill(target)
        else:
            target.copy_(self.read())

    def _is_copied(self, target: Tensor) -> bool:
        """Whether `target` takes the bytes as they are."""
        return target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()

    def read(self) -> Tensor:
        """The tensor in its own dtype, in newly allocated memory on the CPU.

        Raises:
            CheckpointError: If the dtype is none that hub_moe reads.
        """
        if self.dtype is None:
            raise CheckpointError(f"{self.path}: tensor {self.name!r} is of a type that hub_moe does not read.")
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self._fill(tensor)
        return tensor

    def _fill(self, tensor: Tensor) -> None:
        if self.size_bytes:
            self.file.read_into(bytes_of(tensor), self.offset)


class _Run(NamedTuple):
    """Bytes that lie together in a file and shall lie together from `start` on in memory."""

    file: WeightFile
    offset: int
    start: int
    size_bytes: int


def reading_threads() -> ThreadPoolExecutor:
    """As many as help: they copy from the page cache, or wait for the disk."""
    return ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "hub_moe-reading")


def read_in_a_row(tensors: Sequence[StoredTensor], target: Tensor, threads: Executor | None) -> bool:
    """Fill `target` with the tensors one behind the other, piece by piece in `threads`.

    Returns:
        False, and nothing done, if they have to be converted on the way.
    """
    if not all(tensor._is_copied(target) for tensor in tensors):
        return False
    memory, address = bytes_of(target), target.data_ptr()

    def read(piece: list[_Run]) -> None:
        _make_pages(address + piece[0].start, sum(run.size_bytes for run in piece))
        for run in piece:
            run.file.read_into(memory[run.start : run.start + run.size_bytes], run.offset)

    pieces = _cut(_join(tensors))
    if threads is None or len(pieces) < 2:
        for piece in pieces:
            read(piece)
    else:
        for done in wait([threads.submit(read, piece) for piece in pieces]).done:
            done.result()
    return True


def _join(tensors: Iterable[StoredTensor]) -> list[_Run]:
    runs: list[_Run] = []
    start = 0
    for _, file, _, _, offset, size in tensors:
        last = runs[-1] if runs else None
        if last is not None and last.file is file and last.offset + last.size_bytes == offset:
            runs[-1] = last._replace(size_bytes=last.size_bytes + size)
        elif size:
            runs.append(_Run(file, offset, start, size))
        start += size
    return runs


def _cut(runs: Iterable[_Run]) -> list[list[_Run]]:
    """Runs that fill `_PIECE_BYTES` of memory each."""
    pieces: dict[int, list[_Run]] = defaultdict(list)
    for file, offset, start, size in runs:
        done = 0
        while done < size:
            piece, behind = divmod(start + done, _PIECE_BYTES)
            count = min(size - done, _PIECE_BYTES - behind)
            pieces[piece].append(_Run(file, offset + done, start + done, count))
            done += count
    return list(pieces.values())


def _make_pages(address: int, size_bytes: int) -> None:
    """Have the system make the pages of fresh memory at once: a page fault for each costs more than copying into it.

    Only a hint: what it does not do, on other systems or for lack of memory, happens when the pages are written.
    """
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and first < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_POPULATE_WRITE)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def find_weight_files(folder: Path) -> list[str]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        CheckpointError: If there are none, or the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index: a JSON object with 'weight_map' was expected.") from error
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}; a checkpoint in safetensors format was expected.")
    return [str(folder / name) for name in names]


def read_headers(paths: Iterable[str]) -> dict[str, StoredTensor]:
    """Every tensor in the files, by name; reads no tensor data.

    Raises:
        CheckpointError: If a file is truncated or no safetensors file.
    """
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        stored.update(_read_header(path))
    return stored


def _read_header(path: str) -> dict[str, StoredTensor]:
    file = WeightFile(path)
    start = bytearray(8)
    length = 0
    if file.size_bytes >= len(start):
        file.read_into(memoryview(start), 0)
        length = struct.unpack("<Q", start)[0]
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise CheckpointError(f"{path} is truncated or no safetensors file: its header does not fit in it.")
    text = bytearray(length)
    file.read_into(memoryview(text), 8)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON.") from error
    header.pop("__metadata__", None)
    stored = {name: _stored_tensor(name, file, entry, 8 + length) for name, entry in header.items()}
    data_end = max((tensor.offset + tensor.size_bytes for tensor in stored.values()), default=8 + length)
    if data_end != file.size_bytes:
        fault = "truncated" if data_end > file.size_bytes else "too long"
        raise CheckpointError(
            f"{path} is {fault}: its header promises {data_end:,} bytes and it has {file.size_bytes:,}."
        )
    return stored


def _stored_tensor(name: str, file: WeightFile, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{file.path}: tensor {name!r} of shape {shape} does not fill its {end - begin:,} bytes.")
    return StoredTensor(name, file, dtype, shape, data_start + begin, end - begin)
