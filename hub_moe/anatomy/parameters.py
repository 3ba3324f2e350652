"""Sorts a model's parameters by what they are for: the vocabulary of every table this project prints."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from .moe_layers import CHOSEN, MoeLayer

Kind = Literal[
    "routed_experts",
    "shared_experts",
    "router",
    "attention",
    "dense_mlp",
    "norms",
    "embeddings",
    "head",
    "other",
    "other_modalities",
    "mtp",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_IDLE_KINDS = ("embeddings", "other_modalities", "mtp")

# Class names by which transformers' families can be told apart where modules have no fixed place.
_OTHER_MODALITY = re.compile(r"Vision|Visual|Audio|Projector|Merger")
_TOKEN_MIXER = re.compile(r"Attention|Attn|DeltaNet|Mamba|Mixer|ShortConv")
_DENSE_MLP = re.compile(r"MLP|Mlp|FeedForward")


@dataclass(frozen=True)
class SortedParameter:
    """One parameter: what it is for, and how many of its numbers one token uses.

    `kind` is "mtp" for everything in an MTP layer; `kind_in_layer` says what it is inside of the layer.
    """

    name: str
    kind: Kind
    kind_in_layer: Kind
    shape: tuple[int, ...]
    size: int
    active_size: int
    is_matrix: bool


def sort_parameters(model: nn.Module, moe_layers: list[MoeLayer]) -> list[SortedParameter]:
    """Every parameter with its kind; `moe_layers` as `find_moe_layers` returns them.

    A token uses K of E routed experts, one row of the input embedding (counted as nothing), nothing of MTP layers and
    of vision or audio towers ("other_modalities"), and all of the rest; "other" is what fits no kind. A head tied to
    the input embedding is listed with size 0, since its numbers are counted there.
    """
    return [*_sort(model, moe_layers), *_tied_head(model)]


def sort_names(model: nn.Module, moe_layers: list[MoeLayer], names: Iterable[str]) -> Iterator[tuple[str, Kind, Kind]]:
    """`(name, kind, kind_in_layer)` of each of the named parameters and buffers, as in `SortedParameter`."""
    kinds = _kinds_of_modules(model, moe_layers)
    mtp_layers = tuple(_layer_prefix(layer) for layer in moe_layers if layer.is_mtp)
    blocks = {model.get_submodule(layer.name) for layer in moe_layers}
    for name in names:
        kind = _kind(name, _owners(model, name), kinds, blocks)
        yield name, "mtp" if name.startswith(mtp_layers) else kind, kind


def layer_index(name: str) -> int | None:
    """The number of the decoder layer that a parameter or buffer belongs to, by its name; None outside of layers."""
    index = re.search(r"\.(\d+)\.", f".{name}")
    return int(index.group(1)) if index else None


def _sort(model: Any, moe_layers: list[MoeLayer]) -> Iterator[SortedParameter]:
    active_share = {f"{layer.name}.experts": (layer.top_k, layer.num_experts) for layer in moe_layers}
    copies = tuple(f"{layer.name}.experts.{CHOSEN}." for layer in moe_layers)  # of rows that the stacks count
    parameters = {name: each for name, each in model.named_parameters() if not name.startswith(copies)}
    for name, kind, kind_in_layer in sort_names(model, moe_layers, parameters):
        parameter = parameters[name]
        top_k, num_experts = active_share.get(name.rpartition(".")[0], (1, 1))
        yield SortedParameter(
            name=name,
            kind=kind,
            kind_in_layer=kind_in_layer,
            shape=tuple(parameter.shape),
            size=parameter.numel(),
            active_size=0 if kind in _IDLE_KINDS else parameter.numel() // num_experts * top_k,
            is_matrix=parameter.dim() in (2, 3) and not isinstance(_owners(model, name)[0], nn.Conv1d),
        )


def _tied_head(model: Any) -> Iterator[SortedParameter]:
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        yield SortedParameter(
            name="tied head",
            kind="head",
            kind_in_layer="head",
            shape=tuple(head.weight.shape),
            size=0,
            active_size=head.weight.numel(),
            is_matrix=True,
        )


def _kinds_of_modules(model: Any, moe_layers: list[MoeLayer]) -> dict[nn.Module, Kind]:
    kinds: dict[nn.Module, Kind] = {}
    if model.get_output_embeddings() is not None:
        kinds[model.get_output_embeddings()] = "head"
    kinds[model.get_input_embeddings()] = "embeddings"
    for layer in moe_layers:
        kinds |= {layer.experts: "routed_experts", layer.router: "router"}
        if layer.shared_experts is not None:
            kinds[layer.shared_experts] = "shared_experts"
    return kinds


def _layer_prefix(layer: MoeLayer) -> str:
    """The start of the names of all parameters of a layer: `model.layers.3.`"""
    before, index, _ = layer.name.partition(f".{layer.index}")
    return f"{before}{index}."


def _owners(model: nn.Module, parameter_name: str) -> list[nn.Module]:
    """The modules around a parameter, from the one that holds it outwards."""
    owners = [model]
    for part in parameter_name.split(".")[:-1]:
        owners.insert(0, owners[0].get_submodule(part))
    return owners


def _kind(name: str, owners: list[nn.Module], kinds: dict[nn.Module, Kind], blocks: set[nn.Module]) -> Kind:
    class_names = [type(owner).__name__ for owner in owners]
    if any(_OTHER_MODALITY.search(class_name) for class_name in class_names):
        return "other_modalities"
    if "Norm" in class_names[0]:
        return "norms"
    for owner, class_name in zip(owners, class_names, strict=True):
        if owner in kinds:
            return kinds[owner]
        if owner in blocks:
            return _kind_beside_experts(name)
        if _TOKEN_MIXER.search(class_name):
            return "attention"
        if _DENSE_MLP.search(class_name):
            return "dense_mlp"
    return "embeddings" if isinstance(owners[0], nn.Embedding) else "other"


def _kind_beside_experts(name: str) -> Kind:
    """Of a parameter directly in the block: a gate of the shared experts, a balancing bias, or a projection."""
    if "shared" in name:
        return "shared_experts"
    return "router" if "expert" in name else "dense_mlp"
