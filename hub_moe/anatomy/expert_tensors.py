"""Names and views of single experts' tensors: a layer keeps its experts as stacks, people speak of one expert.

Shape letters: E routed experts, F expert inner, D hidden.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .moe_layers import ChosenExperts, MoeLayer, find_chosen
from .parameters import Kind, layer_index, sort_names

_GATE_UP = "gate_up_proj"


def expert_tensors(layer: MoeLayer, expert: int) -> dict[str, Tensor]:
    """Views of one routed expert's tensors by name, in the layout that checkpoints on the Hub use.

    `model.layers.3.mlp.experts.5.{gate,up,down}_proj.weight`, the part before `experts` being `layer.name`. A stack
    that is not plain (E, out, in) with gate above up (gpt_oss: interleaved, transposed, with biases) keeps its own
    name: `...experts.5.gate_up_proj`, `...experts.5.gate_up_proj_bias`. The views share memory with the model and have
    no gradient; of an expert that is trained apart from its stack they are the trained rows.

    Raises:
        ConfigError: If the layer has no such expert.
    """
    if not 0 <= expert < layer.num_experts:
        raise ConfigError(
            f"Layer {layer.index} has no expert {expert}; it has {layer.num_experts}, numbered from 0 to "
            f"{layer.num_experts - 1}."
        )
    holder, row = _place(layer.experts, expert)
    tensors: dict[str, Tensor] = {}
    for stack_name, stack in holder.named_parameters(recurse=False):
        parts = _take_apart(layer.experts, stack_name, stack.detach()[row])
        tensors |= {f"{layer.name}.experts.{expert}.{name}": part for name, part in parts.items()}
    return tensors


def named_tensors(model: nn.Module, layers: list[MoeLayer]) -> Iterator[tuple[str, Kind, int | None, Tensor]]:
    """Every parameter and persistent buffer as `(name, kind, layer index, view)`, stacks taken apart into experts.

    `layers` as `find_moe_layers` returns them. A tied weight comes once, under its first name. What belongs to no
    layer has the index None.
    """
    layer_of_stacks = {f"{layer.name}.experts": layer for layer in layers}
    tensors = dict(_parameters_and_buffers(model))
    done: set[int] = set()
    for name, kind, _ in sort_names(model, layers, tensors):
        layer = layer_of_stacks.get(name.rpartition(".")[0])
        if layer is None:
            yield name, kind, layer_index(name), tensors[name].detach()
        elif layer.index not in done:
            done.add(layer.index)
            for expert in range(layer.num_experts):
                for expert_name, view in expert_tensors(layer, expert).items():
                    yield expert_name, kind, layer.index, view


def hash_tensor(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes in row order, little-endian, which are those that safetensors stores.

    Raises:
        CheckpointError: If the tensor is on the meta device, so that it has no bytes.
    """
    if tensor.is_meta:
        raise CheckpointError(
            f"A tensor of shape {tuple(tensor.shape)} is on the meta device and has no bytes to hash; load the model's "
            "weights first."
        )
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()


def _place(experts: nn.Module, expert: int) -> tuple[nn.Module, int]:
    """The module whose parameters hold the expert, and its row in them."""
    chosen = find_chosen(experts)
    if chosen is not None and expert in chosen.expert_ids:
        return chosen, chosen.expert_ids.index(expert)
    return experts, expert


def _take_apart(experts: nn.Module, stack_name: str, row: Tensor) -> dict[str, Tensor]:
    if not _is_plain(experts):
        return {stack_name: row}
    if stack_name != _GATE_UP:
        return {f"{stack_name}.weight": row}
    gate_FD, up_FD = row.chunk(2)
    return {"gate_proj.weight": gate_FD, "up_proj.weight": up_FD}


def _is_plain(experts: Any) -> bool:
    """Whether the stacks are (E, out, in) with gate above up, by the flags of transformers' experts decorator."""
    has_flags = (
        hasattr(experts, "is_transposed") and hasattr(experts, "is_concatenated") and hasattr(experts, "has_bias")
    )
    return has_flags and experts.is_concatenated and not experts.is_transposed and not experts.has_bias


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By name, tied ones once; without chosen experts, whose views come with those of their stack."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ChosenExperts):
            continue
        saved = set(module._parameters) | set(module._buffers) - module._non_persistent_buffers_set
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name in saved and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}".lstrip("."), tensor
