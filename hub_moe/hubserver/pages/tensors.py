"""The tensors of a safetensors file, from its header."""

import json
import math
from dataclasses import dataclass

from ..cards import read_shape


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def parse_header(header: bytes) -> tuple[list[Tensor], dict[str, str]] | None:
    """The tensors in the order of their bytes, and the file's own notes; None if the header is malformed."""
    try:
        found = json.loads(header)
        notes = {str(key): str(value) for key, value in found.pop("__metadata__", {}).items()}
        rows = [(one["data_offsets"][0], _tensor(name, one)) for name, one in found.items()]
        rows.sort(key=lambda row: (row[0], row[1].name))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        return None
    return [tensor for _, tensor in rows], notes


def _tensor(name: str, fields: dict[str, object]) -> Tensor:
    return Tensor(name, str(fields["dtype"])[:16], read_shape(fields["shape"]))
