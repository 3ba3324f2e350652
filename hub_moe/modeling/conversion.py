"""What transformers is told of our classes, and checkpoint names and layouts in and out.

The only place that registers anything, and the only user of transformers' weight conversion.

On disk every expert has its own tensors; in memory a layer's experts are two fused ones.
Shape letters: E routed experts, F expert inner, D hidden.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError
from .safetensors_files import (
    FP8_DTYPES,
    PIECE_BYTES,
    StoredTensor,
    begin_reading,
    dequantize_blocks,
    finish,
    read_in_a_row,
)

SCALE_SUFFIX = "_scale_inv"
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_OF_AN_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)$")


def register_model_classes(config_class: type[Any], classes: dict[str, type[Any]]) -> None:
    """Register a config, its models (Auto class name -> class) and its checkpoint layout.

    Where hub_moe is installed its classes win over the copy of this code that comes with a checkpoint, whichever was
    imported first.
    """
    model_type = config_class.model_type
    is_known = model_type in CONFIG_MAPPING
    if not is_known or _is_copy(CONFIG_MAPPING[model_type]) and not _is_copy(config_class):
        transformers.AutoConfig.register(model_type, config_class, exist_ok=is_known)
    for auto_name, model_class in classes.items():
        getattr(transformers, auto_name).register(config_class, model_class)
    register_conversion(config_class.model_type)


def _is_copy(cls: type[Any]) -> bool:
    """Whether transformers imported this class from the files of a checkpoint."""
    return cls.__module__.startswith("transformers_modules.")


def register_conversion(model_type: str) -> None:
    """Store `model_type` with per-expert names, as transformers stores deepseek_v3."""
    if get_checkpoint_conversion_mapping(model_type) is None:
        register_checkpoint_conversion_mapping(model_type, get_checkpoint_conversion_mapping("deepseek_v3"))


def copy_experts_by_name(model: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Copy per-expert tensors into the fused parameters of `model`.

    transformers' `Trainer` resumes by `load_state_dict` of the files it saved, one shard after the other, and no module
    has the names of single experts; it would go on with whatever experts the model was built with.

    Returns:
        The other tensors, and the names of the fused parameters that got an expert.

    Raises:
        CheckpointError: If an expert's shape or number is not the model's.
    """
    others, touched = {}, set()
    modules: dict[str, Any] = dict(model.named_modules())
    for name, tensor in state_dict.items():
        match = _ONE_EXPERT.match(name)
        if match is None:
            others[name] = tensor
            continue
        experts = modules.get(match[1])
        if experts is None:
            others[name] = tensor  # reported as unexpected
            continue
        expert = int(match[2])
        if expert >= experts.num_experts:
            raise CheckpointError(f"{name!r} is superfluous; the model has {experts.num_experts} experts in a layer.")
        fused_name = "down_proj" if match[3] == "down" else "gate_up_proj"
        parameter = getattr(experts, fused_name)
        if parameter.is_meta:
            parameter = nn.Parameter(torch.empty_like(parameter, device=tensor.device, dtype=tensor.dtype))
            setattr(experts, fused_name, parameter)
        slot = parameter[expert]
        if match[3] != "down":
            slot = slot.chunk(2)[match[3] == "up"]
        if slot.shape != tensor.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(tensor.shape)}; the model's is {tuple(slot.shape)}.")
        with torch.no_grad():
            slot.copy_(tensor)
        touched.add(f"{match[1]}.{fused_name}")
    return others, touched


def find_missing_expert(model: nn.Module, state_dict: Mapping[str, Tensor]) -> str | None:
    """The first per-expert tensor that a state dict with names on disk lacks."""
    for prefix, module in model.named_modules():
        if not prefix.endswith(".experts") or f"{prefix}.gate_up_proj" in state_dict:
            continue
        for expert in range(module.num_experts):
            for projection in ("gate", "up", "down"):
                name = f"{prefix}.{expert}.{projection}_proj.weight"
                if name not in state_dict:
                    return name
    return None


class Part(NamedTuple):
    """A stored tensor, with the stored scale of its blocks if it is in FP8."""

    stored: StoredTensor
    scale: StoredTensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That in which it is loaded if none is asked for: the stored one, bfloat16 for FP8."""
        return torch.bfloat16 if self.scale is not None or self.stored.dtype is None else self.stored.dtype

    def announce(self) -> None:
        """Let the system start to read it."""
        self.stored.announce()
        if self.scale is not None:
            self.scale.announce()

    def fill(self, target: Tensor) -> None:
        """Write the values into `target`, which has this tensor's shape."""
        if self.scale is None:
            self.stored.read_into(target)
        else:
            target.copy_(dequantize_blocks(self.stored.read(), self.scale.read(), target.dtype))


