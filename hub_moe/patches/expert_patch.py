"""The expert patch: the expert tensors that a fine-tune changed, and the evidence for what they replace."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..anatomy import MoeLayer, find_moe_layers
from ..anatomy.expert_tensors import expert_tensors, hash_tensor
from ..errors import CheckpointError, PatchError
from .card import render_card
from .folders import Origin, find_origin, find_patch, new_folder
from .metadata import (
    CONFIG_FILE,
    DTYPES,
    METADATA_FILE,
    MODEL_TYPE,
    WEIGHTS_FILE,
    Base,
    PatchMetadata,
    Selection,
    TensorHashes,
    TensorRecord,
)
from .names import parse_expert_name, part_of
from .tensor_file import hash_file, read_places

_CAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertPatch:
    """Metadata, and tensors on the CPU by their name in memory: `model.layers.3.mlp.experts.5.up_proj.weight`.

    `origin` is where it was loaded from, which counts for nothing when patches are compared.
    """

    metadata: PatchMetadata
    tensors: Mapping[str, Tensor]
    origin: Origin | None = field(default=None, compare=False)

    @classmethod
    def load(
        cls, name_or_path: str | Path, revision: str | None = None, subfolder: str | None = None, **hub_options: Any
    ) -> Self:
        """The patch in a folder or a repo of the Hub, every hash checked.

        `hub_options` are `token`, `cache_dir`, `force_download` and `local_files_only` of huggingface_hub.

        Raises:
            CheckpointError: If there is no patch, or it is damaged; the message names the tensor or file at fault.
        """
        folder = find_patch(name_or_path, revision=revision, subfolder=subfolder, **hub_options)
        metadata = PatchMetadata.read(folder)
        path = folder / WEIGHTS_FILE
        check_places(path, metadata)
        if hash_file(path) != metadata.weights_sha256:
            raise CheckpointError(f"{path} has another sha256 than {METADATA_FILE} gives; it was damaged or exchanged.")
        return cls(metadata, _read_tensors(path, metadata), find_origin(name_or_path, subfolder, folder))

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> PatchMetadata:
        """Write the patch, its card, the config that transformers reads and the tokenizer, if given, to a new folder.

        The folder gets its name when it is complete: after a crash it is whole or not there. Returns the metadata as
        written, with the sha256 of the file of numbers.

        Raises:
            CheckpointError: If `folder` is there and not empty.
        """
        with new_folder(Path(folder)) as work:
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
            save_file(dict(self.tensors), work / WEIGHTS_FILE, metadata={"format": "pt"})
            written = replace(self.metadata, weights_sha256=hash_file(work / WEIGHTS_FILE))
            texts = {
                METADATA_FILE: written.to_json(),
                "README.md": render_card(written),
                CONFIG_FILE: json.dumps(describe_config(written), indent=2) + "\n",
            }
            for name, text in texts.items():
                (work / name).write_text(text, encoding="utf-8")
        return written


def make_patch(
    tensors: Mapping[str, Tensor],
    *,
    model_before: Mapping[str, TensorHashes],
    base: Base,
    selection: Selection | None = None,
    training: Mapping[str, Any] | None = None,
) -> ExpertPatch:
    """A patch of trained tensors, which are copied, by their names in memory (`trained_tensors(model)`).

    `model_before` are the base's hashes as `hash_base` took them before the training; `training` are free facts about
    it, of which "method" is shown. Which experts and other parts are changed follows from the names.

    Raises:
        CheckpointError: If a tensor has no hash of the base, holds NaN or infinity, is of no float dtype, or if an
            expert is not complete.
    """
    copies = {name: _copy(name, tensors[name]) for name in sorted(tensors, key=natural_order)}
    for name in copies:
        if not model_before.get(name):
            raise CheckpointError(f"There is no hash of the base's tensor {name!r}; take it before the training.")
    parts = {part_of(name) for name in copies}
    metadata = PatchMetadata(
        base=base,
        experts=experts_of(copies),
        tensors={
            name: TensorRecord(tuple(tensor.shape), dtype_name(tensor), dict(model_before[name]), hash_tensor(tensor))
            for name, tensor in copies.items()
        },
        shared_experts="shared_experts" in parts,
        non_expert_modules="non_expert_modules" in parts,
        balancing_bias="balancing_bias" in parts,
        selection=selection,
        training=dict(training or {}),
        hub_moe_version=__version__,
    )
    metadata.to_json()  # what JSON cannot hold is told now, not when the work is saved
    return ExpertPatch(metadata, copies)


def hash_base(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The hashes of a base's tensors that `make_patch` needs: name -> dtype -> sha256 of the tensor cast to it.

    The casts let a base be recognised that is loaded in another dtype. Take them before anything is trained.
    """
    touched = find_touched(model, find_moe_layers(model), names)
    return {name: hash_casts(tensor) for name, tensor in touched.items()}


