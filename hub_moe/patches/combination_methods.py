"""How several changes of one tensor become one: mean, TIES, DARE, slerp. Plain tensor maths in float32.

A change (a paper's "task vector") is a patch's tensor minus that of the base. Weights are always normalised, so that
several equal changes give that change and not a multiple of it: what only one patch changes is taken at full size, and
a tensor that several change should not move further than any of them.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError

MethodName = Literal["refuse", "mean", "ties", "dare", "dare_ties", "slerp"]

METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
_DEFAULT_DENSITY: Mapping[str, float] = {"ties": 0.2, "dare": 0.5, "dare_ties": 0.5}
_NEARLY_PARALLEL = 0.9995  # the cosine above which mergekit's slerp interpolates linearly


@dataclass(frozen=True)
class CombinationMethod:
    """What is done where several patches change one tensor.

    Attributes:
        name: "refuse"; "mean", the weighted mean; "ties", each change trimmed to its largest numbers, a sign elected
            for each number, the mean of those that agree with it (arXiv:2306.01708, section 3); "dare", numbers dropped
            at random and the others scaled up, then the mean (arXiv:2311.03099, section 3.2), or "dare_ties", then the
            election of TIES; "slerp", interpolation on a sphere between the changes of two patches.
        weights: One positive number per patch, in the order of the patches; all equal by default.
        density: The share of numbers that TIES keeps (0.2 by default, as the paper), or DARE on average (1 - its drop
            rate p; 0.5 by default, which is careful: the paper drops 90 % of large models).
        seed: Of DARE's dropping; 0 by default. The same seed drops the same numbers with the same torch.

    Raises:
        ConfigError: If the name is unknown, or a value is out of range or nothing that the method uses.
    """

    name: MethodName = "refuse"
    weights: tuple[float, ...] | None = None
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in METHOD_NAMES:
            raise ConfigError(f"There is no method {self.name!r}; expected one of {', '.join(METHOD_NAMES)}.")
        unused = {
            "weights": self.weights is not None and self.name == "refuse",
            "density": self.density is not None and self.name not in _DEFAULT_DENSITY,
            "seed": self.seed is not None and not self.name.startswith("dare"),
        }
        for parameter in (name for name, is_unused in unused.items() if is_unused):
            raise ConfigError(f"The method {self.name} has no {parameter}; leave it out or choose another method.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"The density must be above 0 and at most 1, not {self.density}.")
        for weight in self.weights or ():
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"The weight of a patch must be a positive number, not {weight}.")

    @property
    def parameters(self) -> dict[str, Any]:
        """What the method works with, besides the weights."""
        density = _DEFAULT_DENSITY.get(self.name) if self.density is None else self.density
        seed = (self.seed or 0) if self.name.startswith("dare") else None
        return {name: value for name, value in (("density", density), ("seed", seed)) if value is not None}

    def weights_for(self, count: int) -> tuple[float, ...]:
        """One weight for each of `count` patches.

        Raises:
            ConfigError: If as many were not given, or the method does not take so many patches.
        """
        if self.name == "slerp" and count != 2:
            raise ConfigError(
                f"slerp is between two patches, and {count} were given; combine them with another method."
            )
        if self.weights is None:
            return (1.0,) * count
        if len(self.weights) != count:
            raise ConfigError(f"{len(self.weights)} weights were given for {count} patches; give one for each.")
        return self.weights


def combine_changes(
    changes: Sequence[Tensor], weights: Sequence[float], *, method: CombinationMethod, labels: Sequence[str]
) -> Tensor:
    """One change from several float32 changes of the same shape; `labels` tell DARE's random numbers apart."""
    density = method.parameters.get("density", 1.0)
    match method.name:
        case "mean":
            return mean_change(changes, weights)
        case "ties":
            return elected_mean([trim(change, density) for change in changes], weights)
        case "dare" | "dare_ties":
            seed = method.parameters["seed"]
            pairs = zip(changes, labels, strict=True)
            dropped = [drop_and_rescale(change, density, seed=f"{seed} {label}") for change, label in pairs]
            return mean_change(dropped, weights) if method.name == "dare" else elected_mean(dropped, weights)
        case "slerp":
            first, second = changes
            return slerp(first, second, share=weights[1] / (weights[0] + weights[1]))
    raise ValueError(f"the method {method.name} combines nothing")


def mean_change(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean: the merge of task arithmetic (arXiv:2212.04089) with weights that sum to one."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total.add_(change, alpha=weight)
    return total.div_(math.fsum(weights))


def trim(change: Tensor, density: float) -> Tensor:
    """The change with all but its largest numbers set to zero: `density` of them, at least one.

    Numbers as large as the smallest that is kept are kept too, as in the paper's own code, so that nothing depends on
    where a number stands.
    """
    kept = max(1, math.floor(density * change.numel()))
    if kept == change.numel():
        return change
    sizes = change.abs().flatten()
    threshold = sizes.kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= threshold, change, 0.0)


def elected_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean, number by number, of the changes whose sign is that of the weighted sum (TIES, Algorithm 1).

    Zeros do not count. Where the sum is zero there is no sign and nothing changes (mergekit takes the positive ones).
    """
    sign = mean_change(changes, weights).sign_()
    total, weight_sum = torch.zeros_like(sign), torch.zeros_like(sign)
    for change, weight in zip(changes, weights, strict=True):
        agrees = change.sign() == sign
        total.add_(torch.where(agrees, change, 0.0), alpha=weight)
        weight_sum.add_(agrees, alpha=weight)
    return torch.where(weight_sum > 0, total / weight_sum, 0.0)


def drop_and_rescale(change: Tensor, density: float, *, seed: str) -> Tensor:
    """Each number kept with the probability `density` and divided by it, or set to zero."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    is_kept = torch.rand(change.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(is_kept, change / density, 0.0)


def slerp(first: Tensor, second: Tensor, *, share: float) -> Tensor:
    """From `first` to `second` along the arc between them; linear where they are nearly parallel, or one is zero.

    The whole tensor is one vector. The formula and its threshold are those of mergekit's `slerp`, between changes as in
    its `nuslerp` with a base: the weights of two fine-tunes of one base are nearly parallel themselves, and would be
    interpolated linearly always. https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md
    """
    norms = float(first.norm()) * float(second.norm())
    cosine = float((first * second).sum(dtype=torch.float64)) / norms if norms else 1.0
    if abs(cosine) > _NEARLY_PARALLEL:
        return first * (1 - share) + second * share
    angle = math.acos(cosine)
    return (first * math.sin((1 - share) * angle) + second * math.sin(share * angle)) / math.sin(angle)