class StoredParameter:
    """A parameter in its files, which transformers passes around as if it were loaded; `to` reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    threads: Executor | None = None  # that share the reading of all parameters evenly
    _begun: tuple[Tensor, list[Future[None]]] | None = None

    def __getitem__(self, index: Any) -> "StoredParameter":
        return self

    def await_reading(self, target: Tensor, reading: list[Future[None]]) -> None:
        """Let `to` wait until `target` is read, which has begun."""
        self._begun = target, reading

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values, in memory of their own."""
        if self._begun is not None:
            (target, reading), self._begun = self._begun, None
            finish(reading)
            return target.to(device=device or "cpu", dtype=dtype or self.dtype)
        target = torch.empty(self.shape, dtype=dtype or self.dtype, device=device or "cpu")
        self.fill(target)
        return target

    def fill(self, target: Tensor) -> None:
        """Write the values into `target`, which has this parameter's shape."""
        raise NotImplementedError

    def plain(self) -> list[StoredTensor] | None:
        """The stored tensors, all of its dtype, that make it up one behind the other; None if they are no such."""
        raise NotImplementedError


class StoredMatrix(StoredParameter):
    """A parameter or buffer that is one stored tensor."""

    def __init__(self, part: Part) -> None:
        self.part, self.shape, self.dtype = part, part.stored.shape, part.dtype

    def fill(self, target: Tensor) -> None:
        stored = self.plain()
        if stored is None or not read_in_a_row(stored, target, self.threads):
            self.part.fill(target)

    def plain(self) -> list[StoredTensor] | None:
        return [self.part.stored] if self.part.scale is None else None


class StoredStack(StoredParameter):
    """A layer's experts: each a list of parts, one below the other, as in `cat(gate, up)` of shape (2F, D)."""

    def __init__(self, experts: Sequence[Sequence[Part]]) -> None:
        self.experts = experts
        self.dtype = experts[0][0].dtype
        self._rows = [part.stored.shape[0] for part in experts[0]]
        self.shape = (len(experts), sum(self._rows), *experts[0][0].stored.shape[1:])

    def fill(self, target: Tensor) -> None:
        stored = self.plain()
        if stored is None or not read_in_a_row(stored, target, self.threads):
            for expert, place in enumerate(target.unbind()):
                self.fill_expert(expert, place)

    def plain(self) -> list[StoredTensor] | None:
        parts = [part for expert in self.experts for part in expert]
        are_alike = all(part.scale is None and part.stored.dtype is self.dtype for part in parts)
        return [part.stored for part in parts] if are_alike else None

    def fill_expert(self, expert: int, target: Tensor) -> None:
        """Write one expert's values into `target`, which has the shape of one."""
        for part, place in zip(self.experts[expert], target.split(self._rows), strict=True):
            part.fill(place)

    def announce(self, expert: int) -> None:
        """Let the system start to read one expert; returns at once."""
        for part in self.experts[expert]:
            part.announce()

    def check_unchanged(self, expert: int) -> None:
        """Raise CheckpointError if a file that the expert lies in was changed since it was opened."""
        for part in self.experts[expert]:
            part.stored.file.check_unchanged()

    def names(self) -> Iterator[str]:
        """Of all stored tensors that it is made of."""
        for parts in self.experts:
            for part in parts:
                yield part.stored.name
                if part.scale is not None:
                    yield part.scale.name


def find_stacks(
    model: Any, stored: Mapping[str, StoredTensor], mapping: Iterable[WeightTransform]
) -> dict[str, StoredStack]:
    """The parameters of `model` that stack experts which have tensors of their own in a checkpoint, by name.

    What the conversions `mapping` do otherwise than stacking, and what does not fit the model or is of another type
    than floats, is left out, for transformers to convert or to report.
    """
    rename = _Renaming(model, mapping)
    columns: dict[tuple[str, str], dict[int, Part]] = defaultdict(dict)
    for name in stored:
        match = None if name.endswith(SCALE_SUFFIX) else _OF_AN_EXPERT.match(name)
        if match is not None:
            columns[match[1], match[3]][int(match[2])] = _part(name, stored)
    by_target: dict[str, dict[int, dict[int, Part]]] = defaultdict(dict)
    for column in columns.values():
        target, place = rename.find_stack(next(iter(column.values())).stored.name)
        if target is not None:
            by_target[target][place] = column
    stacks = {
        target: _stack(by_place, rename.num_places[target], rename.shapes[target])
        for target, by_place in by_target.items()
    }
    return {target: stack for target, stack in stacks.items() if stack is not None}


