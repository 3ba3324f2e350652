"""What each method trains: a base made ready for `MoeTrainer`, and made whole again afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Kind, expert_tensors, find_moe_layers, named_tensors
from ..errors import ConfigError
from ..experts import freeze_all_but, merge_experts, split_experts
from .method_config import ExpertsMethod, LoraMethod
from .run_config import RunConfig
from .selection import ExpertChoice


@dataclass(frozen=True)
class Plan:
    """What a run trains of a base, in the names of `named_tensors`.

    Args:
        trained: Tensors of the base that may change.
        biases: Those of them that are balancing biases, moved without gradients.
        balancing_speed: 0 where the biases stay.
        choice: The chosen experts, for method `experts`.
    """

    trained: frozenset[str]
    biases: tuple[str, ...]
    balancing_speed: float
    choice: ExpertChoice | None = None


def plan_method(base: PreTrainedModel, config: RunConfig, choice: ExpertChoice | None = None) -> Plan:
    """What the method of `config` trains of `base`; `choice` goes with the method `experts`.

    Raises:
        ConfigError: If balancing is asked for and no router has a bias, or an expert is chosen that is not there.
    """
    biases = _bias_names(base)
    speed = _balancing_speed(config, has_bias=bool(biases))
    moved = biases if speed else ()
    if isinstance(config.method, LoraMethod):
        trained: set[str] = set()
    elif isinstance(config.method, ExpertsMethod):
        assert choice is not None
        trained = set(_chosen_names(base, choice))
    else:
        parameters = set(base.state_dict()) - {name for name, _ in base.named_buffers()}
        trained = {name for name, kind, _ in _names(base) if name in parameters or kind == "routed_experts"}
    return Plan(frozenset(trained | set(moved)), moved, speed, choice)


def make_trainable(base: PreTrainedModel, config: RunConfig, plan: Plan) -> nn.Module:
    """The model that `Trainer` gets: `base` itself, split for chosen experts, or wrapped with adapters.

    Raises:
        ConfigError: If an adapter named in the method cannot be added.
    """
    if isinstance(config.method, LoraMethod):
        from .lora import add_adapters  # needs an extra

        return add_adapters(base, config.method)
    if plan.choice is not None:
        freeze_all_but(
            base,
            plan.choice.experts,
            shared_experts=plan.choice.shared_experts,
            non_expert_modules=plan.choice.non_expert_modules,
        )
        split_experts(base, plan.choice.experts)
    else:
        base.requires_grad_(True)
    return base


def make_whole(model: nn.Module, plan: Plan) -> Any:
    """The base again: trained experts in their stacks, adapters taken off without merging them."""
    if plan.choice is not None:
        merge_experts(model)
        return model
    return model.unload() if hasattr(model, "unload") else model  # type: ignore[operator]


def is_partial(config: RunConfig) -> bool:
    """Whether checkpoints hold only what is trained."""
    return isinstance(config.method, ExpertsMethod | LoraMethod)


def _balancing_speed(config: RunConfig, *, has_bias: bool) -> float:
    speed = config.balancing.speed
    if speed is None:
        return 0.001 if config.method.NAME == "pretrain" and has_bias else 0.0
    if speed and not has_bias:
        raise ConfigError(
            f"[balancing] speed is {speed}, and the model's routers have no balancing bias; leave the table out."
        )
    return speed


def _bias_names(base: PreTrainedModel) -> tuple[str, ...]:
    tensors = {id(tensor): name for name, tensor in (*base.named_parameters(), *base.named_buffers())}
    biases = [layer.balancing_bias for layer in find_moe_layers(base)]
    return tuple(tensors[id(bias)] for bias in biases if bias is not None)


def _chosen_names(base: PreTrainedModel, choice: ExpertChoice) -> Iterator[str]:
    layers = {layer.index: layer for layer in find_moe_layers(base)}
    for index, experts in choice.experts.items():
        if index not in layers:
            raise ConfigError(
                f"The choice names experts of layer {index}; the model has experts in layers "
                f"{', '.join(map(str, layers))}."
            )
        for expert in experts:
            yield from expert_tensors(layers[index], expert)
    parameters = {name for name, _ in base.named_parameters()}
    for name, kind, _ in _names(base):
        is_shared = kind == "shared_experts"
        is_wanted = choice.shared_experts if is_shared else choice.non_expert_modules and kind != "routed_experts"
        if is_wanted and name in parameters:
            yield name


def _names(base: PreTrainedModel) -> Iterator[tuple[str, Kind, int | None]]:
    for name, kind, layer, _ in named_tensors(base, find_moe_layers(base)):
        yield name, kind, layer
