"""What the name of a tensor in memory says: which expert it belongs to, or what else it is part of."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError

Part = Literal["routed_experts", "shared_experts", "balancing_bias", "non_expert_modules"]

_MAX_NAME = 500  # characters; the pattern below takes time by the square of it
_ROUTED = re.compile(r"(?P<block>.*?\.(?P<layer>\d+)(?:\..+)?)\.experts\.(?P<expert>\d+)\.(?P<tensor>[^.].*)")
_SHARED = re.compile(r"(^|\.)shared_(expert|mlp)")
_ROUTER = re.compile(r"\.(gate|router)(\.layer)?\.(weight|bias)$")
_LAYER = re.compile(r"\.(\d{1,9})\.")
_BALANCING_BIAS = re.compile(r"\.e_score_correction_bias$")


@dataclass(frozen=True)
class ExpertTensorName:
    """`model.layers.3.mlp.experts.5.up_proj.weight` in its parts: block `model.layers.3.mlp`, layer 3, expert 5."""

    block: str
    layer: int
    expert: int
    tensor: str


def parse_expert_name(name: str) -> ExpertTensorName | None:
    """The parts of a routed expert's tensor name; None for every other tensor."""
    match = _ROUTED.fullmatch(name) if len(name) <= _MAX_NAME else None
    if match is None:
        return None
    return ExpertTensorName(match["block"], int(match["layer"]), int(match["expert"]), match["tensor"])


def part_of(name: str) -> Part:
    """Which part of a model a tensor belongs to, by its name alone; only `anatomy` knows better, given a model."""
    if parse_expert_name(name):
        return "routed_experts"
    if _BALANCING_BIAS.search(name):
        return "balancing_bias"
    return "shared_experts" if _SHARED.search(name) else "non_expert_modules"


def is_router(name: str) -> bool:
    """Whether a tensor is a router's, by its name alone; the balancing bias is none."""
    return _ROUTER.search(name) is not None and parse_expert_name(name) is None


def layer_of(name: str) -> int | None:
    """The layer that a tensor's name gives."""
    match = _LAYER.search(name) if len(name) <= _MAX_NAME else None
    return int(match[1]) if match else None


def check_declared(names: Iterable[str], experts: Mapping[int, Sequence[int]], parts: Collection[str]) -> None:
    """Hold the tensors of a patch against what it says it changes: experts by layer, and other `parts`.

    Raises:
        CheckpointError: Naming the first tensor outside of it, or the first expert that lacks a tensor its like have.
    """
    found = _tensors_by_expert(experts)
    missing_parts = set(parts)
    for name in names:
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"the name {name[:40]!r}... is longer than {_MAX_NAME} characters.")
        expert = parse_expert_name(name)
        if expert is None:
            if part_of(name) not in parts:
                raise CheckpointError(f"the tensor {name!r} is outside of what the patch says it changes.")
            missing_parts.discard(part_of(name))
        elif (expert.layer, expert.expert) not in found:
            raise CheckpointError(
                f"the tensor {name!r} belongs to expert {expert.expert} of layer {expert.layer}, which the patch does "
                "not list."
            )
        else:
            found[expert.layer, expert.expert].add(f"{expert.block} {expert.tensor}")
    if missing_parts or not (found or parts):
        what = min(missing_parts, default="experts")
        raise CheckpointError(f"a patch of {what} without a tensor of them changes nothing.")
    for (layer, number), tensors in found.items():
        of_layer = set().union(*(found[layer, each] for each in experts[layer]))
        if not tensors or tensors != of_layer:
            lacking = min(of_layer - tensors, default="any").rpartition(" ")[2]
            raise CheckpointError(f"expert {number} of layer {layer} is listed and lacks the tensor {lacking!r}.")


def _tensors_by_expert(experts: Mapping[int, Sequence[int]]) -> dict[tuple[int, int], set[str]]:
    for layer, chosen in experts.items():
        if not chosen or len(set(chosen)) < len(chosen) or min(layer, *chosen) < 0:
            raise CheckpointError(f"the experts of layer {layer} must be some different numbers, not {list(chosen)}.")
    return {(layer, expert): set() for layer, chosen in experts.items() for expert in chosen}
