"""Checks everything that can be checked of a patch, and says of each thing whether it is right."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .base_files import find_fault, locate_tensors, read_checkpoint_places
from .bases import Place, read_model_type
from .expert_patch import check_places, describe_config, find_non_finite
from .merging import read_tensor
from .metadata import CONFIG_FILE, METADATA_FILE, WEIGHTS_FILE, PatchMetadata
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
    yield Check(CONFIG_FILE, _find_config_fault(folder / CONFIG_FILE, metadata))
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


def _find_config_fault(path: Path, metadata: PatchMetadata) -> str | None:
    """Why transformers would not load the patch by its config; None if it would."""
    if not path.is_file():
        return "is missing, without which from_pretrained does not know the patch"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}"
    if not isinstance(config, dict):
        return f"is not a config: expected a JSON object, found a {type(config).__name__}"
    for field, value in describe_config(metadata).items():
        if config.get(field) != value:
            return f"is of something else: {field} is {config.get(field)!r}, and {value!r} was expected"
    return None


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
        model_type = read_model_type(Place(str(base)))
        located = locate_tensors(read_checkpoint_places(base), metadata)
    except CheckpointError as error:
        yield Check("the base's files", str(error))
        return
    is_same = model_type == metadata.base.model_type
    fault = f"is {model_type!r}, and the patch is for {metadata.base.model_type!r}"
    yield Check("the base's model type", None if is_same else fault)
    for name, record in metadata.tensors.items():
        yield Check("sha256 of the base's tensor", find_fault(located.get(name), record), name)