def find_fused_stacks(
    model: Any, stored: Mapping[str, StoredTensor], mapping: Iterable[WeightTransform]
) -> dict[str, StoredStack]:
    """The parameters of `model` that stack experts and that a checkpoint stores whole, in plain floats, by name."""
    rename = _Renaming(model, mapping)
    stacks = {}
    for name, tensor in stored.items():
        target = None if _OF_AN_EXPERT.match(name) or not _is_plain(tensor) else rename.find_whole(name)
        if target is not None and ".experts." in target and rename.shapes[target] == tensor.shape:
            stacks[target] = StoredStack([[Part(tensor.row(row))] for row in range(tensor.shape[0])])
    return stacks


class _Renaming:
    """Names in the checkpoint to names in the model, as transformers' loading finds them."""

    def __init__(self, model: Any, mapping: Iterable[WeightTransform]) -> None:
        transforms = list(mapping)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._prefix, self._tensors = model.base_model_prefix, model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self._places = {
            pattern: (place, len(converter.source_patterns))
            for converter in self._converters
            if _only_stacks(converter)
            for place, pattern in enumerate(converter.source_patterns)
        }
        self.num_places: dict[str, int] = {}

    def find_stack(self, name: str) -> tuple[str | None, int]:
        """The parameter that stacks experts of this name, and which part of it they are; None if it does not."""
        target, pattern = self._rename(name)
        if target not in self.shapes or pattern not in self._places:
            return None, 0
        place, self.num_places[target] = self._places[pattern]
        return target, place

    def find_whole(self, name: str) -> str | None:
        """The parameter that is this tensor, unconverted."""
        target, pattern = self._rename(name)
        return target if pattern is None and target in self.shapes else None

    def _rename(self, name: str) -> tuple[str, Any]:
        renamed: tuple[str, Any] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._tensors
        )
        return renamed


def _only_stacks(converter: WeightConverter) -> bool:
    """Whether all it does is to stack experts, their parts one below the other."""
    kinds = [type(operation) for operation in converter.operations]
    dims = [getattr(operation, "dim", None) for operation in converter.operations]
    return (kinds, dims) in (
        ([MergeModulelist], [0]),
        ([MergeModulelist, Concatenate], [0, 1]),
    ) and len(converter.target_patterns) == 1


def _part(name: str, stored: Mapping[str, StoredTensor]) -> Part:
    tensor = stored[name]
    return Part(tensor, stored.get(name + SCALE_SUFFIX) if tensor.dtype in FP8_DTYPES else None)


def _is_plain(tensor: StoredTensor) -> bool:
    return tensor.dtype is not None and tensor.dtype.is_floating_point and tensor.dtype not in FP8_DTYPES


def _stack(by_place: dict[int, dict[int, Part]], num_places: int, shape: tuple[int, ...]) -> StoredStack | None:
    """The stack of `shape`, if the parts are all there and make it up."""
    columns = [by_place.get(place, {}) for place in range(num_places)]
    if any(set(column) != set(range(shape[0])) for column in columns):
        return None
    for column in columns:
        first = column[0].stored
        for part in column.values():
            if part.stored.shape != first.shape or len(first.shape) < 2:
                return None
            if part.scale is None and not _is_plain(part.stored):
                return None
    stack = StoredStack([[column[expert] for column in columns] for expert in range(shape[0])])
    return stack if stack.shape == shape else None


def find_matrices(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, StoredMatrix]:
    """Those of the tensors `names` whose type we read."""
    return {name: StoredMatrix(_part(name, stored)) for name in names if stored[name].dtype is not None}


def share_reading(
    model: Any, found: Mapping[str, StoredParameter], threads: Executor, device_map: Mapping[str, Any] | None
) -> None:
    """Let `threads` read the parameters, at once what stays in this memory as it is stored.

    transformers asks for a parameter after it has sorted and renamed all names; it is read by then, or nearly.
    """
    for parameter in found.values():
        parameter.threads = threads
    if any(torch.device(place).type != "cpu" for place in (device_map or {}).values()):
        return  # each waits in its file for room elsewhere
    if sum(math.prod(one.shape) * one.dtype.itemsize for one in found.values()) < PIECE_BYTES:
        return  # a thread's stack is as large
    # in a thread, where no mode of torch is on: nothing is fake or for inference only because the caller is in one
    threads.submit(_begin_reading_parameters, model, found, threads).result()


def _begin_reading_parameters(model: Any, found: Mapping[str, StoredParameter], threads: Executor) -> None:
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    fitting = (one for name, one in found.items() if expected.get(name) == (one.shape, one.dtype))
    wanted = [
        (one, stored, torch.empty(one.shape, dtype=one.dtype, device="cpu"))
        for one in fitting
        if (stored := one.plain())
    ]
    reading = begin_reading([(stored, target) for _, stored, target in wanted], threads)
    for (parameter, _, target), begun in zip(wanted, reading, strict=True):
        parameter.await_reading(target, begun)
