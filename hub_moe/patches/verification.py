"""Checks everything that can be checked of a patch, and says of each thing whether it is right."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base_files import find_fault, locate_tensors, read_checkpoint_places
from .expert_patch import check_places, find_non_finite
from .merging import read_tensor
from .metadata import METADATA_FILE, WEIGHTS_FILE, PatchMetadata
from .tensor_file import hash_file, read_places


@dataclass(frozen=True)
class Check:
    """One thing that was checked; `fault` is None where it is right. `tensor` is what it was checked of, if one."""

    what: str
    fault: str | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class Verification:
    """All checks of a patch."""

    checks: tuple[Check, ...]

    @property
    def is_right(self) -> bool:
        """Whether no check found a fault."""
        return not any(check.fault for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {"is_right": self.is_right, "checks": [asdict(check) for check in self.checks]}


def verify_patch(folder: Path, *, base: Path | None = None) -> Verification:
    """Every hash of the patch in `folder`, and with the checkpoint folder `base` the hashes of what it replaces.

    Goes on after a fault, as far as there is something left to check.
    """
    return Verification(tuple(_check(folder, base)))


def _check(folder: Path, base: Path | None) -> Iterator[Check]:
    try:
        metadata = PatchMetadata.read(folder)
    except CheckpointError as error:
        yield Check(METADATA_FILE, str(error))
        return
    yield Check(METADATA_FILE)
    path = folder / WEIGHTS_FILE
    try:
        check_places(path, metadata)
        yield Check("tensors, shapes and dtypes")
    except CheckpointError as error:
        yield Check("tensors, shapes and dtypes", str(error))
    if path.is_file():
        is_same = hash_file(path) == metadata.weights_sha256
        yield Check(f"sha256 of {WEIGHTS_FILE}", None if is_same else f"differs from {METADATA_FILE}")
        yield from _check_tensors(path, metadata)
    if base is not None:
        yield from _check_base(base, metadata)


def _check_tensors(path: Path, metadata: PatchMetadata) -> Iterator[Check]:
    try:
        places = read_places(path)
    except CheckpointError:
        return  # told already
    for name, record in metadata.tensors.items():
        if name not in places:
            continue
        place = places[name]
        is_same = place.hash() == record.after
        yield Check("sha256 of the tensor", None if is_same else f"differs from {METADATA_FILE}", name)
        if place.dtype == record.dtype:
            yield Check("finite numbers", find_non_finite(read_tensor(place)), name)


def _check_base(base: Path, metadata: PatchMetadata) -> Iterator[Check]:
    try:
        located = locate_tensors(read_checkpoint_places(base), metadata)
    except CheckpointError as error:
        yield Check("the base's files", str(error))
        return
    for name, record in metadata.tensors.items():
        yield Check("sha256 of the base's tensor", find_fault(located.get(name), record), name)
