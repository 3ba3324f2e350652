"""What transformers is told of our classes, and checkpoint names and layouts in and out.

The only place that registers anything, and the only user of transformers' weight conversion.

On disk every expert has its own tensors; in memory a layer's experts are two fused ones.
Shape letters: E routed experts, F expert inner, D hidden.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointError
from .safetensors_files import FP8_DTYPES, StoredTensor

SCALE_SUFFIX = "_scale_inv"
_ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


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


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` times the scale of its block, in `dtype`; the last block of a row or column may be partial.

    Args:
        weight: FP8 matrix of shape (rows, columns).
        scale: float32, one per block, of shape (ceil(rows / b), ceil(columns / b)) for the block side b
            (128 in DeepSeek-V3, arXiv:2412.19437 section 3.3.2).

    Raises:
        CheckpointError: If no power of two explains the number of blocks.
    """
    if weight.dim() != 2 or scale.dim() != 2:
        raise CheckpointError(
            f"FP8 weights and scales must be matrices, not of shapes {tuple(weight.shape)} and {tuple(scale.shape)}."
        )
    rows, columns = (_block_side(weight.shape[axis], scale.shape[axis]) for axis in (0, 1))
    values = _fp8_to_float32(weight)
    scale_per_column = scale.to(torch.float32).repeat_interleave(columns, dim=1)[:, : weight.shape[1]]
    for block, factors in zip(values.split(rows), scale_per_column, strict=True):
        block.mul_(factors)
    return values.to(dtype)


def _fp8_to_float32(weight: Tensor) -> Tensor:
    """By table: torch converts FP8 on the CPU one number at a time, four times slower."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(weight.dtype).to(torch.float32).numpy()
    return torch.from_numpy(table[weight.view(torch.uint8).numpy()])


def _block_side(size: int, num_blocks: int) -> int:
    """The power of two that cuts `size` into `num_blocks` blocks, the last of them perhaps partial."""
    block = 1
    while -(-size // block) > num_blocks:
        block *= 2
    if -(-size // block) != num_blocks:
        raise CheckpointError(f"A side of {size} cannot be cut into {num_blocks} FP8 blocks of a power of two.")
    return block


@dataclass
class DeferredTensor:
    """A stored tensor that transformers passes around as if it were loaded; bytes move only in `fill` or `read`.

    `scale` is the stored block scale of an FP8 tensor.
    """

    stored: StoredTensor
    scale: StoredTensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None

    def __getitem__(self, index: Any) -> "DeferredTensor":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "DeferredTensor":
        """Remember where the values shall go."""
        target = torch.device("cpu") if device is None else torch.device(device)
        return DeferredTensor(self.stored, self.scale, target, dtype)

    @property
    def target_dtype(self) -> torch.dtype:
        """What was asked for, or the stored dtype; bfloat16 for FP8."""
        stored = torch.bfloat16 if self.stored.dtype in FP8_DTYPES else self.stored.dtype
        assert stored is not None
        return self.dtype or stored

    def fill(self, target: Tensor) -> None:
        """Write the values into `target`."""
        if self.scale is None:
            self.stored.read_into(target)
        else:
            target.copy_(dequantize_blocks(self.stored.read(), self.scale.read(), target.dtype))


class DequantizedTensor(DeferredTensor):
    """An FP8 tensor that becomes a parameter by itself: loaded as soon as its place is known."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The dequantised values."""
        deferred = super().to(device, dtype)
        loaded = torch.empty(self.stored.shape, dtype=deferred.target_dtype, device=deferred.device)
        deferred.fill(loaded)
        return loaded


class FuseExperts(ConversionOps):
    """Reads each expert's tensors once, straight into the layer's fused parameter of shape (E, sum of rows, D)."""

    def convert(
        self,
        input_dict: dict[str, list[DeferredTensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """One fused tensor from the lists of per-expert tensors, in the order of `source_patterns`."""
        columns = [input_dict[pattern] for pattern in source_patterns]
        first = columns[0][0]
        rows = [column[0].stored.shape[0] for column in columns]
        fused = torch.empty(
            (len(columns[0]), sum(rows), first.stored.shape[1]),
            dtype=first.target_dtype,
            device=first.device,
        )
        for expert, experts_tensors in enumerate(zip(*columns, strict=True)):
            for part, tensor in zip(fused[expert].split(rows), experts_tensors, strict=True):
                tensor.fill(part)
        return {target_patterns[0]: fused}


def read_experts_directly(
    mapping: Iterable[WeightTransform],
) -> dict[WeightTransform, WeightTransform]:
    """For each transform of `mapping` the one to load with: converters of experts become `FuseExperts`."""
    return {
        transform: WeightConverter(
            list(transform._original_source_patterns),
            list(transform._original_target_patterns),
            [FuseExperts()],
        )
        if isinstance(transform, WeightConverter) and ".experts." in transform.source_patterns[0]
        else transform
        for transform in mapping
    }


def defer_tensors(stored: dict[str, StoredTensor]) -> dict[str, DeferredTensor]:
    """The stored tensors that we read ourselves: all experts, and everything in FP8 with its scale."""
    deferred: dict[str, DeferredTensor] = {}
    for name, tensor in stored.items():
        scale = stored.get(name + SCALE_SUFFIX)
        if ".experts." in name and name.endswith("_proj.weight"):
            deferred[name] = DeferredTensor(tensor, scale if tensor.dtype in FP8_DTYPES else None)
        elif tensor.dtype in FP8_DTYPES and scale is not None:
            deferred[name] = DequantizedTensor(tensor, scale)
    return deferred
