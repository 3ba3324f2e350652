"""Combines several patches of one base into one patch, tensor by tensor; no model and no whole base is loaded."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..anatomy.expert_tensors import hash_tensor
from ..errors import CheckpointError, ConflictError, PatchError
from .base_files import find_fault, locate_tensors
from .bases import Place, fetch_places, find_base, pin_base
from .combination_methods import CombinationMethod, combine_changes
from .conflicts import (
    ConflictTable,
    Outcome,
    Overlap,
    Sums,
    Unit,
    decide,
    describe_conflicts,
    find_interactions,
    unit_of,
)
from .expert_patch import ExpertPatch, check_finite, experts_of, find_non_finite, natural_order
from .merging import read_tensor
from .metadata import Combination, Contributor, PatchMetadata, TensorRecord
from .names import check_declared, part_of
from .tensor_file import TensorPlace

_REFUSE = CombinationMethod()
_PARTS = ("shared_experts", "non_expert_modules", "balancing_bias")


@dataclass(frozen=True)
class CombinedPatch:
    """One patch made of several, and the table of what they had in common."""

    patch: ExpertPatch
    table: ConflictTable


@dataclass(frozen=True)
class _Together:
    """Patches by the names that messages call them, and where the base's files hold what they change."""

    patches: Mapping[str, ExpertPatch]
    places: Mapping[str, TensorPlace]
    holders: Mapping[str, tuple[str, ...]]  # tensor -> names of the patches that hold it

    def records(self, tensor: str) -> dict[str, TensorRecord]:
        return {name: self.patches[name].metadata.tensors[tensor] for name in self.holders[tensor]}

    def outcome(self, tensor: str, method: str) -> Outcome:
        found = {name: (record.after, _is_changed(record)) for name, record in self.records(tensor).items()}
        return decide(tensor, found, method)

    def changes(self, tensor: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The base's tensor and what each patch adds to it, in float32."""
        before = read_tensor(self.places[tensor]).float()
        return before, {name: self.patches[name].tensors[tensor].float() - before for name in self.holders[tensor]}


def combine_patches(
    patches: Sequence[ExpertPatch],
    *,
    base: str | Path,
    method: CombinationMethod = _REFUSE,
    **hub_options: Any,
) -> CombinedPatch:
    """The patch that does what all of `patches` do; `base` is a folder or REPO[@REVISION] with their base.

    What only one patch holds is taken byte for byte, as is what all that hold it have the same, or what only one of
    them changed. About all else the method decides, in float32, but that routers and balancing bias are averaged
    whichever it is; the result is rounded to the patches' dtype. The order of the patches does not matter.

    The base's tensors are read one at a time, from its files; of a base on a Hub only the files are fetched that hold
    tensors of the patches. `hub_options` are those of `ExpertPatch.load`.

    Raises:
        ConflictError: If patches change the same tensors and the method is "refuse"; it lists them all.
        PatchError: If patches are fewer than two, the same, parts of one another, or for different bases; if `base` is
            not their base; if shapes or dtypes differ; or if the result overflows.
        CheckpointError: If a patch is not what its metadata says, or the base is damaged.
        ConfigError: If the method does not take so many patches, or other weights are given.
    """
    weights = method.weights_for(len(patches))
    together = _bring_together(patches, base, hub_options)
    names = sorted(together.holders, key=natural_order)
    outcomes = {name: together.outcome(name, method.name) for name in names}
    refused = {name: together.holders[name] for name, outcome in outcomes.items() if outcome == "refuse"}
    if refused:
        raise ConflictError(
            f"The patches change the same tensors: {describe_conflicts(refused)}; choose how to resolve it (mean, "
            "ties, dare, dare_ties or slerp).",
            tuple(refused),
        )
    by_name = dict(zip(together.patches, weights, strict=True))
    tensors = {name: _combine_tensor(together, name, by_name, _method_for(outcomes[name], method)) for name in names}
    patch = ExpertPatch(_describe(tensors, together, by_name, method), tensors)
    return CombinedPatch(patch, _make_table(together, method.name))


def find_conflicts(
    patches: Sequence[ExpertPatch], *, base: str | Path, method: CombinationMethod = _REFUSE, **hub_options: Any
) -> ConflictTable:
    """Where the patches change the same tensors, how well they agree, and what the method would do; changes nothing.

    Raises:
        PatchError, CheckpointError, ConfigError: As `combine_patches`, but never for a conflict.
    """
    method.weights_for(len(patches))
    return _make_table(_bring_together(patches, base, hub_options), method.name)


def _bring_together(patches: Sequence[ExpertPatch], base: str | Path, hub_options: Mapping[str, Any]) -> _Together:
    if len(patches) < 2:
        raise PatchError(f"Combining takes two patches or more, and {len(patches)} was given.")
    named = dict(zip(_name_patches(patches), patches, strict=True))
    _check_different(named)
    _check_bases(named)
    holders: dict[str, tuple[str, ...]] = {}
    for name, patch in named.items():
        _check_sound(name, patch)
        for tensor in patch.metadata.tensors:
            holders[tensor] = (*holders.get(tensor, ()), name)
    try:
        check_declared(holders, experts_of(holders), {part_of(tensor) for tensor in holders} & {*_PARTS})
    except CheckpointError as error:
        raise PatchError(f"The patches change different tensors of the experts of one layer: {error}") from error
    first = patches[0].metadata
    place = pin_base(find_base(first.base, found_in=Place("."), instead=base), **hub_options)
    places = fetch_places(place, holders, **hub_options)
    located: dict[str, TensorPlace] = {}
    for name, patch in named.items():
        found = locate_tensors(places, patch.metadata)
        for tensor, record in patch.metadata.tensors.items():
            if fault := find_fault(found.get(tensor), record):
                raise PatchError(
                    f"{place} is not the base of {name}, {patch.metadata.base}: tensor {tensor!r} {fault}."
                )
        located |= found
    together = _Together(named, located, holders)
    for tensor in holders:
        _check_comparable(tensor, together.records(tensor))
    return together


def _check_different(named: Mapping[str, ExpertPatch]) -> None:
    """No patch counts twice: neither given twice, nor as a part of another."""
    seen: dict[tuple[Any, ...], str] = {}
    hashes: dict[str, str] = {}
    for name, patch in named.items():
        content = tuple(sorted((tensor, record.after) for tensor, record in patch.metadata.tensors.items()))
        if content in seen:
            raise PatchError(f"{seen[content]} and {name} are the same patch; give each once.")
        seen[content] = name
        combination = patch.metadata.combination
        inside = [each.weights_sha256 for each in combination.all_contributors()] if combination else []
        for sha256 in {*inside, patch.metadata.weights_sha256} - {None}:
            if sha256 in hashes:
                raise PatchError(f"{hashes[sha256]} and {name} hold the same patch, which would count twice.")
        hashes |= dict.fromkeys(filter(None, (*inside, patch.metadata.weights_sha256)), name)


def _check_bases(named: Mapping[str, ExpertPatch]) -> None:
    """One base by name and commit; folders may be called differently, what they hold is compared later."""
    (first, patch), *others = named.items()
    for name, other in others:
        ours, theirs = patch.metadata.base, other.metadata.base
        are_folders = ours.commit is None and theirs.commit is None and ours.model_type == theirs.model_type
        if ours != theirs and not are_folders:
            raise PatchError(
                f"The patches are for different bases: {first} for {ours}, {name} for {theirs}; rebase one of them."
            )


def _check_sound(name: str, patch: ExpertPatch) -> None:
    if patch.tensors.keys() != patch.metadata.tensors.keys():
        raise CheckpointError(f"{name} holds other tensors than its metadata lists; load it again.")
    for tensor, record in patch.metadata.tensors.items():
        check_finite(tensor, patch.tensors[tensor])
        if hash_tensor(patch.tensors[tensor]) != record.after:
            raise CheckpointError(
                f"{name}: tensor {tensor!r} has another sha256 than its metadata gives; load it again."
            )


def _check_comparable(tensor: str, records: Mapping[str, TensorRecord]) -> None:
    (first, ours), *others = records.items()
    for name, theirs in others:
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise PatchError(
                f"Tensor {tensor!r} is {ours.dtype} of shape {list(ours.shape)} in {first} and {theirs.dtype} of shape "
                f"{list(theirs.shape)} in {name}; they must be alike."
            )
        if any(ours.before[dtype] != theirs.before[dtype] for dtype in ours.before.keys() & theirs.before.keys()):
            raise PatchError(f"{first} and {name} are for different bases: these differ in tensor {tensor!r}.")


def _is_changed(record: TensorRecord) -> bool:
    return record.before.get(record.dtype) != record.after


def _method_for(outcome: Outcome, method: CombinationMethod) -> CombinationMethod | None:
    """None where there is nothing to decide."""
    if outcome in ("equal", "one changed"):
        return None
    return method if outcome == method.name else CombinationMethod("mean")


def _combine_tensor(
    together: _Together, tensor: str, weights: Mapping[str, float], method: CombinationMethod | None
) -> Tensor:
    records = together.records(tensor)
    changed = sorted(
        (name for name, record in records.items() if _is_changed(record)),
        key=lambda name: (records[name].after, weights[name]),  # sums round alike in whatever order patches come
    )
    if method is None:
        return together.patches[next(iter(changed), next(iter(records)))].tensors[tensor]
    before, changes = together.changes(tensor)
    change = combine_changes(
        [changes[name] for name in changed],
        [weights[name] for name in changed],
        method=method,
        labels=[f"{tensor} {records[name].after}" for name in changed],
    )
    dtype = together.patches[changed[0]].tensors[tensor].dtype
    combined = (before + change).to(dtype)
    if find_non_finite(combined):
        raise PatchError(f"Tensor {tensor!r}, combined by {method.name}, does not fit into {dtype}: it overflows.")
    return combined


def _describe(
    tensors: Mapping[str, Tensor], together: _Together, weights: Mapping[str, float], method: CombinationMethod
) -> PatchMetadata:
    parts = {part_of(tensor) for tensor in tensors}
    records = {}
    for tensor, combined in tensors.items():
        held = list(together.records(tensor).values())
        before = {dtype: sha256 for record in held for dtype, sha256 in record.before.items()}
        records[tensor] = TensorRecord(held[0].shape, held[0].dtype, before, hash_tensor(combined))
    contributors = tuple(_credit(name, patch, weights[name]) for name, patch in together.patches.items())
    return PatchMetadata(
        base=next(iter(together.patches.values())).metadata.base,
        experts=experts_of(tensors),
        tensors=records,
        shared_experts="shared_experts" in parts,
        non_expert_modules="non_expert_modules" in parts,
        balancing_bias="balancing_bias" in parts,
        hub_moe_version=__version__,
        combination=Combination(method.name, contributors, **method.parameters),
    )


def _credit(name: str, patch: ExpertPatch, weight: float) -> Contributor:
    revision = patch.origin.commit if patch.origin else None
    known_as = patch.origin.name if patch.origin and revision else name  # of a folder no more than tells it apart
    sha256 = patch.metadata.weights_sha256
    if sha256 is None:  # a patch that was never saved: that of the file which saving it would write
        sha256 = hashlib.sha256(save(dict(patch.tensors), metadata={"format": "pt"})).hexdigest()
    return Contributor(known_as, revision, sha256, weight, patch.metadata.combination)


def _make_table(together: _Together, method: str) -> ConflictTable:
    names = tuple(together.patches)
    units: dict[Unit, Sums] = {}
    rows: list[Overlap] = []
    for tensor in sorted(together.holders, key=natural_order):
        if len(together.holders[tensor]) == 1:
            continue
        outcome, unit = together.outcome(tensor, method), unit_of(tensor)
        before, changes = together.changes(tensor)
        of_tensor = Sums(names)
        for sums in (of_tensor, units.setdefault(unit, Sums(names))):
            sums.add_tensor(before, changes, outcome)
        rows.append(of_tensor.to_overlap(unit, tensor))
    by_unit = tuple(units[unit].to_overlap(unit) for unit in sorted(units))
    return ConflictTable(names, by_unit, tuple(rows), find_interactions(together.patches))


def _name_patches(patches: Sequence[ExpertPatch]) -> list[str]:
    """Short names that tell the patches apart: of repos the whole name, of folders as little of the path as will do."""
    paths = [Path(patch.origin.name).parts if patch.origin else (f"patch {i}",) for i, patch in enumerate(patches, 1)]
    on_hub = [patch.origin is not None and patch.origin.commit is not None for patch in patches]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path if hub else path[-length:]) for path, hub in zip(paths, on_hub, strict=True)]
        if _are_unique(name for name, hub in zip(names, on_hub, strict=True) if not hub):
            break
    if not _are_unique(names):  # one repo at two commits
        names = [
            f"{name}@{patch.origin.commit}" if patch.origin else name
            for name, patch in zip(names, patches, strict=True)
        ]
    return names if _are_unique(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def _are_unique(names: Iterable[str]) -> bool:
    listed = list(names)
    return len(set(listed)) == len(listed)
