"""Stops a training whose numbers are no longer finite, and says where they first were not."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .processes import in_any


def find_non_finite(tensors: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None.

    Of sharded tensors it is the same in all processes, which then have to call this together.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return next((name for name, tensor in pairs if not _is_finite(tensor)), None)


def describe_divergence(model: nn.Module, batches: list[dict[str, Any]]) -> str:
    """Where NaN or infinity first shows: in a weight, in a module's output on one of `batches`, or in a gradient.

    Runs the batches once more, without gradients and in the model's mode, random numbers aside.
    """
    weight = find_non_finite((name, parameter.detach()) for name, parameter in model.named_parameters())
    if weight is not None:
        return f"the weight {weight} is not finite"
    # all batches in any case: where a model is sharded, the processes need each other for every forward
    modules = [module for batch in batches if (module := _first_non_finite_output(model, batch)) is not None]
    if modules:
        return f"the first output that is not finite is that of {modules[0]}"
    gradients = ((name, _local(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    gradient = find_non_finite(gradients)
    return f"the gradient of {gradient} is not finite" if gradient is not None else "a repeated forward is finite"


def _is_finite(tensor: Tensor) -> bool:
    is_finite = bool(torch.isfinite(_local(tensor)).all())
    return not in_any(not is_finite) if isinstance(tensor, DTensor) else is_finite


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_non_finite_output(model: nn.Module, batch: dict[str, Any]) -> str | None:
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return look

    # inner modules finish before those around them, so that the first one found is the innermost
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
