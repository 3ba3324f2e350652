"""Is the candidate better than its base? One verdict per task."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ...errors import ConfigError, EvaluationError
from .estimates import (
    Estimate,
    Numbers,
    estimate_accuracy,
    estimate_mean,
    estimate_ratio,
    is_binary,
    minimum_detectable_effect,
)
from .pairing import Pairs
from .significance import adjust_by_holm, exact_mcnemar, permutation_test

Verdict = Literal["better", "worse", "tied"]
TestName = Literal["exact McNemar", "exact permutation", "permutation"]

RULE = (
    "better or worse: the two-sided p-value, corrected by Holm over all tasks compared, is below alpha, and the sign "
    "of the difference says which; tied: it is not, which does not show that the models are equal"
)


@dataclass(frozen=True)
class TaskComparison:
    """Base and candidate on one task.

    Attributes:
        difference: Candidate minus base, paired by document. Its interval is not corrected for other tasks.
        num_only_base: Documents that only the base got right; None where scores are not right or wrong.
        num_only_candidate: Likewise for the candidate.
        test: "exact McNemar" where scores are 0 or 1 and no documents belong together, else the permutation test.
        adjusted_p_value: By Holm over all tasks compared; the verdict rests on it.
        minimum_detectable_effect: With 80 % power at alpha divided by the number of tasks; None where unknown.
    """

    task: str
    verdict: Verdict
    base: Estimate
    candidate: Estimate
    difference: Estimate
    test: TestName
    p_value: float
    adjusted_p_value: float
    minimum_detectable_effect: float | None
    lower_is_better: bool = False
    num_only_base: int | None = None
    num_only_candidate: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Every task compared, with the rule behind the verdicts and the chance of any wrong "better" or "worse"."""

    tasks: tuple[TaskComparison, ...]
    alpha: float = 0.05
    seed: int = 0
    rule: str = RULE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "tasks": [task.to_dict() for task in self.tasks]}


def compare_tasks(
    pairs: Mapping[str, Pairs], *, lower_is_better: Collection[str] = (), alpha: float = 0.05, seed: int = 0
) -> Comparison:
    """Compare a candidate with its base on each task; see `RULE` for the verdicts.

    Args:
        pairs: Scores of both models by task, from `pair_scores`.
        lower_is_better: The tasks whose scores are costs, such as bits per byte.
        alpha: Chance of calling any of the tasks better or worse where the models are equal. Intervals are of
            confidence 1 - alpha.
        seed: Of the permutation test.

    Raises:
        EvaluationError: If no task is given, or one has fewer than two documents or groups.
        ConfigError: If `alpha` is outside its range or `lower_is_better` names a task that is not there.
    """
    _check_request(pairs, lower_is_better, alpha)
    tests = [_test(each, seed) for each in pairs.values()]
    adjusted = adjust_by_holm([p_value for _, p_value in tests])
    tasks = [
        _TaskRequest(task, each, task in lower_is_better, alpha, len(pairs)).compare(test, p_value, float(adjusted_p))
        for (task, each), (test, p_value), adjusted_p in zip(pairs.items(), tests, adjusted, strict=True)
    ]
    return Comparison(tuple(tasks), alpha, seed)


@dataclass(frozen=True, eq=False)
class _TaskRequest:
    task: str
    pairs: Pairs
    lower_is_better: bool
    alpha: float
    num_tasks: int

    def compare(self, test: TestName, p_value: float, adjusted_p_value: float) -> TaskComparison:
        pairs = self.pairs
        difference = _estimate_mean_or_ratio(pairs.differences, pairs, 1 - self.alpha)
        only_base, only_candidate = _count_discordant(pairs) if _is_right_or_wrong(pairs) else (None, None)
        return TaskComparison(
            task=self.task,
            verdict=self._decide(difference.value, adjusted_p_value),
            base=_estimate_score(pairs.base, pairs, 1 - self.alpha),
            candidate=_estimate_score(pairs.candidate, pairs, 1 - self.alpha),
            difference=difference,
            test=test,
            p_value=p_value,
            adjusted_p_value=adjusted_p_value,
            minimum_detectable_effect=minimum_detectable_effect(
                difference.standard_error, df=difference.df, alpha=self.alpha / self.num_tasks
            ),
            lower_is_better=self.lower_is_better,
            num_only_base=only_base,
            num_only_candidate=only_candidate,
        )

    def _decide(self, difference: float, adjusted_p_value: float) -> Verdict:
        if adjusted_p_value >= self.alpha:
            return "tied"
        return "better" if (difference > 0) != self.lower_is_better else "worse"


def _test(pairs: Pairs, seed: int) -> tuple[TestName, float]:
    stands_alone = pairs.groups is None or len(set(pairs.groups)) == len(pairs.groups)
    if _is_right_or_wrong(pairs) and stands_alone:
        return "exact McNemar", exact_mcnemar(*_count_discordant(pairs))
    result = permutation_test(pairs.differences, groups=pairs.groups, seed=seed)
    return "exact permutation" if result.is_exact else "permutation", result.p_value


def _estimate_score(scores: Numbers, pairs: Pairs, confidence: float) -> Estimate:
    if _is_right_or_wrong(pairs):
        return estimate_accuracy(scores, groups=pairs.groups, confidence=confidence)
    return _estimate_mean_or_ratio(scores, pairs, confidence)


def _estimate_mean_or_ratio(scores: Numbers, pairs: Pairs, confidence: float) -> Estimate:
    if pairs.sizes is None:
        return estimate_mean(scores, groups=pairs.groups, confidence=confidence)
    return estimate_ratio(scores, pairs.sizes, groups=pairs.groups, confidence=confidence)


def _is_right_or_wrong(pairs: Pairs) -> bool:
    return pairs.sizes is None and is_binary(pairs.base) and is_binary(pairs.candidate)


def _count_discordant(pairs: Pairs) -> tuple[int, int]:
    return int(np.count_nonzero(pairs.differences < 0)), int(np.count_nonzero(pairs.differences > 0))


def _check_request(pairs: Mapping[str, Pairs], lower_is_better: Collection[str], alpha: float) -> None:
    if not pairs:
        raise EvaluationError("No task to compare; the two results have none in common.")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha={alpha} must lie between 0 and 1, both excluded.")
    unknown = sorted(set(lower_is_better) - set(pairs))
    if unknown:
        raise ConfigError(f"lower_is_better names {', '.join(unknown)}, but the tasks are {', '.join(pairs)}.")
