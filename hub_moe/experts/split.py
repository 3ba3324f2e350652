"""Training chosen experts of a model whose layers keep their experts in stacks (ESFT, arXiv:2407.01906 section 3).

A stack is one parameter, so it is frozen as a whole, and copies of the chosen rows beside it are trained: gradients and
optimizer state exist for those alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import MoeLayer, expert_tensors, find_moe_layers, named_tensors
from ..anatomy.moe_layers import CHOSEN, ChosenExperts, find_chosen
from ..anatomy.parameters import sort_names
from ..errors import ConfigError, UnsupportedModelError
from .split_forward import GROUPED_SPLIT_IMPLEMENTATION
from .stacks import IMPLEMENTATION, SPLIT_IMPLEMENTATION

Chosen = Mapping[int, Sequence[int]]  # layer index -> expert ids

_LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
_SPLIT = "expert_split"  # where a split model keeps its ExpertSplit


def split_experts(model: Any, chosen: Chosen, *, dtype: torch.dtype | None = None) -> None:
    """Freeze all routed experts and put trainable copies of the chosen ones beside them.

    What the model computes stays the same: to the bit where it ran with `hub_moe` or `grouped_mm`. With a `dtype`, the
    copies are kept in it (float32 beside a bfloat16 model, where steps of a small learning rate would be rounded away)
    and computed with in the model's own. Other parameters are left as they are; `freeze_all_but` sets them too.
    `save_pretrained` of a split model saves it merged, and its `load_state_dict` takes a merged state dict as well as
    its own.

    Raises:
        ConfigError: If the model is split already, or has no such layer or expert.
        UnsupportedModelError: If the model's experts cannot be given another forward.
    """
    if hasattr(model, _SPLIT):
        raise ConfigError("The experts of this model are split already; call merge_experts before choosing others.")
    layers = find_moe_layers(model)
    _check_chosen(chosen, layers)
    _check_layout(model, layers)
    split = ExpertSplit(model, layers)
    for layer in layers:
        layer.experts.requires_grad_(False)
        if chosen.get(layer.index):
            layer.experts.add_module(CHOSEN, ChosenExperts(layer.experts, chosen[layer.index], dtype))
    setattr(model, _SPLIT, split)
    model.save_pretrained, model.load_state_dict = split.save_pretrained, split.load_state_dict
    model.set_experts_implementation({part: _split_twin(name) for part, name in split.implementations.items()})


def merge_experts(model: Any) -> None:
    """Write the trained experts into their stacks and undo `split_experts`; every other expert stays as it is.

    Raises:
        ConfigError: If the model is not split.
    """
    split = _split_of(model)
    for layer in find_moe_layers(model):
        chosen = find_chosen(layer.experts)
        if chosen is not None:
            _write_rows(_own(layer.experts), chosen)
            delattr(layer.experts, CHOSEN)
    for stack, was_trained in split.was_trained.items():
        model.get_parameter(stack).requires_grad_(was_trained)
    model.set_experts_implementation(split.implementations)
    delattr(model, _SPLIT)
    del model.save_pretrained, model.load_state_dict


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """Every tensor of the chosen experts by its per-expert name, as it is now, in the dtype of the model.

    Where the copies are kept in that dtype, these are views.

    Raises:
        ConfigError: If the model is not split.
    """
    _split_of(model)
    tensors: dict[str, Tensor] = {}
    for layer in find_moe_layers(model):
        dtype = next(layer.experts.parameters(recurse=False)).dtype
        for expert in _chosen_ids(layer):
            tensors |= {name: view.to(dtype) for name, view in expert_tensors(layer, expert).items()}
    return tensors


def freeze_all_but(
    model: Any, chosen: Chosen, *, shared_experts: bool, non_expert_modules: bool, dtype: torch.dtype | None = None
) -> list[str]:
    """Leave to train only the chosen experts and, if asked for, shared experts and whatever is no expert.

    Splits the model if it is not split yet. Returns the names of all tensors that will be trained, sorted, experts by
    their per-expert names; buffers such as a balancing bias are not among them.

    Raises:
        ConfigError: If nothing would be trained, the model has no shared experts to train, or it is split differently.
    """
    if not hasattr(model, _SPLIT):
        split_experts(model, chosen, dtype=dtype)
    layers = find_moe_layers(model)
    asked = {index: tuple(sorted(experts)) for index, experts in chosen.items() if experts}
    split = {layer.index: _chosen_ids(layer) for layer in layers if _chosen_ids(layer)}
    if asked != split:
        raise ConfigError(f"The model is split for the experts {split}, not for {asked}; call merge_experts first.")
    has_shared = any(layer.shared_experts is not None for layer in layers)
    if shared_experts and not has_shared:
        raise ConfigError(f"A model of type {model.config.model_type!r} has no shared experts to train.")
    parameters = dict(model.named_parameters())
    for name, _, kind in sort_names(model, layers, parameters):
        if kind != "routed_experts":
            parameters[name].requires_grad_(shared_experts if kind == "shared_experts" else non_expert_modules)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise ConfigError("Nothing would be trained: no expert is chosen, nor shared experts or non-expert modules.")
    return sorted([*(name for name, *_ in named_tensors(model, layers) if name in trained), *trained_tensors(model)])


class ExpertSplit:
    """What a split model was before, and how it is saved and loaded."""

    def __init__(self, model: Any, layers: Sequence[MoeLayer]) -> None:
        self.model = model
        self.implementations = model.get_experts_implementation()
        self.was_trained = {
            f"{layer.name}.experts.{name}": stack.requires_grad
            for layer in layers
            for name, stack in layer.experts.named_parameters(recurse=False)
        }

    def save_pretrained(self, *args: Any, state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        """See `transformers.PreTrainedModel.save_pretrained`; saves the merged weights and leaves the model split."""
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        with _merged(state, self.model):
            type(self.model).save_pretrained(self.model, *args, state_dict=state, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """See `torch.nn.Module.load_state_dict`; of a merged or whole model, the chosen experts take their rows.

        Without this, loading a checkpoint that `save_pretrained` wrote would leave them untrained.
        """
        load = type(self.model).load_state_dict
        if any(f".{CHOSEN}." in name for name in state_dict):
            return load(self.model, state_dict, strict=strict, assign=assign)
        split = [
            (layer.experts, chosen, ChosenExperts(layer.experts, chosen.expert_ids))
            for layer in find_moe_layers(self.model)
            if (chosen := find_chosen(layer.experts)) is not None
        ]
        for experts, trained, _ in split:
            delattr(experts, CHOSEN)
            _write_rows(_own(experts), trained)  # what the state dict lacks stays as it is
        try:
            result = load(self.model, state_dict, strict=strict, assign=assign)
            for experts, trained, _ in split:
                _read_rows(_own(experts), trained)
        finally:
            for experts, trained, base in split:
                _write_rows(_own(experts), base)
                experts.add_module(CHOSEN, trained)
        return result


def _split_twin(implementation: str | None) -> str:
    """What computes split experts as they were computed, or, where nothing does, as `grouped_mm`."""
    return SPLIT_IMPLEMENTATION if implementation == IMPLEMENTATION else GROUPED_SPLIT_IMPLEMENTATION


def _split_of(model: Any) -> ExpertSplit:
    split = getattr(model, _SPLIT, None)
    if not isinstance(split, ExpertSplit):
        raise ConfigError("The experts of this model are not split; call split_experts first.")
    return split


def _chosen_ids(layer: MoeLayer) -> tuple[int, ...]:
    chosen = find_chosen(layer.experts)
    return () if chosen is None else chosen.expert_ids


def _own(experts: nn.Module) -> dict[str, Tensor]:
    return dict(experts.named_parameters(recurse=False))


@torch.no_grad()
def _read_rows(stacks: Mapping[str, Tensor], chosen: ChosenExperts) -> None:
    for name, rows in chosen.named_parameters():
        for row, expert in zip(rows, chosen.expert_ids, strict=True):
            if not torch.equal(stacks[name][expert], row.to(stacks[name].dtype)):  # else a wider copy keeps its digits
                row.copy_(stacks[name][expert])


@torch.no_grad()
def _write_rows(stacks: Mapping[str, Tensor], chosen: ChosenExperts) -> None:
    for name, rows in chosen.named_parameters():
        for row, expert in zip(rows, chosen.expert_ids, strict=True):
            stacks[name][expert].copy_(row)


@contextmanager
def _merged(state: dict[str, Tensor], model: nn.Module) -> Iterator[None]:
    """The state dict of a split model as that of a merged one, without a copy of the stacks: rows are put back."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for prefix, module in model.named_modules():
                if isinstance(module, ChosenExperts):
                    stacks_prefix = prefix.removesuffix(CHOSEN)
                    for name, _ in module.named_parameters():
                        stack, rows = state[stacks_prefix + name], state.pop(f"{prefix}.{name}")
                        for row, expert in zip(rows, module.expert_ids, strict=True):
                            kept.append((stack[expert], stack[expert].clone()))
                            stack[expert].copy_(row)
        yield
    finally:
        with torch.no_grad():
            for place, row in kept:
                place.copy_(row)


