"""Which experts to train on a task: expert-specialised fine-tuning, ESFT (arXiv:2407.01906 section 3.2).

Scores, rounding and choice are those of ESFT's released data, step by step in the same floating-point order, so that
the same routing gives the same choice. ESFT's later code divides each score by the sum over layers instead of experts;
the released scores and choices were not made with it, and neither are ours.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, Literal, get_args

from ..anatomy import ExpertProfile, LayerProfile, MoeLayer
from ..errors import ConfigError
from ..files.json_files import read_json, write_json

Score = Literal["gate", "token"]
SCORES: tuple[Score, ...] = get_args(Score)
RELEASED_DECIMALS = 4
_LAYER = re.compile("0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Scores:
    """A number for each expert of each layer, by layer index; `score` says what it measures."""

    score: Score
    layers: Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class ExpertChoice:
    """What is trained: expert ids by layer index, and whether the shared experts and all that is no expert are, too."""

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @property
    def num_experts(self) -> int:
        """Experts chosen, over all layers."""
        return sum(map(len, self.experts.values()))

    def save(self, path: str | Path) -> None:
        """Write ESFT's `expert_config.json`, whole or not at all."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """ESFT's form: `{"experts": {"3": [1, 5]}, "shared_experts": false, "non_expert_modules": false}`."""
        return {
            "experts": {str(layer): list(experts) for layer, experts in sorted(self.experts.items())},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }

    @staticmethod
    def load(path: str | Path) -> "ExpertChoice":
        """Read an `expert_config.json`, ours or one that ESFT released.

        Raises:
            ConfigError: If the file is damaged or something else.
            OSError: If it cannot be read.
        """
        data = read_json(path, "an expert_config.json")
        expected = {"experts", "shared_experts", "non_expert_modules"}
        if set(data) != expected or not isinstance(data["experts"], dict):
            raise ConfigError(
                f"{path} is not an expert_config.json: expected the fields {', '.join(sorted(expected))}."
            )
        for field in ("shared_experts", "non_expert_modules"):
            if not isinstance(data[field], bool):
                raise ConfigError(f"{path}: {field} is {data[field]!r}, not true or false.")
        experts = dict(_parse_layer(path, layer, ids) for layer, ids in data["experts"].items())
        return ExpertChoice(dict(sorted(experts.items())), data["shared_experts"], data["non_expert_modules"])

    def check(self, layers: Sequence[MoeLayer]) -> None:
        """Hold the choice against a model's layers.

        Raises:
            ConfigError: If the model lacks a chosen layer or expert, or shared experts are chosen and it has none.
        """
        known = {layer.index: layer.num_experts for layer in layers}
        for index, experts in self.experts.items():
            if index not in known:
                raise ConfigError(
                    f"The choice names layer {index}; the model's layers with experts are "
                    f"{', '.join(map(str, sorted(known)))}."
                )
            if experts and max(experts) >= known[index]:
                raise ConfigError(
                    f"The choice names expert {max(experts)} of layer {index}, which has {known[index]} experts."
                )
        if self.shared_experts and all(layer.shared_experts is None for layer in layers):
            raise ConfigError("The choice trains the shared experts, but the model has none.")


def score_experts(
    profile: ExpertProfile,
    *,
    score: Score,
    domain: str | None = None,
    decimals: int | None = RELEASED_DECIMALS,
    normalise: bool = False,
) -> Scores:
    """How much each expert of a layer has to do on a domain; `domain` may be left out where there is one.

    "token": the share of tokens that chose an expert, over K, so that a layer sums to 1 (token selection ratio).
    "gate": its gate mass over the number of tokens (average gate score), so that a layer sums to what the weights of
    one token do: 1 where the router normalises them, about 0.4 in DeepSeek-V2-Lite, 2.5 in DeepSeek-V3. Unlike the
    paper, which averages over samples, tokens of all samples weigh the same, as in ESFT's released scores.

    Args:
        profile: Of the model on the task.
        score: "token" or "gate".
        domain: Of the profile.
        decimals: Round to; ESFT's choices were made from four. None keeps everything.
        normalise: Divide a layer's scores by their sum, so that a top_p means the same for every model.

    Raises:
        ConfigError: If the score or the domain is unknown, or a layer saw no token.
    """
    if score not in SCORES:
        raise ConfigError(f"score={score!r} is unknown; expected one of {', '.join(SCORES)}.")
    layers = profile.domain(domain).layers
    for index, layer in layers.items():
        if not sum(layer.tokens):
            raise ConfigError(f"Layer {index} of the expert profile saw no token, so its experts have no scores.")
    added_up = _add_up_shares({count for layer in layers.values() for count in layer.tokens}, profile.top_k)
    scores = {index: _score_layer(layer, score, added_up) for index, layer in layers.items()}
    if normalise:
        scores = {index: _normalise(index, values) for index, values in scores.items()}
    if decimals is not None:
        scores = {index: [round(value, decimals) for value in values] for index, values in scores.items()}
    return Scores(score, scores)


def select_experts(scores: Scores, *, top_p: float | None = None, share: float | None = None) -> ExpertChoice:
    """The experts with the highest scores, so many as one of the two arguments says.

    Ids of a layer are in the order of their scores; of equal scores the lower id comes first, then the lower layer.

    Args:
        scores: Of all experts.
        top_p: ESFT's rule: in each layer one by one until their scores add up to `top_p` or more. The expert that
            reaches it is chosen.
        share: This share of all experts, the highest scores of the whole model: memory and size of the patch are
            known beforehand, and layers whose experts the task uses most unevenly get the most. A layer may get none.

    Raises:
        ConfigError: If not one of the two is given, it is not in (0, 1], or `top_p` is below 1 and more than all
            scores of a layer.
    """
    if (top_p is None) == (share is None):
        raise ConfigError("Experts are selected either by top_p or by share; give one of the two.")
    name, value = ("top_p", top_p) if share is None else ("share", share)
    if value is None or not 0 < value <= 1:
        raise ConfigError(f"{name}={value} is not a share; expected more than 0 and at most 1.")
    if share is not None:
        return ExpertChoice(_select_over_layers(scores.layers, share))
    return ExpertChoice({index: _select(index, values, value) for index, values in scores.layers.items()})


def _select_over_layers(layers: Mapping[int, Sequence[float]], share: float) -> dict[int, list[int]]:
    ranked = sorted((-score, expert, index) for index, scores in layers.items() for expert, score in enumerate(scores))
    chosen: dict[int, list[int]] = {index: [] for index in layers}
    for _, expert, index in ranked[: max(1, round(share * len(ranked)))]:
        chosen[index].append(expert)
    return chosen


def _select(index: int, scores: Sequence[float], top_p: float) -> list[int]:
    chosen: list[int] = []
    reached = 0.0
    for expert in sorted(range(len(scores)), key=lambda expert: -scores[expert]):
        if reached >= top_p:
            return chosen
        chosen.append(expert)
        reached += scores[expert]
    if top_p < 1 and reached < top_p - 0.01:  # less is what rounding takes
        raise ConfigError(
            f"The scores of layer {index} add up to {reached:.2f}, so top_p={top_p} would choose every expert; "
            "take a lower top_p, or normalise the scores."
        )
    return chosen


def _score_layer(layer: LayerProfile, score: Score, added_up: Mapping[int, float]) -> list[float]:
    ratios = [added_up[count] for count in layer.tokens]
    num_tokens = _add_in_order(ratios)
    return [value / num_tokens for value in (ratios if score == "token" else layer.gate_mass)]


def _add_up_shares(counts: set[int], top_k: int) -> dict[int, float]:
    """n times 1/K for each n, added up one by one in float64: a rounded score hangs on the last bit at times."""
    sums: Iterator[float] = accumulate(repeat(1.0 / top_k, max(counts)), initial=0.0)
    return {count: total for count, total in enumerate(sums) if count in counts}


def _add_in_order(values: Sequence[float]) -> float:
    """Added from left to right; Python's `sum` corrects itself since 3.12 and did not where ESFT ran."""
    *_, total = accumulate(values, initial=0.0)
    return total


def _normalise(index: int, scores: Sequence[float]) -> list[float]:
    total = _add_in_order(scores)
    if not total > 0:
        raise ConfigError(f"The scores of layer {index} add up to {total}, so they cannot be normalised.")
    return [score / total for score in scores]


def _parse_layer(path: str | Path, layer: str, experts: Any) -> tuple[int, list[int]]:
    is_list = isinstance(experts, list) and all(type(expert) is int and expert >= 0 for expert in experts)
    if not _LAYER.fullmatch(layer) or not is_list or len(set(experts)) < len(experts):
        raise ConfigError(f"{path}: layer {layer!r} is not the number of a layer with a list of distinct expert ids.")
    return int(layer), experts
