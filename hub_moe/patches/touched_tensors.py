"""The live tensors of a model that a patch speaks of, by name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import MoeLayer
from ..anatomy.expert_tensors import expert_tensors
from ..errors import PatchError
from .names import parse_expert_name


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
