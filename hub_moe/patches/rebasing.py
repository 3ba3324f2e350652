"""Moves a patch to a newer commit of its base, where nothing that it changes has changed since."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConflictError, PatchError
from .base_files import find_fault, locate_tensors
from .bases import Place, fetch_places, find_base, pin_base, read_model_type
from .conflicts import describe_units
from .expert_patch import ExpertPatch
from .metadata import Base


def rebase_patch(patch: ExpertPatch, new_base: str | Path, **hub_options: Any) -> ExpertPatch:
    """The same patch for `new_base`, a folder or REPO[@REVISION], with the old base in its metadata's history.

    The old base is not needed: the patch knows the sha256 of every tensor that it changes there. All other tensors of
    the new base may differ; whether the patch still helps there is for an evaluation to say. Of a repo only the files
    are fetched that hold tensors of the patch. A patch for this very commit comes back as it is.

    Raises:
        ConflictError: If tensors that the patch changes are others in the new base; it lists them all.
        PatchError: If the new base is another kind of model.
        CheckpointError: If the new base is itself a patch, or damaged.
        HubError: If the new base cannot be fetched.
    """
    metadata = patch.metadata
    place = pin_base(find_base(metadata.base, found_in=Place("."), instead=new_base), **hub_options)
    model_type = read_model_type(place, **hub_options)
    if model_type != metadata.base.model_type:
        raise PatchError(f"{place} is a {model_type!r}, and the patch is for a {metadata.base.model_type!r}.")
    located = locate_tensors(fetch_places(place, metadata.tensors, **hub_options), metadata)
    faults = {name: find_fault(located.get(name), record) for name, record in metadata.tensors.items()}
    stale = tuple(name for name, fault in faults.items() if fault)
    if stale:
        raise ConflictError(
            f"The patch for {metadata.base} cannot be rebased onto {place}, which changed what it changes: "
            f"{describe_units(stale)} ({len(stale)} of {len(faults)} tensors; the first, {stale[0]!r}, "
            f"{faults[stale[0]]}).",
            stale,
        )
    base = Base(place.name, place.revision, metadata.base.model_type)
    if base == metadata.base:
        return patch
    was = metadata.base
    if was.commit is None:  # of a folder only the last name: where it lies is nobody's business, now that it is history
        was = replace(was, repo=Path(was.repo).name)
    return replace(patch, metadata=replace(metadata, base=base, rebased_from=(*metadata.rebased_from, was)))
