"""Low-rank adapters by peft, and whether everything a person named really got one."""

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..anatomy import expert_tensors, find_moe_layers
from ..errors import ConfigError, MissingExtraError
from .method_config import LoraMethod

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise MissingExtraError("The method lora needs peft: pip install 'hub_moe[train]'.") from error


def add_adapters(model: Any, method: LoraMethod, *, in_float32: bool = True) -> PeftModel:
    """`model` with an adapter at everything that `method` names; only the adapters are trained.

    peft rewrites names for some families: on DeepSeek, `target_modules = [gate_proj, up_proj, down_proj]` becomes the
    stacks of routed experts and silently leaves out shared experts and dense layers, and `all-linear` adds the router.
    What the names say about the model before peft saw it is therefore compared with what got an adapter.

    Raises:
        ConfigError: If a name matches nothing, a named module got no adapter, or the router got one unnamed.
    """
    routers = {layer.name: name for layer in find_moe_layers(model) for name in [_name_of(model, layer.router)]}
    parameters = [*method.target_parameters, *(_expert_stacks(model) if method.routed_experts else [])]
    named = [*_named_modules(model, method.target_modules), *_named_stacks(model, method.target_modules)]
    _check_names_match(model, method.target_modules, method.target_parameters)
    modules = method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules)
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=modules or None,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # about rank_pattern keys that peft itself added
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        # peft asks transformers by a name that 5.23 deprecates
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is", category=FutureWarning)
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
        except ValueError as error:
            raise ConfigError(f"peft refuses [method]: {str(error).splitlines()[0]}") from error
    places = set(find_adapters(adapted))
    _check_left_out(named, places, method)
    _check_routers(routers.values(), places, method)
    return adapted


def find_adapters(model: nn.Module) -> list[str]:
    """Names, as in the model before, of the modules and the parameters that have an adapter."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            plain = re.sub(r"^base_model\.model\.", "", name).replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)  # of an adapter around a parameter
            found.append(f"{plain}.{parameter}" if parameter else plain)
    return found


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def _expert_stacks(model: nn.Module) -> list[str]:
    """Every stack of routed experts by the end of its name; biases are too small to matter and peft refuses them."""
    stacks = [
        f"{_after_layer(layer.name)}.experts.{name}"
        for layer in find_moe_layers(model)
        for name, parameter in layer.experts.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    return list(dict.fromkeys(stacks))


def _after_layer(name: str) -> str:
    """`mlp.shared_experts.up_proj` of `model.layers.3.mlp.shared_experts.up_proj`."""
    return str(re.split(r"\.\d+\.", name, maxsplit=1)[-1])


def _named_modules(model: Any, targets: Sequence[str] | str) -> list[str]:
    """The linear modules that `targets` names by peft's documented rules: an end of the name, a regex, or all."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        return [name for name in linear if re.fullmatch(targets, name)]
    return [name for name in linear if any(_ends_with(name, target) for target in targets)]


def _named_stacks(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """The stacks of routed experts that a list of `targets` names as checkpoints do: `experts.5.gate_proj`."""
    if isinstance(targets, str):
        return []
    return [
        f"{layer.name}.experts.{name}"
        for layer in find_moe_layers(model)
        for name, parameter in layer.experts.named_parameters(recurse=False)
        if parameter.dim() == 3
        for part in ([name] if name != "gate_up_proj" else ["gate_proj", "up_proj"])
        if any(_ends_with(f"{layer.name}.experts.0.{part}", target) for target in targets)
    ]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_names_match(model: nn.Module, modules: Sequence[str] | str, parameters: Sequence[str]) -> None:
    module_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    module_names += [
        name.removesuffix(".weight") for layer in find_moe_layers(model) for name in expert_tensors(layer, 0)
    ]
    parameter_names = [name for name, _ in model.named_parameters()]
    for key, targets, names in (
        ("target_modules", () if isinstance(modules, str) else modules, module_names),
        ("target_parameters", parameters, parameter_names),
    ):
        for target in targets:
            if not any(_ends_with(name, target) for name in names):
                ends = sorted({".".join(name.split(".")[-2:]) for name in names})
                raise ConfigError(
                    f"[method] {key} names {target!r}, which is the end of no name; ends are {', '.join(ends)}."
                )


def _check_left_out(named: Iterable[str], places: set[str], method: LoraMethod) -> None:
    left_out = [
        name
        for name in named
        if name not in places
        and f"{name}.weight" not in places
        and not any(_ends_with(name, accepted) or accepted in name.split(".") for accepted in method.accept_left_out)
    ]
    if left_out:
        parts = list(dict.fromkeys(_after_layer(name) for name in left_out))
        stacks = [part for part in parts if ".experts." in part]
        include = ", ".join(f'"{part if part in stacks else part + ".weight"}"' for part in parts)
        accept = ", ".join(f'"{part}"' for part in parts)
        raise ConfigError(
            f"[method] target_modules names {len(dict.fromkeys(left_out))} modules that peft gives no adapter, such as "
            f"{left_out[0]}; include them by target_parameters = [{include}], or accept it by accept_left_out = "
            f"[{accept}]."
        )


def _check_routers(routers: Iterable[str], places: set[str], method: LoraMethod) -> None:
    modules = method.target_modules
    named = [*method.target_parameters, *([] if isinstance(modules, str) else modules)]
    for router in routers:
        inside = [place for place in places if place == router or place.startswith(f"{router}.")]
        wanted = [place for place in inside if any(_ends_with(place, target) for target in named)]
        if inside and not wanted:
            raise ConfigError(
                f"[method] target_modules = {modules!r} would train the router {router}, which was not named; list the "
                f'modules instead, or name it by target_parameters = ["{_after_layer(inside[0])}"].'
            )