def _check_chosen(chosen: Chosen, layers: Sequence[MoeLayer]) -> None:
    by_index = {layer.index: layer for layer in layers}
    for index, experts in chosen.items():
        if index not in by_index:
            raise ConfigError(
                f"The model has no layer {index!r} with routed experts; it has {', '.join(map(str, by_index))}."
            )
        num_experts = by_index[index].num_experts
        for expert in experts:
            if not isinstance(expert, int) or not 0 <= expert < num_experts:
                raise ConfigError(
                    f"Layer {index} has no expert {expert!r}; it has {num_experts}, numbered from 0 to "
                    f"{num_experts - 1}."
                )
        if len(set(experts)) < len(experts):
            raise ConfigError(f"An expert of layer {index} is chosen twice: {list(experts)}.")


def _check_layout(model: Any, layers: Sequence[MoeLayer]) -> None:
    model_type = model.config.model_type
    can_set = getattr(model, "_can_set_experts_implementation", lambda: False)
    for layer in layers:
        experts: Any = layer.experts
        if not can_set() or not all(hasattr(experts, flag) for flag in _LAYOUT_FLAGS):
            raise UnsupportedModelError(
                f"Model type {model_type!r} computes its experts in a way that cannot be exchanged; a family with an "
                "experts implementation in transformers was expected."
            )
        if experts._is_expert_parallel:
            raise UnsupportedModelError("Experts that are spread over devices cannot be split; load without ep_size.")
        for name, stack in experts.named_parameters(recurse=False):
            if stack.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                raise UnsupportedModelError(
                    f"{layer.name}.experts.{name} is of type {stack.dtype}, which cannot be trained; load the model in "
                    "bfloat16 or float32."
                )
