"""Where several patches of one base change the same tensors, how their changes agree, and what a method does there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from torch import Tensor

from .expert_patch import ExpertPatch
from .names import is_router, layer_of, parse_expert_name, part_of

Outcome = Literal["refuse", "mean", "ties", "dare", "dare_ties", "slerp", "equal", "one changed"]
Unit = tuple[str, int, int]  # kind, layer, expert; -1 where there is none


@dataclass(frozen=True)
class Agreement:
    """Two changes of the same numbers: the cosine between them, None where one is zero.

    `sign_agreement` is the share of equal signs among the numbers that both change, None where there are none.
    """

    first: str
    second: str
    cosine: float | None
    sign_agreement: float | None


@dataclass(frozen=True)
class Overlap:
    """A tensor, or all tensors of an expert or other part (`tensor` None), that several patches hold.

    Attributes:
        kind: "routed_experts", "shared_experts", "router", "balancing_bias" or "non_expert_modules".
        patches: Those that hold it; `norms` and `changes` are in their order.
        norms: Of each change, which is patched minus base tensor.
        changes: The norms relative to the norm of the base.
        agreements: For every two of the patches.
        outcomes: What is done: the method; "equal", where all hold the same bytes, which are taken; "one changed",
            where all others hold the base's, so that the one is taken; "refuse", where nothing is done.
    """

    kind: str
    layer: int | None
    expert: int | None
    tensor: str | None
    patches: tuple[str, ...]
    norms: tuple[float, ...]
    changes: tuple[float, ...]
    agreements: tuple[Agreement, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def is_conflict(self) -> bool:
        """Whether a method has to decide."""
        return not set(self.outcomes) <= {"equal", "one changed"}


@dataclass(frozen=True)
class ConflictTable:
    """All overlaps of some patches, by expert or other part and by tensor.

    `notes` say what no tensor shows: a patch changes the router of a layer in which another changes experts.
    """

    patches: tuple[str, ...]
    units: tuple[Overlap, ...]
    tensors: tuple[Overlap, ...]
    notes: tuple[str, ...] = ()

    @property
    def conflicts(self) -> tuple[Overlap, ...]:
        """The overlapping tensors about which a method has to decide."""
        return tuple(row for row in self.tensors if row.is_conflict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "patches": list(self.patches),
            "units": [asdict(row) for row in self.units],
            "tensors": [asdict(row) for row in self.tensors],
            "notes": list(self.notes),
        }


def decide(name: str, records: Mapping[str, tuple[str, bool]], method: str) -> Outcome:
    """What becomes of a tensor that patches hold, given as patch -> (its sha256, whether it differs from the base's).

    Routers and balancing bias are averaged whichever method: their numbers are compared with each other, expert against
    expert, when a few of all experts are chosen, so that numbers set to zero or scaled up one by one would send
    tokens elsewhere.
    """
    if len({sha256 for sha256, _ in records.values()}) == 1:
        return "equal"
    if sum(is_changed for _, is_changed in records.values()) == 1:
        return "one changed"
    if method != "refuse" and (is_router(name) or part_of(name) == "balancing_bias"):
        return "mean"
    return method  # type: ignore[return-value]


@dataclass
class Sums:
    """What the comparison of changes needs, summed over numbers, so that tensors add up to an expert."""

    patches: tuple[str, ...]
    squares: dict[str, float] = field(default_factory=dict)
    base_square: float = 0.0
    pairs: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # products, equal signs, both changed
    outcomes: dict[Outcome, None] = field(default_factory=dict)

    def add_tensor(self, before: Tensor, changes: Mapping[str, Tensor], outcome: Outcome) -> None:
        """Count in one tensor: the base's, and the changes of the patches that hold it."""
        self.outcomes[outcome] = None
        self.base_square += _product(before, before)
        for name, change in changes.items():
            self.squares[name] = self.squares.get(name, 0.0) + _product(change, change)
        for first, second in combinations(changes, 2):
            ours, theirs = changes[first], changes[second]
            both = (ours != 0) & (theirs != 0)
            agree = both & ((ours > 0) == (theirs > 0))
            counted = self.pairs.setdefault((first, second), [0.0, 0.0, 0.0])
            for place, value in enumerate((_product(ours, theirs), float(agree.sum()), float(both.sum()))):
                counted[place] += value

    def to_overlap(self, unit: Unit, tensor: str | None = None) -> Overlap:
        """The row of a table."""
        kind, layer, expert = unit
        norms = tuple(math.sqrt(self.squares[name]) for name in self.patches if name in self.squares)
        size = math.sqrt(self.base_square)
        return Overlap(
            kind=kind,
            layer=None if layer < 0 else layer,
            expert=None if expert < 0 else expert,
            tensor=tensor,
            patches=tuple(name for name in self.patches if name in self.squares),
            norms=norms,
            changes=tuple(norm / size if size else 0.0 for norm in norms),
            agreements=tuple(self._agreement(*pair) for pair in self.pairs),
            outcomes=tuple(self.outcomes),
        )

    def _agreement(self, first: str, second: str) -> Agreement:
        product, agree, both = self.pairs[first, second]
        norms = math.sqrt(self.squares[first]) * math.sqrt(self.squares[second])
        cosine = max(-1.0, min(1.0, product / norms)) if norms else None
        return Agreement(first, second, cosine, agree / both if both else None)


def unit_of(name: str) -> Unit:
    """The expert or other part of a model that a tensor belongs to, by its name."""
    expert = parse_expert_name(name)
    if expert is not None:
        return "routed_experts", expert.layer, expert.expert
    layer = layer_of(name)
    return "router" if is_router(name) else part_of(name), -1 if layer is None else layer, -1


def describe_units(names: Iterable[str]) -> str:
    """`experts 0, 7 of layer 1, the router of layer 2`: what tensors of these names are."""
    experts: dict[int, list[int]] = {}
    others = []
    for kind, layer, expert in sorted({unit_of(name) for name in names}, key=lambda unit: (unit[0] != _EXPERTS, unit)):
        if kind == _EXPERTS:
            experts.setdefault(layer, []).append(expert)
        else:
            others.append(f"the {kind.replace('_', ' ')}{'' if layer < 0 else f' of layer {layer}'}")
    ids = {layer: f"{', '.join(map(str, chosen))} of layer {layer}" for layer, chosen in experts.items()}
    return ", ".join([*(f"expert{'s' * (len(experts[layer]) > 1)} {text}" for layer, text in ids.items()), *others])


_EXPERTS = "routed_experts"


def describe_conflicts(holders: Mapping[str, Sequence[str]]) -> str:
    """Every conflict in one sentence part: tensor name -> the patches that change it."""
    by_patches: dict[tuple[str, ...], list[str]] = {}
    for name, patches in holders.items():
        by_patches.setdefault(tuple(patches), []).append(name)
    return "; ".join(f"{' and '.join(who)} change {describe_units(names)}" for who, names in by_patches.items())


def find_interactions(patches: Mapping[str, ExpertPatch]) -> tuple[str, ...]:
    """Notes of patches that share no tensor and meet all the same, because one decides which tokens the other sees."""
    notes = []
    for name, patch in patches.items():
        routers = [unit_of(each) for each in patch.tensors if unit_of(each)[0] in ("router", "balancing_bias")]
        layers = {layer for _, layer, _ in routers}
        for other, theirs in patches.items():
            shared = sorted(layers & theirs.metadata.experts.keys()) if other != name else []
            if shared:
                what = " and ".join(sorted({kind.replace("_", " ") for kind, layer, _ in routers if layer in shared}))
                where = f"layer{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}"
                notes.append(
                    f"{name} changes the {what} of {where}, where {other} changes experts: these will see other tokens "
                    "than they were trained on."
                )
    return tuple(notes)


def _product(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() * theirs.double()).sum())
