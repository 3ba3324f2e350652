"""Finds routers, experts and shared experts in a transformers model.

In transformers 5 nearly every family is built alike: a block holds `experts`, whose parameters stack all E experts
along their first dimension, next to a router called `gate` or `router`. That shape is what this file looks for, so
a new family of the same shape needs no entry; a family of another shape is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_experts", "shared_expert")
_SHARED_NAME_BESIDE_BLOCK = "shared_mlp"  # granitemoeshared, granitemoehybrid
# lfm2_moe and afmoe say expert_bias, every other family e_score_correction_bias; the bias is the router's, its statics
# module's (ernie4_5_moe) or the block's (minimax_m2, hy_v3, lfm2_moe, afmoe)
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
_TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
_NUM_EXPERTS_FIELDS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoeLayer:
    """The experts of one layer, as live modules of the model they were found in."""

    index: int
    name: str
    router: nn.Module
    experts: nn.Module
    shared_experts: nn.Module | None
    num_experts: int
    top_k: int
    is_mtp: bool
    bias_owner: nn.Module | None = None

    @property
    def balancing_bias(self) -> Tensor | None:
        """The number per expert that is added to scores for the choice only, as the model holds it now.

        A buffer or a parameter without gradient, of shape (E,) or, in ernie4_5_moe, (1, E). None where the router
        chooses by scores alone.
        """
        if self.bias_owner is None:
            return None
        bias: Tensor = next(getattr(self.bias_owner, name) for name in _BIAS_NAMES if hasattr(self.bias_owner, name))
        return bias


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every layer with routed experts, in the model's order; MTP layers come last and are marked.

    The model may be on the meta device. `name` is that of the block that holds router and experts
    (`model.layers.3.mlp`), `index` the decoder layer's number in the checkpoint.

    Raises:
        UnsupportedModelError: If the model has no routed experts, or keeps them in a form this does not know.
    """
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    blocks = [(name, block) for name, block in model.named_modules() if "experts" in _children(block)]
    if not blocks:
        raise UnsupportedModelError(_no_experts_message(text_config))
    layers = [_describe_block(model, name, block, text_config) for name, block in blocks]
    if len({layer.index for layer in layers}) < len(layers):
        raise UnsupportedModelError(
            f"Model type {text_config.model_type!r} has layers with more than one set of experts, which hub_moe does "
            "not tell apart."
        )
    return layers


def _describe_block(model: nn.Module, name: str, block: nn.Module, text_config: Any) -> MoeLayer:
    children = _children(block)
    routers = [children[router] for router in _ROUTER_NAMES if router in children]
    experts = children["experts"]
    num_experts = _count_stacked_experts(experts)
    index = re.search(r"\d+", name)
    if len(routers) != 1 or num_experts is None or index is None:
        raise UnsupportedModelError(
            f"Model type {text_config.model_type!r} keeps its experts in a form hub_moe does not know: expected in "
            f"{name} a router named {' or '.join(_ROUTER_NAMES)} and parameters that stack all experts."
        )
    beside = _children(model.get_submodule(name.rpartition(".")[0]))
    shared = [children[shared] for shared in _SHARED_NAMES if shared in children]
    shared += [beside[_SHARED_NAME_BESIDE_BLOCK]] if _SHARED_NAME_BESIDE_BLOCK in beside else []
    return MoeLayer(
        index=int(index.group()),
        name=name,
        router=routers[0],
        experts=experts,
        shared_experts=shared[0] if shared else None,
        num_experts=num_experts,
        top_k=_top_k(text_config),
        is_mtp=int(index.group()) >= text_config.num_hidden_layers,
        bias_owner=_bias_owner(block, experts),
    )


def _without_adapter(module: nn.Module) -> nn.Module:
    """What peft has wrapped, once for each adapted parameter of a stack."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _bias_owner(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    """The module of the block, outside of its experts, that holds a balancing bias."""
    inside_experts = set(experts.modules())
    for module in block.modules():
        if module not in inside_experts and any(
            isinstance(getattr(module, name, None), Tensor) for name in _BIAS_NAMES
        ):
            return module
    return None


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """By name; of one that an adapter is wrapped around, what is inside."""
    return {name: _without_adapter(child) for name, child in module.named_children()}


def _count_stacked_experts(experts: nn.Module) -> int | None:
    """E, if `experts` is a stack of E experts: all parameters its own, all E long, matrices among them."""
    own = list(experts.parameters(recurse=False))
    lengths = {parameter.shape[0] for parameter in own}
    has_matrices = any(parameter.dim() == 3 for parameter in own)
    others = (child for child in experts.children() if not isinstance(child, ChosenExperts))
    is_alone = not any(list(child.parameters()) for child in others)
    return lengths.pop() if has_matrices and len(lengths) == 1 and is_alone else None


def _top_k(text_config: Any) -> int:
    for field in _TOP_K_FIELDS:
        if isinstance(value := getattr(text_config, field, None), int):
            return value
    raise UnsupportedModelError(
        f"The config of model type {text_config.model_type!r} does not say how many experts a token gets; "
        f"expected one of {', '.join(_TOP_K_FIELDS)}."
    )


def _no_experts_message(text_config: Any) -> str:
    if any(getattr(text_config, field, None) for field in _NUM_EXPERTS_FIELDS):
        return (
            f"Model type {text_config.model_type!r} keeps its experts in a form hub_moe does not know: "
            "no module named 'experts'."
        )
    return f"Model type {text_config.model_type!r} has no routed experts; hub_moe is about models that do."


CHOSEN = "chosen"  # the name of the module below the layer's experts


class ChosenExperts(nn.Module):
    """Trainable copies of some rows of a layer's expert stacks, one parameter for each stack and named like it.

    Row i of every parameter is expert `expert_ids[i]`; while this stands beside the stacks, their own rows of these
    experts are not used.
    """

    is_chosen_E: Tensor  # int64, 1 for a chosen expert

    def __init__(self, experts: nn.Module, expert_ids: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Copy the rows of `expert_ids`, in `dtype` if that is given."""
        super().__init__()
        self.expert_ids = tuple(sorted(expert_ids))
        for name, stack in experts.named_parameters(recurse=False):
            rows = torch.tensor(self.expert_ids, dtype=torch.int64, device=stack.device)
            self.register_parameter(name, nn.Parameter(stack.detach()[rows].to(dtype or stack.dtype)))
        is_chosen_E = torch.zeros(stack.shape[0], dtype=torch.int64, device=stack.device)
        self.register_buffer("is_chosen_E", is_chosen_E.index_fill(0, rows, 1), persistent=False)

    def extra_repr(self) -> str:
        return f"expert_ids={list(self.expert_ids)}"


def find_chosen(experts: nn.Module) -> ChosenExperts | None:
    """The chosen experts beside the stacks of a layer, or None where the layer is not split."""
    chosen = getattr(experts, CHOSEN, None)
    return chosen if isinstance(chosen, ChosenExperts) else None