def hash_casts(tensor: Tensor) -> dict[str, str]:
    """sha256 of a tensor in its own dtype and in those that models are loaded in."""
    dtypes = dict.fromkeys((tensor.dtype, *_CAST_DTYPES))
    return {dtype_name(dtype): hash_tensor(tensor.to(dtype)) for dtype in dtypes}


def dtype_name(source: Tensor | torch.dtype) -> str:
    """`bfloat16`, as metadata writes it."""
    return str(source.dtype if isinstance(source, Tensor) else source).removeprefix("torch.")


def check_places(path: Path, metadata: PatchMetadata) -> None:
    """Compare the header of a patch's file of numbers with the metadata.

    Raises:
        CheckpointError: If the file is missing or damaged, or a tensor is missing, superfluous, or of another shape or
            dtype.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} lacks {path.name}, which holds the patch's tensors.")
    places = read_places(path)
    for name, record in metadata.tensors.items():
        if name not in places:
            raise CheckpointError(f"{path} lacks the tensor {name!r}, which {METADATA_FILE} lists.")
        place = places.pop(name)
        if (place.shape, place.dtype) != (record.shape, record.dtype):
            raise CheckpointError(
                f"{path}: tensor {name!r} is {place.dtype} of shape {list(place.shape)}, and {METADATA_FILE} says "
                f"{record.dtype} of shape {list(record.shape)}."
            )
    for name in places:
        raise CheckpointError(f"{path} holds the tensor {name!r}, which {METADATA_FILE} does not list.")


def _read_tensors(path: Path, metadata: PatchMetadata) -> dict[str, Tensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, record in metadata.tensors.items():
                tensors[name] = file.get_tensor(name)
                if hash_tensor(tensors[name]) != record.after:
                    raise CheckpointError(f"{path}: tensor {name!r} has another sha256 than {METADATA_FILE} gives.")
                check_finite(name, tensors[name])
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}.") from error
    return tensors


def _copy(name: str, tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True).contiguous()
    if dtype_name(copy) not in DTYPES or not copy.numel():
        raise CheckpointError(
            f"Tensor {name!r} is {dtype_name(copy)} of shape {list(copy.shape)}; a patch holds {', '.join(DTYPES)}."
        )
    check_finite(name, copy)
    return copy


def find_non_finite(tensor: Tensor) -> str | None:
    """What makes a tensor unusable for a model; None if all its numbers are finite."""
    return None if bool(torch.isfinite(tensor).all()) else "holds NaN or infinity"


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinity.

    Raises:
        CheckpointError: Naming it.
    """
    if fault := find_non_finite(tensor):
        raise CheckpointError(f"Tensor {name!r} of the patch {fault}; a model with it would be broken.")


def experts_of(names: Iterable[str]) -> dict[int, tuple[int, ...]]:
    """The routed experts, as layer -> ids in ascending order, that tensors belong to."""
    pairs = sorted({(expert.layer, expert.expert) for expert in filter(None, map(parse_expert_name, names))})
    return {layer: tuple(expert for each, expert in pairs if each == layer) for layer in dict(pairs)}


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def describe_config(metadata: PatchMetadata) -> dict[str, Any]:
    """`config.json`: what makes transformers load the base and apply the patch, once hub_moe is imported."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["ExpertPatchForCausalLM"],
        "base_model": metadata.base.repo,
        "base_model_commit": metadata.base.commit,
        "base_model_type": metadata.base.model_type,
    }


def find_touched(model: nn.Module, layers: list[MoeLayer], names: Iterable[str]) -> dict[str, Tensor]:
    """Detached views into `model`, by the names asked for; writing to a view changes the model.

    Raises:
        PatchError: If the model has no tensor of that name, or its bytes are not here (offloaded, or shared out
            over processes).
    """
    blocks = {layer.name: layer for layer in layers}
    experts: dict[tuple[str, int], dict[str, Tensor]] = {}
    touched = {}
    for name in names:
        expert = parse_expert_name(name)
        layer = blocks.get(expert.block) if expert else None
        if expert is not None and layer is not None and expert.expert < layer.num_experts:
            key = (expert.block, expert.expert)
            if key not in experts:
                experts[key] = expert_tensors(layer, expert.expert)
            tensor = experts[key].get(name)
        else:
            tensor = _find_whole(model, name)
        if tensor is None:
            raise PatchError(f"The model, a {type(model).__name__}, has no tensor {name!r}, which the patch changes.")
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            where = "not in memory (offloaded)" if tensor.is_meta else "shared out over processes"
            raise PatchError(f"The model's tensor {name!r} is {where}; a patch needs it whole and in memory.")
        touched[name] = tensor
    return touched


def _find_whole(model: nn.Module, name: str) -> Tensor | None:
    module_name, _, attribute = name.rpartition(".")
    try:
        module: Any = model.get_submodule(module_name)
    except AttributeError:
        return None
    tensor = getattr(module, attribute, None)
    return tensor.detach() if isinstance(tensor, torch.Tensor) else None
