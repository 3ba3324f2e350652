"""Merges a patch into its base: the base's files copied, the patch's bytes written over, every other byte compared."""

import hashlib
import os
import re
import shutil
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, PatchError
from .base_files import find_fault, find_weight_files, locate_tensors, read_checkpoint_places
from .bases import Place, checkpoint_files, fetch_base, find_base
from .card import render_merged_card
from .expert_patch import ExpertPatch
from .folders import new_folder
from .names import part_of
from .tensor_file import TensorPlace

_CHUNK_BYTES = 1 << 22
_EXPERTS = re.compile(r"\.(?P<layer>\d+)\..*\bexperts\.")


@dataclass(frozen=True)
class MergedKind:
    """The tensors of one kind as they lie in the files; each hash is over those of the tensors, in order of names."""

    kind: str
    layer: int | None
    tensors: int
    patched: int
    changed: int
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote, read back from the disk and compared with the base."""

    base: str
    target: str
    kinds: tuple[MergedKind, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {"base": self.base, "target": self.target, "tensors": [asdict(kind) for kind in self.kinds]}


def merge_into_base(
    name_or_path: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_options: Any,
) -> MergeReport:
    """Write the checkpoint that loading the patch gives into the new folder `target`, in the base's own names.

    Needs no memory for a model: the base's files are copied and the patch's tensors written in their place, in the
    dtype that they are stored in. Arguments as for `load_patched_model`.

    Raises:
        PatchError: If the base is not the one that the patch was made for, or stores its tensors in another form.
        CheckpointError: If patch or base are damaged, `target` is not empty, or what was written is not what it should
            be; `target` is then not there.
    """
    patch = ExpertPatch.load(name_or_path, revision, subfolder, **hub_options)
    place = find_base(patch.metadata.base, found_in=Place(str(name_or_path), revision), instead=base)
    folder = fetch_base(place, **hub_options)
    places = read_checkpoint_places(folder)
    located = locate_tensors(places, patch.metadata)
    for name, record in patch.metadata.tensors.items():
        if fault := find_fault(located.get(name), record):
            raise PatchError(
                f"The patch is for {patch.metadata.base} and cannot be merged into {place}: tensor {name!r} {fault}."
            )
    with new_folder(Path(target)) as work:
        _copy_files(folder, work)
        for name, spot in located.items():
            _overwrite(work / spot.path.name, spot.offset, _bytes_of(patch.tensors[name], spot))
        (work / "README.md").write_text(render_merged_card(patch.metadata), encoding="utf-8")
        _compare_bytes(folder, work, located, patch.tensors)
        kinds = tuple(_summarise(places, work, located))
    return MergeReport(str(place), str(target), kinds)


def read_tensor(place: TensorPlace) -> Tensor:
    """A tensor from its bytes in a file."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        data = bytearray(file.read(place.size_bytes))
    dtype: torch.dtype = getattr(torch, place.dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(place.shape)


def _copy_files(folder: Path, work: Path) -> None:
    """The checkpoint without its card, and without safetensors files that are no part of it."""
    weights = {path.name for path in find_weight_files(folder)}
    for path in checkpoint_files(folder):
        if path.name != "README.md" and (path.suffix != ".safetensors" or path.name in weights):
            shutil.copyfile(path, work / path.name)


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _bytes_of(tensor: Tensor, spot: TensorPlace) -> bytes:
    stored = tensor.to(getattr(torch, spot.dtype)).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise PatchError(f"Tensor {spot.name!r} of the patch does not fit into the base's {spot.dtype}: it overflows.")
    data: Any = stored.reshape(-1).view(torch.uint8).numpy()
    return bytes(data.tobytes())


def _compare_bytes(folder: Path, work: Path, located: Mapping[str, TensorPlace], tensors: Mapping[str, Tensor]) -> None:
    """Read everything back: the patch's tensors where they belong, all other bytes as in the base."""
    spots: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, spot in located.items():
        spots[spot.path.name].append((spot.offset, spot.size_bytes, name))
        if (
            replace(spot, path=work / spot.path.name).hash()
            != hashlib.sha256(_bytes_of(tensors[name], spot)).hexdigest()
        ):
            raise CheckpointError(f"Tensor {name!r} is not what was written; the disk may be failing.")
    for path in find_weight_files(folder):
        if os.path.getsize(path) != os.path.getsize(work / path.name):
            raise CheckpointError(f"{path.name} changed its size while it was copied; the disk may be failing.")
        start = 0
        for offset, size_bytes, _ in [*sorted(spots[path.name]), (os.path.getsize(path), 0, "")]:
            if offset < start:
                raise CheckpointError(f"Two tensors of the patch lie at the same place of {path}.")
            if not _are_equal(path, work / path.name, start, offset):
                raise CheckpointError(
                    f"{path.name} differs from the base outside of the patch; the disk may be failing."
                )
            start = offset + size_bytes


def _are_equal(path: Path, other: Path, start: int, end: int) -> bool:
    with path.open("rb") as ours, other.open("rb") as theirs:
        ours.seek(start)
        theirs.seek(start)
        for at in range(start, end, _CHUNK_BYTES):
            size_bytes = min(_CHUNK_BYTES, end - at)
            if ours.read(size_bytes) != theirs.read(size_bytes):
                return False
    return True


def _summarise(
    places: Mapping[str, TensorPlace], work: Path, located: Mapping[str, TensorPlace]
) -> Iterator[MergedKind]:
    """Every tensor of the files, hashed before and after, by kind."""
    by_kind: dict[tuple[str, int], list[TensorPlace]] = defaultdict(list)
    for name in sorted(places):
        by_kind[_kind_and_layer(name)].append(places[name])
    patched_at: dict[Path, list[int]] = defaultdict(list)
    for spot in sorted(located.values(), key=lambda spot: spot.offset):
        patched_at[spot.path].append(spot.offset)
    for (kind, layer), members in sorted(by_kind.items()):
        before = [place.hash() for place in members]
        after = [replace(place, path=work / place.path.name).hash() for place in members]
        yield MergedKind(
            kind=kind,
            layer=None if layer < 0 else layer,
            tensors=len(members),
            patched=sum(_holds_one_of(place, patched_at[place.path]) for place in members),
            changed=sum(one != other for one, other in zip(before, after, strict=True)),
            sha256_before=hashlib.sha256("".join(before).encode()).hexdigest(),
            sha256_after=hashlib.sha256("".join(after).encode()).hexdigest(),
        )


def _holds_one_of(place: TensorPlace, offsets: list[int]) -> bool:
    return bisect_left(offsets, place.offset) < bisect_left(offsets, place.offset + place.size_bytes)


def _kind_and_layer(name: str) -> tuple[str, int]:
    """By the name in the files, -1 standing for no single layer."""
    if match := _EXPERTS.search(name):
        return "routed_experts", int(match["layer"])
    kind = part_of(name)
    return ("other" if kind == "non_expert_modules" else kind), -1
