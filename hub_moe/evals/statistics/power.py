"""The smallest difference that a comparison can be expected to see."""

import math

from ...errors import ConfigError
from .estimates import student_t_quantile


def minimum_detectable_effect(
    standard_error: float, *, df: float = math.inf, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """The true difference that a two-sided test at `alpha` finds with probability `power`.

    (t_{1-alpha/2} + t_power) * SE with Student's quantiles (Bloom 1995, "Minimum Detectable Effects", Evaluation Review
    19, 547-556); 2.80 * SE for many documents, as in Miller 2024, arXiv:2411.00640. None where the standard error is 0:
    documents that all agree say nothing about it.
    """
    _check_share(alpha=alpha, power=power)
    if standard_error == 0:
        return None
    return (student_t_quantile(1 - alpha / 2, df) + student_t_quantile(power, df)) * standard_error


def plan_detectable_difference(
    num_documents: int, *, accuracy: float = 0.6, correlation: float = 0.8, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The difference in accuracy that a suite can detect, known before it is run.

    Two models of about this accuracy, whose answers correlate so over documents, differ by a standard error of
    sqrt(2 p (1 - p) (1 - correlation) / n). A correlation of 0 stands for models run on different documents; 0.8 is
    assumed for a fine-tune and its base. Documents that belong together count as one.
    """
    _check_share(accuracy=accuracy, alpha=alpha, power=power)
    if num_documents < 2 or not -1 <= correlation < 1:
        raise ConfigError(
            f"num_documents={num_documents} must be at least 2 and correlation={correlation} from -1 to below 1."
        )
    standard_error = math.sqrt(2 * accuracy * (1 - accuracy) * (1 - correlation) / num_documents)
    quantiles = student_t_quantile(1 - alpha / 2, num_documents - 1) + student_t_quantile(power, num_documents - 1)
    return quantiles * standard_error


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise ConfigError(f"{name}={share} must lie between 0 and 1, both excluded.")
