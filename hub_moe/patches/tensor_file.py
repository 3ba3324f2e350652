"""Where tensors lie in a safetensors file, read without torch and before anything else trusts the file.

The format: 8 bytes header length, a JSON header of name -> dtype, shape, offsets, then the data
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

# what safetensors calls a dtype -> what torch calls it, and its size in bytes
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorPlace:
    """One tensor's bytes in a file. `dtype` is torch's name, or safetensors' own where this project reads it not."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def hash(self) -> str:
        """sha256 of the bytes, in hexadecimal; they are read in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return _hash_next(file, self.size_bytes)


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of a file by name; reads the header only, and checks that data and header fill the file exactly.

    Raises:
        CheckpointError: If the file is truncated, too long, or no safetensors file; the message names the tensor at
            fault where one is.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file_size - 8):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: it has {file_size:,} bytes and a header of {length:,}."
            )
        header = _parse_header(path, file.read(length))
    places = [_place(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    end = 8 + length
    for place in sorted(places, key=lambda place: (place.offset, place.size_bytes)):
        if place.offset != end:
            raise CheckpointError(f"{path}: tensor {place.name!r} overlaps another or leaves a gap before it.")
        end += place.size_bytes
        if end > file_size:
            raise CheckpointError(f"{path} is truncated: it ends at {file_size:,} bytes, in tensor {place.name!r}.")
    if end != file_size:
        raise CheckpointError(f"{path} is too long: its header promises {end:,} bytes and it has {file_size:,}.")
    return {place.name: place for place in places}


def hash_file(path: Path) -> str:
    """sha256 of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not sound JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON object.")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name stands in it twice")
    return fields


def _place(path: Path, name: str, entry: Any, data_start: int) -> TensorPlace:
    try:
        code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for tensor {name!r} lacks dtype, shape or offsets."
        ) from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or not isinstance(code, str):
        raise CheckpointError(f"{path}: the header's entry for tensor {name!r} holds no sound dtype, shape or offsets.")
    dtype, item_bytes = _DTYPES.get(code, (code, 0))
    if end < begin or (item_bytes and math.prod(shape) * item_bytes != end - begin):
        raise CheckpointError(f"{path}: tensor {name!r} of shape {list(shape)} does not fill {end - begin:,} bytes.")
    return TensorPlace(name, path, dtype, shape, data_start + begin, end - begin)


def _hash_next(file: BinaryIO, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(file, size_bytes):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    while size_bytes:
        piece = file.read(min(size_bytes, _CHUNK_BYTES))
        if not piece:
            raise CheckpointError(f"{file.name} ended while a tensor was read.")
        size_bytes -= len(piece)
        yield piece
