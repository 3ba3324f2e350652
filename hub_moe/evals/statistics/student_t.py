"""Quantiles of Student's t distribution, so that a comparison needs no scipy.

Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), section 26.7.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_LARGE_DF = 1000  # from here on the expansion is good to 1e-9


@lru_cache(maxsize=256)  # every estimate of a suite asks for the same few
def student_t_quantile(probability: float, df: float) -> float:
    """The t that a Student variable with `df` degrees of freedom stays below with this probability.

    `df` is a whole number from 1 on, or infinity for the normal distribution.
    """
    if probability < 0.5:
        return -student_t_quantile(1 - probability, df)
    if df >= _LARGE_DF:
        return _expand_around_normal(NormalDist().inv_cdf(probability), df)
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(df)), in which the search is bounded
    for _ in range(60):
        middle = (low + high) / 2
        if _probability_within(middle, int(df)) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan((low + high) / 2)


def _probability_within(angle: float, df: int) -> float:
    """P(|T| <= t) where angle = atan(t / sqrt(df)): 26.7.3 for odd `df`, 26.7.4 for even."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2 == 0:
        odd = np.arange(1, df - 2, 2)
        return sine * (1 + float(np.cumprod(odd / (odd + 1) * cosine**2).sum()))
    even = np.arange(2, df - 2, 2)
    series = 1 + float(np.cumprod(even / (even + 1) * cosine**2).sum()) if df > 1 else 0.0
    return 2 / math.pi * (angle + sine * cosine * series)


def _expand_around_normal(x: float, df: float) -> float:
    """26.7.5, the first three terms in 1 / df."""
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / df + second / df**2 + third / df**3
