"""Two patches side by side, expert by expert; with the base at hand also how big each change is and where it points."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..errors import PatchError
from .base_files import find_fault, locate_tensors, read_checkpoint_places
from .expert_patch import ExpertPatch
from .merging import read_tensor
from .names import parse_expert_name, part_of

FoundIn = Literal["both", "first", "second"]
_Unit = tuple[str, int, int]  # kind, layer, expert; -1 where there is none


@dataclass(frozen=True)
class ExpertDifference:
    """One expert, or another part of the model, in two patches.

    A change is patched minus base tensor, its norm relative to that of the base. `cosine` is between the two changes,
    `distance` the norm of their difference relative to the larger. Numbers are None where the base is not given, or
    where only one patch has the expert; `cosine` also where a change is zero.
    """

    kind: str
    layer: int | None
    expert: int | None
    found_in: FoundIn
    is_equal: bool
    change: float | None
    other_change: float | None
    cosine: float | None
    distance: float | None


@dataclass(frozen=True)
class PatchDifference:
    """Every expert that at least one of two patches changes; `has_same_base` is None where nothing tells."""

    rows: tuple[ExpertDifference, ...]
    has_same_base: bool | None

    def count(self, found_in: FoundIn) -> int:
        """Rows found in both patches or in one only."""
        return sum(row.found_in == found_in for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        counts = {place: self.count(place) for place in ("both", "first", "second")}
        return {"has_same_base": self.has_same_base, "counts": counts, "rows": [asdict(row) for row in self.rows]}


@dataclass(frozen=True)
class ExpertChange:
    """How far a patch moves one expert, or another part: norm of the change relative to the norm of the base."""

    kind: str
    layer: int | None
    expert: int | None
    change: float


def measure_changes(patch: ExpertPatch, base: Path) -> tuple[ExpertChange, ...]:
    """The size of each change of a patch against the checkpoint folder `base`.

    Raises:
        PatchError: If `base` is not the patch's base.
    """
    before = _read_base(patch, base)
    return tuple(
        ExpertChange(*_label(unit), _relative_norm(_change(patch, before, names), before, names))
        for unit, names in _units(patch.tensors).items()
    )


def diff_patches(first: ExpertPatch, second: ExpertPatch, *, base: Path | None = None) -> PatchDifference:
    """Which experts both patches change and which only one, and with the folder `base` of their base how far.

    Raises:
        PatchError: If `base` is not the base of both.
    """
    befores = [_read_base(patch, base) if base is not None else None for patch in (first, second)]
    ours, theirs = _units(first.tensors), _units(second.tensors)
    rows = []
    for unit in sorted({*ours, *theirs}):
        names = (ours.get(unit, ()), theirs.get(unit, ()))
        changes = [
            None if before is None or not each else _change(patch, before, each)
            for patch, before, each in zip((first, second), befores, names, strict=True)
        ]
        sizes = [
            None if before is None or change is None else _relative_norm(change, before, each)
            for before, change, each in zip(befores, changes, names, strict=True)
        ]
        rows.append(
            ExpertDifference(
                *_label(unit),
                found_in="both" if all(names) else "first" if names[0] else "second",
                is_equal=_are_equal(first, second, *names),
                change=sizes[0],
                other_change=sizes[1],
                cosine=_cosine(*changes),
                distance=_distance(*changes),
            )
        )
    return PatchDifference(tuple(rows), _have_same_base(first, second))


def _units(names: Iterable[str]) -> dict[_Unit, tuple[str, ...]]:
    """The tensors of each expert, and of each other part as a whole."""
    units: dict[_Unit, list[str]] = {}
    for name in names:
        expert = parse_expert_name(name)
        unit = ("routed_experts", expert.layer, expert.expert) if expert else (part_of(name), -1, -1)
        units.setdefault(unit, []).append(name)
    return {unit: tuple(units[unit]) for unit in sorted(units)}


def _label(unit: _Unit) -> tuple[str, int | None, int | None]:
    kind, layer, expert = unit
    return kind, None if layer < 0 else layer, None if expert < 0 else expert


def _read_base(patch: ExpertPatch, base: Path) -> dict[str, Tensor]:
    located = locate_tensors(read_checkpoint_places(base), patch.metadata)
    for name, record in patch.metadata.tensors.items():
        if fault := find_fault(located.get(name), record):
            raise PatchError(f"{base} is not the base of a patch for {patch.metadata.base}: tensor {name!r} {fault}.")
    return {name: read_tensor(place) for name, place in located.items()}


def _change(patch: ExpertPatch, before: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: patch.tensors[name].double() - before[name].double() for name in names}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _relative_norm(change: Mapping[str, Tensor], before: Mapping[str, Tensor], names: Iterable[str]) -> float:
    size = _norm(before[name] for name in names)
    return _norm(change.values()) / size if size else math.inf


def _cosine(ours: dict[str, Tensor] | None, theirs: dict[str, Tensor] | None) -> float | None:
    if ours is None or theirs is None:
        return None
    product = sum(float((ours[name] * theirs[name]).sum()) for name in ours.keys() & theirs.keys())
    norms = _norm(ours.values()) * _norm(theirs.values())
    return product / norms if norms else None


def _distance(ours: dict[str, Tensor] | None, theirs: dict[str, Tensor] | None) -> float | None:
    if ours is None or theirs is None:
        return None
    shared = ours.keys() & theirs.keys()
    alone = [tensor for name, tensor in [*ours.items(), *theirs.items()] if name not in shared]
    difference = _norm([*(ours[name] - theirs[name] for name in shared), *alone])
    larger = max(_norm(ours.values()), _norm(theirs.values()))
    return difference / larger if larger else 0.0


def _are_equal(first: ExpertPatch, second: ExpertPatch, ours: Iterable[str], theirs: Iterable[str]) -> bool:
    hashes = [
        {name: patch.metadata.tensors[name].after for name in names}
        for patch, names in ((first, ours), (second, theirs))
    ]
    return hashes[0] == hashes[1]


def _have_same_base(first: ExpertPatch, second: ExpertPatch) -> bool | None:
    """By the hashes of the tensors that both change, or by repo and commit."""
    shared = first.metadata.tensors.keys() & second.metadata.tensors.keys()
    if shared:
        ours, theirs = first.metadata.tensors, second.metadata.tensors
        return all(ours[name].before == theirs[name].before for name in shared)
    has_commits = first.metadata.base.commit and second.metadata.base.commit
    return True if has_commits and first.metadata.base == second.metadata.base else None
