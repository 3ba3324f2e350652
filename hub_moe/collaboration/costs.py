"""What a patch costs on tasks that it does not claim, and how much of that somebody puts up with."""

import math

from ..errors import ConfigError
from ..evals.compare import RecordComparison
from ..evals.statistics.comparison import TaskComparison
from .safety import shown


def check_tolerance(tolerance: float) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: If it is not from 0 to below 1.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"--tolerance is a share from 0 to below 1, such as 0.02 for 2 %, not {tolerance}.")


def share_lost(metric: str, base: float, value: float, *, lower_is_better: bool) -> float:
    """By what share of its size the base's value got worse; negative where it got better.

    Perplexities come as their logarithms, by which they are compared, and the share is of the perplexity itself.
    """
    worse_by = value - base if lower_is_better else base - value
    if "perplexity" in metric:
        return math.expm1(min(worse_by, 700.0))
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
        share = share_of(task, comparison)
        if share <= tolerance:
            within.append(f"it {describe_cost(task.task, share, tolerance=tolerance)}: {figures}")
        else:
            beyond.append(f"it is worse than the base on {task.task}: {figures}")
    return beyond, within


def describe_cost(task: str, share: float, *, tolerance: float) -> str:
    """What is put up with, as `costs 1.3 % on running_text, within the tolerance of 2 %`."""
    return f"costs {percent(share)} on {task}, within the tolerance of {percent(tolerance)}"


def share_of(task: TaskComparison, comparison: RecordComparison) -> float:
    """`share_lost` of a compared task."""
    metric = comparison.metrics[task.task]
    return share_lost(metric, task.base.value, task.candidate.value, lower_is_better=task.lower_is_better)


def percent(share: float) -> str:
    """A share in words: `2 %`, `1.3 %`, `0.05 %`."""
    number = f"{100 * share:.1f}" if abs(share) >= 0.001 else f"{100 * share:.1g}"
    return f"{number.removesuffix('.0')} %"
