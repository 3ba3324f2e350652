"""What a patch costs on tasks that it does not claim, and how much of that somebody puts up with."""

import math
from typing import Any

from ..errors import ConfigError
from ..evals.compare import RecordComparison
from .safety import shown


def check_tolerance(tolerance: float) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: If it is not from 0 to below 1.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is a share from 0 to below 1, such as 0.02 for 2 %, not {tolerance}.")


def share_lost(base: float, value: float, *, lower_is_better: bool) -> float:
    """By what share of its size the base's value got worse; negative where it got better."""
    worse_by = value - base if lower_is_better else base - value
    if worse_by == 0:
        return 0.0
    return worse_by / abs(base) if base else math.copysign(math.inf, worse_by)


def describe_costs(comparison: RecordComparison, *, tolerance: float) -> tuple[list[str], list[str]]:
    """The tasks on which the candidate is worse than the base, in words: beyond the tolerance, and within it."""
    beyond, within = [], []
    for task in comparison.comparison.tasks:
        if task.verdict != "worse":
            continue
        figures = (
            f"{comparison.metrics[task.task]} {task.base.value:.3f} -> {task.candidate.value:.3f} "
            f"(p = {task.adjusted_p_value:.2g}, suite {shown(comparison.suite)})"
        )
        share = share_of(task)
        if share <= tolerance:
            within.append(f"it costs {share:.1%} on {task.task}, within the tolerance of {tolerance:.0%}: {figures}")
        else:
            beyond.append(f"it is worse than the base on {task.task}: {figures}")
    return beyond, within


def share_of(task: Any) -> float:
    """`share_lost` of a compared task."""
    return share_lost(task.base.value, task.candidate.value, lower_is_better=task.lower_is_better)
