"""Puts patches on a model, loaded or as it is loaded, and takes them off: each checked first, whole or not at all."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import find_moe_layers
from ..anatomy.expert_tensors import hash_tensor
from ..errors import PatchError
from .bases import Place, find_base, read_model_type
from .expert_patch import ExpertPatch, dtype_name, find_touched
from .metadata import MODEL_TYPE, PatchMetadata, TensorRecord

_ATTRIBUTE = "_hub_moe_applied_patches"
_HUB_OPTIONS = ("token", "cache_dir", "force_download", "local_files_only")
_MAX_PATCHES = 8  # a patch may be made on top of a patched model; a circle must end


@dataclass
class _Applied:
    """What lies on a model: the patches' metadata in order, and the base's tensors under them, on the CPU."""

    patches: list[PatchMetadata] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)


def apply_patch(model: nn.Module, patch: ExpertPatch) -> None:
    """Write the patch's tensors into `model`, in its dtypes and on its devices.

    A model may carry several patches, as long as each finds the tensors it expects: of disjoint experts, or made on top
    of another. Keeps copies of the replaced tensors on the CPU, for `remove_patch`.

    Raises:
        PatchError: If a tensor that the patch changes is not the one that it was made for; nothing is changed.
        UnsupportedModelError: If the model has no routed experts.
    """
    touched = _check_base(model, patch, under={})
    applied = _applied(model)
    originals = {name: _copy_to_cpu(tensor) for name, tensor in touched.items()}
    with _undone_on_error(touched, originals):
        _write(touched, patch.tensors)
    applied.originals = {**originals, **applied.originals}
    applied.patches.append(patch.metadata)
    setattr(model, _ATTRIBUTE, applied)


def remove_patch(model: nn.Module) -> None:
    """Take every patch off `model`, which then is bit for bit what it was before the first.

    Raises:
        PatchError: If the model carries no patch.
    """
    applied = _applied(model)
    if not applied.patches:
        raise PatchError("The model carries no expert patch that could be removed.")
    _write(find_touched(model, find_moe_layers(model), applied.originals), applied.originals)
    delattr(model, _ATTRIBUTE)


def swap_patch(model: nn.Module, patch: ExpertPatch) -> None:
    """Take off the patches that `model` carries, if any, and put on `patch`, without loading the base again.

    Costs as much as both patches are big. The patch is checked against the base first: if it does not fit, the model
    keeps what it carries.

    Raises:
        PatchError: If a tensor of the base is not the one that the patch was made for.
    """
    applied = _applied(model)
    touched = _check_base(model, patch, under=applied.originals)
    all_touched = {**find_touched(model, find_moe_layers(model), applied.originals), **touched}
    before = {name: _copy_to_cpu(tensor) for name, tensor in all_touched.items()}
    with _undone_on_error(all_touched, before):
        _write(all_touched, applied.originals | dict(patch.tensors))
    originals = {name: applied.originals.get(name, before[name]) for name in touched}
    setattr(model, _ATTRIBUTE, _Applied([patch.metadata], originals))


def applied_patches(model: nn.Module) -> tuple[PatchMetadata, ...]:
    """The metadata of the patches that `model` carries, in the order they were applied."""
    applied = getattr(model, _ATTRIBUTE, None)
    return tuple(applied.patches) if applied is not None else ()


def find_mismatch(tensor: Tensor, record: TensorRecord) -> str | None:
    """Why a base's tensor is not the one that a patch was made for; None if it is."""
    if tuple(tensor.shape) != record.shape:
        return f"has shape {list(tensor.shape)} and not {list(record.shape)}"
    dtype = dtype_name(tensor)
    if dtype not in record.before:
        return f"is {dtype}, and the patch knows it in {', '.join(record.before)} only"
    if hash_tensor(tensor) != record.before[dtype]:
        return "has other values"
    return None


def _check_base(model: nn.Module, patch: ExpertPatch, *, under: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The live tensors that the patch changes; `under` holds those that are there once other patches are taken off."""
    metadata = patch.metadata
    touched = find_touched(model, find_moe_layers(model), metadata.tensors)
    for name, record in metadata.tensors.items():
        fault = find_mismatch(under.get(name, touched[name]), record)
        if fault is None:
            _check_fits(name, patch.tensors[name], touched[name].dtype)
            continue
        is_patched = name not in under and any(name in each.tensors for each in applied_patches(model))
        hint = " A patch that the model carries changed it; use remove_patch or swap_patch." if is_patched else ""
        raise PatchError(
            f"The patch is for {metadata.base}, and this is another model: its tensor {name!r} {fault}.{hint}"
        )
    return touched


def _check_fits(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype and float(tensor.abs().max()) > torch.finfo(dtype).max:
        raise PatchError(
            f"Tensor {name!r} of the patch does not fit into the model's {dtype_name(dtype)}: it overflows."
        )


def _applied(model: nn.Module) -> _Applied:
    applied: Any = getattr(model, _ATTRIBUTE, None)
    return _Applied() if applied is None else applied


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def _write(touched: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in touched.items():
        tensor.copy_(values[name])


@contextmanager
def _undone_on_error(touched: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Iterator[None]:
    is_done = False
    try:
        yield
        is_done = True
    finally:
        if not is_done:
            _write(touched, before)


def load_patched_model(
    name_or_path: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """The base's causal language model with the patch applied; transformers must know the base's model type.

    `base` is where the base is to be found instead of where the patch says: a folder, REPO (its main branch) or
    REPO@REVISION. `revision` and `subfolder` are the patch's. All else is given to the base's `from_pretrained`.

    Raises:
        CheckpointError: If the patch is damaged.
        HubError: If the base cannot be read.
        PatchError: If the base is not the one that the patch was made for.
    """
    from transformers import AutoModelForCausalLM

    hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
    place = Place(str(name_or_path), revision)
    patches = [ExpertPatch.load(place.name, place.revision, subfolder, **hub_options)]
    place = find_base(patches[0].metadata.base, found_in=place, instead=base)
    while read_model_type(place, **hub_options) == MODEL_TYPE:
        if len(patches) == _MAX_PATCHES:
            raise PatchError(
                f"{name_or_path} is a patch on a patch, more than {_MAX_PATCHES} deep; merge some of them."
            )
        patches.append(ExpertPatch.load(place.name, place.revision, **hub_options))
        place = find_base(patches[-1].metadata.base, found_in=place)
    loaded = AutoModelForCausalLM.from_pretrained(place.name, revision=place.revision, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
    for patch in reversed(patches):
        apply_patch(model, patch)
    return loaded
