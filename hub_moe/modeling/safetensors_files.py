"""Reads safetensors files tensor by tensor, straight into memory that is already there.

The format: 8 bytes header length, a JSON header of name -> dtype, shape, offsets, then the data
(https://github.com/huggingface/safetensors#format).
"""

import ctypes
import gc
import json
import math
import mmap
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
PIECE_BYTES = 8 * 2**20  # what a thread reads at a time
_MAX_THREADS = 4
_MADV_POPULATE_WRITE = 23  # of Linux 5.14

_madvise: Any = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


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


_Wanted = tuple[Sequence[StoredTensor], Tensor]  # what lies one behind the other in the tensor that is the target
_COUNT_LOCK = threading.Lock()
_loads = 0  # that run now
_threshold = 0


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Let Python start no search for garbage, in any thread, while something loads.

    Loading makes thousands of objects that are none, and to look through all there are takes as long as reading.
    """
    global _loads, _threshold
    with _COUNT_LOCK:
        if _loads == 0:
            _threshold, *others = gc.get_threshold()
            gc.set_threshold(0, *others)
        _loads += 1
    try:
        yield
    finally:
        with _COUNT_LOCK:
            _loads -= 1
            if _loads == 0:
                gc.set_threshold(_threshold, *gc.get_threshold()[1:])


@contextmanager
def reading_threads() -> Iterator[ThreadPoolExecutor]:
    """As many as help: they copy from the page cache, or wait for the disk. What is unread in the end stays so."""
    threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "hub_moe-reading")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def read_in_a_row(tensors: Sequence[StoredTensor], target: Tensor, threads: Executor | None) -> bool:
    """Fill `target` with the tensors one behind the other, piece by piece in `threads`.

    Returns:
        False, and nothing done, if they have to be converted on the way.
    """
    if not all(tensor._is_copied(target) for tensor in tensors):
        return False
    pieces = _cut([(tensors, target)])
    if threads is None or len(pieces) < 2:
        for piece in pieces:
            piece.read()
    else:
        finish([threads.submit(piece.read) for piece in pieces])
    return True


def begin_reading(wanted: Sequence[_Wanted], threads: Executor) -> list[list[Future[None]]]:
    """Let `threads` fill each target with its tensors, all of which have its dtype; returns at once.

    Returns:
        For each target what `finish` waits for.
    """
    reading: list[list[Future[None]]] = [[] for _ in wanted]
    for piece in _cut(wanted):
        future = threads.submit(piece.read)
        for place in piece.places:
            reading[place].append(future)
    return reading


def finish(reading: Iterable[Future[None]]) -> None:
    """Wait for what was begun, and raise what the first that failed raised, CancelledError if loading was given up."""
    for each in reading:
        each.result()  # which, unlike `concurrent.futures.wait`, a cancelled one wakes


class _Piece:
    """Bytes that lie together in a file, and the memory that they go to, of one target or several."""

    def __init__(self, file: WeightFile, offset: int) -> None:
        self.file, self._offset, self.end = file, offset, offset
        self._memories: list[memoryview] = []
        self.places: set[int] = set()

    def room(self, file: WeightFile, offset: int) -> int:
        """How many of the bytes from `offset` on may still be added."""
        continues = file is self.file and offset == self.end
        return PIECE_BYTES - (self.end - self._offset) if continues else 0

    def add(self, memory: memoryview, place: int) -> None:
        """Let the next bytes go to `memory`, which is of the target at `place`."""
        self._memories.append(memory)
        self.places.add(place)
        self.end += len(memory)

    def read(self) -> None:
        """Fill the memory."""
        offset = self._offset
        for memory in self._memories:
            _make_pages(memory)
            self.file.read_into(memory, offset)
            offset += len(memory)


def _cut(wanted: Sequence[_Wanted]) -> list[_Piece]:
    """What lies in the files for the targets, in the order of the files."""
    runs: list[tuple[StoredTensor, memoryview, int]] = []
    for place, (tensors, target) in enumerate(wanted):
        memory, start = bytes_of(target), 0
        for tensor in tensors:
            runs.append((tensor, memory[start : start + tensor.size_bytes], place))
            start += tensor.size_bytes
    pieces: list[_Piece] = []
    for tensor, memory, place in sorted(runs, key=lambda run: (run[0].path, run[0].offset)):
        done = 0
        while done < len(memory):
            room = pieces[-1].room(tensor.file, tensor.offset + done) if pieces else 0
            if room == 0:
                pieces.append(_Piece(tensor.file, tensor.offset + done))
                room = PIECE_BYTES
            pieces[-1].add(memory[done : done + room], place)
            done += room
    return pieces


def _make_pages(memory: memoryview) -> None:
    """Have the system make the pages of fresh memory at once: a page fault for each costs more than copying into it.

    Only a hint: what it does not do, on other systems or for lack of memory, happens when the pages are written.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first, end = -(-address // mmap.PAGESIZE), (address + len(memory)) // mmap.PAGESIZE
    if _madvise is not None and first < end:
        _madvise(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, _MADV_POPULATE_WRITE)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` times the scale of its block, in `dtype`; the last block of a row or column may be partial.

    Args:
        weight: FP8 matrix of shape (rows, columns).
        scale: float32, one per block, of shape (ceil(rows / b), ceil(columns / b)) for the block side b
            (128 in DeepSeek-V3, arXiv:2412.19437 section 3.3.2).

    Raises:
        CheckpointError: If no power of two explains the number of blocks.
    """
    if weight.dim() != 2 or scale.dim() != 2:
        raise CheckpointError(
            f"FP8 weights and scales must be matrices, not of shapes {tuple(weight.shape)} and {tuple(scale.shape)}."
        )
    rows, columns = (_block_side(weight.shape[axis], scale.shape[axis]) for axis in (0, 1))
    values = _fp8_to_float32(weight)
    scale_per_column = scale.to(torch.float32).repeat_interleave(columns, dim=1)[:, : weight.shape[1]]
    for block, factors in zip(values.split(rows), scale_per_column, strict=True):
        block.mul_(factors)
    return values.to(dtype)


def _fp8_to_float32(weight: Tensor) -> Tensor:
    """By table: torch converts FP8 on the CPU one number at a time, four times slower."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(weight.dtype).to(torch.float32).numpy()
    return torch.from_numpy(table[weight.view(torch.uint8).numpy()])


def _block_side(size: int, num_blocks: int) -> int:
    """The power of two that cuts `size` into `num_blocks` blocks, the last of them perhaps partial."""
    block = 1
    while -(-size // block) > num_blocks:
        block *= 2
    if -(-size // block) != num_blocks:
        raise CheckpointError(f"A side of {size} cannot be cut into {num_blocks} FP8 blocks of a power of two.")
    return block


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
