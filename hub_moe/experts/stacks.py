"""The weights of an experts module as stacks that both of our implementations compute with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

IMPLEMENTATION = "hub_moe"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed")
_INSTEAD = 'set experts_implementation="grouped_mm" for it'


class Stacks(NamedTuple):
    """The weights of all experts, (E, in, out), which may be transposed views, and their biases, (E, out)."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


def stacks_of(experts: Any) -> Stacks:
    """The stacks of a module of a class decorated with transformers' `use_experts_implementation`.

    Raises:
        UnsupportedModelError: For experts whose weights are not plain floating-point stacks, or that train parameters
            besides them.
    """
    if not all(hasattr(experts, flag) for flag in _LAYOUT_FLAGS):
        raise UnsupportedModelError(
            f"{type(experts).__name__} does not say how its experts are laid out; a class with transformers' "
            "use_experts_implementation was expected."
        )
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias") if experts.has_bias else (up, "down_proj")
    tensors = [getattr(experts, name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"{name} of {type(experts).__name__} is a {type(tensor).__name__} of {tensor.dtype}, not a plain "
                f"floating-point tensor, which experts_implementation={IMPLEMENTATION!r} needs; {_INSTEAD}."
            )
    _check_other_parameters(experts, names)
    stacks = Stacks(*tensors, *[None] * (4 - len(names)))
    return stacks if experts.is_transposed else stacks._replace(up=stacks.up.mT, down=stacks.down.mT)


def has_post_expert_norm(experts: Any) -> bool:
    """Whether each expert's output passes a norm; modules of older transformers do not say, and have none."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def _check_other_parameters(experts: nn.Module, names: tuple[str, ...]) -> None:
    """The activation is differentiated by its input alone, so what else it may train would silently stay as it is."""
    for name, parameter in experts.named_parameters():
        first = name.partition(".")[0]
        if parameter.requires_grad and first not in (*names, "post_expert_norm", "parametrizations"):
            raise UnsupportedModelError(
                f"{type(experts).__name__} trains {name}, which experts_implementation={IMPLEMENTATION!r} gives no "
                f"gradient; {_INSTEAD}."
            )
