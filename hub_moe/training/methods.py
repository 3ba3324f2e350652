"""What each method trains: a base made ready for `MoeTrainer`, and made whole again afterwards."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import find_moe_layers, named_tensors
from ..errors import ConfigError
from ..experts import freeze_all_but, merge_experts
from .method_config import ExpertsMethod, LoraMethod
from .run_config import RunConfig
from .run_model import StoredDtypes
from .selection import ExpertChoice
from .sharding import is_sharded, sketch_whole


@dataclass(frozen=True)
class Prepared:
    """A model ready to be trained.

    Args:
        model: What `Trainer` gets; `requires_grad` says what is trained.
        trained: What may change of the base, in the names of `named_tensors`.
        biases: The balancing biases among it, which move without gradients.
        balancing_speed: 0 where they stay.
        dtypes: In which the base is stored.
        is_partial: Whether checkpoints hold only what is trained.
    """

    model: Any
    trained: frozenset[str]
    biases: tuple[str, ...]
    balancing_speed: float
    dtypes: StoredDtypes
    is_partial: bool


def prepare_model(base: PreTrainedModel, config: RunConfig, choice: ExpertChoice | None = None) -> Prepared:
    """Make `base` ready for the method of `config`; the method `experts` takes its `choice`.

    Raises:
        ConfigError: If the method or the balancing that is asked for does not fit the model.
    """
    biases = _bias_names(base)
    speed = _balancing_speed(config, has_bias=bool(biases))
    moved = biases if speed else ()
    dtypes = StoredDtypes(base)
    model, trained = _make_trainable(base, config, choice, dtypes)
    is_partial = isinstance(config.method, ExpertsMethod | LoraMethod)
    return Prepared(model, frozenset(trained) | set(moved), moved, speed, dtypes, is_partial)


def make_whole(prepared: Prepared) -> Any:
    """The base as it is now: trained experts in their stacks, adapters taken off without merging, dtypes as stored."""
    model = prepared.model
    if hasattr(model, "expert_split"):
        merge_experts(model)
    elif hasattr(model, "peft_config"):
        model = model.unload()
    prepared.dtypes.restore(model)
    return model


def _make_trainable(
    base: PreTrainedModel, config: RunConfig, choice: ExpertChoice | None, dtypes: StoredDtypes
) -> tuple[Any, list[str]]:
    keeps_float32 = config.model.dtype == "float32"
    if isinstance(config.method, LoraMethod):
        from .lora import add_adapters  # needs an extra

        torch.manual_seed(config.training.seed)  # adapters begin as random numbers
        return add_adapters(base, config.method, in_float32=keeps_float32), []
    if choice is not None:
        choice.check(find_moe_layers(base))
        names = freeze_all_but(
            base,
            choice.experts,
            shared_experts=choice.shared_experts,
            non_expert_modules=choice.non_expert_modules,
            dtype=torch.float32 if keeps_float32 else None,
        )
        return base, names
    base.requires_grad_(True)
    _freeze_bias_parameters(base)
    if keeps_float32:
        dtypes.widen(base)
    frozen = {name for name, _ in base.named_buffers()} | set(_bias_names(base))
    whole = sketch_whole(base) if is_sharded(base) else base  # names are all that is asked for
    return base, [name for name, *_ in named_tensors(whole, find_moe_layers(whole)) if name not in frozen]


def _freeze_bias_parameters(base: PreTrainedModel) -> None:
    """Some families keep the balancing bias as a parameter; it has no gradient, and balancing alone moves it."""
    for layer in find_moe_layers(base):
        if isinstance(layer.balancing_bias, nn.Parameter):
            layer.balancing_bias.requires_grad_(False)


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
    names = {id(tensor): name for name, tensor in (*base.named_parameters(), *base.named_buffers())}
    biases = [layer.balancing_bias for layer in find_moe_layers(base)]
    return tuple(names[id(bias)] for bias in biases if bias is not None)
