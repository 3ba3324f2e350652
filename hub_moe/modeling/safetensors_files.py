"""Reads safetensors files tensor by tensor, straight into memory that is already there.

The format: 8 bytes header length, a JSON header of name -> dtype, shape, offsets, then the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. `dtype` is None for a format this module does not read."""

    name: str
    path: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def read_into(self, target: Tensor) -> None:
        """Fill `target`, which has this tensor's shape; converts where dtype or device differ."""
        if target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous():
            self._fill(target)
        else:
            target.copy_(self.read())

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
        if not self.size_bytes:
            return
        view = bytes_of(tensor)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            done = 0
            while done < self.size_bytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{self.path} ended while tensor {self.name!r} was read.")
                done += count


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


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
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing, though the checkpoint's index names it.")
    file_size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_size - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file: its header does not fit in it.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} is no safetensors file: its header is not JSON.") from error
    header.pop("__metadata__", None)
    stored = {name: _stored_tensor(name, path, entry, 8 + length) for name, entry in header.items()}
    data_end = max((tensor.offset + tensor.size_bytes for tensor in stored.values()), default=8 + length)
    if data_end != file_size:
        fault = "truncated" if data_end > file_size else "too long"
        raise CheckpointError(f"{path} is {fault}: its header promises {data_end:,} bytes and it has {file_size:,}.")
    return stored


def _stored_tensor(name: str, path: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{path}: tensor {name!r} of shape {shape} does not fill its {end - begin:,} bytes.")
    return StoredTensor(name, path, dtype, shape, data_start + begin, end - begin)
