"""A mean, ratio, accuracy or perplexity over documents, with its standard error and interval.

The documents are taken as a sample from all that could have been asked (Miller 2024, "Adding Error Bars to Evals",
arXiv:2411.00640). Documents that belong together, such as the questions about one passage, are a cluster: then clusters
are the sample, however many documents they hold.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError, EvaluationError

Numbers = Sequence[float] | npt.NDArray[Any]
Groups = Sequence[Hashable] | npt.NDArray[Any]

_LARGE_DF = 1000  # from here on the expansion of t in 1 / df is good to 1e-9


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and its interval; `num_clusters` equals `num_documents` where none belong together.

    A standard error of 0 means that all documents agree, not that the number is exact.
    """

    value: float
    standard_error: float
    low: float
    high: float
    num_documents: int
    num_clusters: int
    confidence: float = 0.95

    @property
    def df(self) -> int:
        """Degrees of freedom of the standard error."""
        return self.num_clusters - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def estimate_mean(scores: Numbers, *, groups: Groups | None = None, confidence: float = 0.95) -> Estimate:
    """The mean of one score per document: `estimate_ratio` with every size 1.

    Without groups the standard error is the sample standard deviation divided by sqrt(n).
    """
    score_N = check_numbers(scores, "score")
    return estimate_ratio(score_N, np.ones(len(score_N)), groups=groups, confidence=confidence)


def estimate_ratio(
    totals: Numbers, sizes: Numbers, *, groups: Groups | None = None, confidence: float = 0.95
) -> Estimate:
    """R = sum of totals / sum of sizes over documents, such as bits per byte, with a standard error by linearisation.

    With e = total - R * size summed within each of G clusters, SE^2 = G / (G - 1) * sum of e^2 / (sum of sizes)^2.
    With clusters of one document this is the ratio estimator's variance (Cochran 1977, Sampling Techniques, section
    2.11); with sizes of 1 the clustered variance of Miller 2024 times G / (G - 1), the usual correction for few
    clusters (Cameron and Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section II.B). The
    interval is R -+ t * SE, with t of Student's distribution with G - 1 degrees of freedom.

    Raises:
        EvaluationError: If there are fewer than two documents or clusters, lengths differ, a number is not finite, or
            a size is not positive.
    """
    total_N, size_N = check_numbers(totals, "total"), check_numbers(sizes, "size")
    _check_lengths(totals=total_N, sizes=size_N)
    if (size_N <= 0).any():
        raise EvaluationError(f"Document number {int(np.argmax(size_N <= 0))} has no positive size; leave it out.")
    ratio = float(total_N.sum() / size_N.sum())
    error_G = sum_by_group(total_N - ratio * size_N, groups)
    clusters = len(error_G)
    if clusters < 2:
        raise EvaluationError(f"{clusters} cluster of {len(total_N)} documents; a standard error needs at least two.")
    standard_error = math.sqrt(clusters / (clusters - 1) * float(error_G @ error_G)) / float(size_N.sum())
    margin = student_t_quantile((1 + confidence) / 2, clusters - 1) * standard_error
    return Estimate(ratio, standard_error, ratio - margin, ratio + margin, len(total_N), clusters, confidence)


def estimate_accuracy(correct: Numbers, *, groups: Groups | None = None, confidence: float = 0.95) -> Estimate:
    """The share of right answers (0 or 1 each), with an interval that keeps a width where all are right or all wrong.

    The standard error is that of `estimate_mean`. The interval is Wilson's (1927): the shares p for which the observed
    one is within z standard errors sqrt(p (1 - p) / n). With clusters, n is the effective number of documents: n
    divided by the design effect (clustered over plain variance, at least 1) and by the squared ratio of t quantiles
    with G - 1 and n - 1 degrees of freedom, after Korn and Graubard (1998, Survey Methodology 24, 193-201). Where all
    documents agree there is no design effect to see, and every cluster counts as one document.

    Raises:
        EvaluationError: As `estimate_ratio`, and if a number is neither 0 nor 1.
    """
    correct_N = check_numbers(correct, "answer")
    if not is_binary(correct_N):
        raise EvaluationError("An accuracy needs answers of 0 or 1; estimate other scores by their mean.")
    mean = estimate_mean(correct_N, groups=groups, confidence=confidence)
    n, share = _effective_number(mean, correct_N), mean.value
    z_squared = student_t_quantile((1 + confidence) / 2, math.inf) ** 2
    centre = (share + z_squared / (2 * n)) / (1 + z_squared / n)
    margin = math.sqrt(z_squared * (share * (1 - share) / n + z_squared / (4 * n**2))) / (1 + z_squared / n)
    low, high = max(0.0, centre - margin), min(1.0, centre + margin)
    return Estimate(share, mean.standard_error, low, high, mean.num_documents, mean.num_clusters, confidence)


def estimate_bits_per_byte(
    log_likelihoods: Numbers, sizes_bytes: Numbers, *, groups: Groups | None = None, confidence: float = 0.95
) -> Estimate:
    """-sum of log-likelihoods / (ln 2 * sum of UTF-8 bytes), from one log-likelihood in nats per document.

    The sums run over all documents, so a long document weighs more; the standard error is `estimate_ratio`'s.
    """
    bits = -check_numbers(log_likelihoods, "log-likelihood") / math.log(2)
    return estimate_ratio(bits, sizes_bytes, groups=groups, confidence=confidence)


def estimate_perplexity(
    log_likelihoods: Numbers, num_tokens: Numbers, *, groups: Groups | None = None, confidence: float = 0.95
) -> Estimate:
    """exp(-sum of log-likelihoods / sum of tokens), from one log-likelihood in nats per document.

    Words or bytes in place of tokens give the perplexity per word or byte. The standard error is the perplexity times
    that of its logarithm (delta method); the interval is the exponential of the logarithm's, so it is not symmetric
    and never below 0.
    """
    nats = -check_numbers(log_likelihoods, "log-likelihood")
    log = estimate_ratio(nats, num_tokens, groups=groups, confidence=confidence)
    try:
        value, low, high = math.exp(log.value), math.exp(log.low), math.exp(log.high)
    except OverflowError:
        raise EvaluationError(
            f"{log.value:.4g} nats per token, at most {log.high:.4g}, is beyond any perplexity; check the token counts."
        ) from None
    return Estimate(value, value * log.standard_error, low, high, log.num_documents, log.num_clusters, confidence)


def check_numbers(numbers: Numbers, what: str) -> npt.NDArray[np.float64]:
    """The numbers as a flat float64 array, all finite."""
    array = np.asarray(numbers, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise EvaluationError(f"{what.capitalize()}s of shape {array.shape}; give a flat list of at least one number.")
    bad = ~np.isfinite(array)
    if bad.any():
        first = int(np.argmax(bad))
        raise EvaluationError(
            f"{what.capitalize()} number {first} is {array[first]}, and {int(bad.sum())} of {array.size} are not "
            "finite; a failure is no score, so count it apart."
        )
    return array


def is_binary(numbers: npt.NDArray[np.float64]) -> bool:
    """Whether every number is 0 or 1."""
    return bool(np.isin(numbers, (0.0, 1.0)).all())


def sum_by_group(numbers: npt.NDArray[np.float64], groups: Groups | None) -> npt.NDArray[np.float64]:
    """One sum for each group; the numbers themselves where there are no groups."""
    if groups is None:
        return numbers
    _check_lengths(scores=numbers, groups=groups)
    indices: dict[Hashable, int] = {}
    index_N = [indices.setdefault(group, len(indices)) for group in groups]
    sum_G = np.zeros(len(indices))
    np.add.at(sum_G, index_N, numbers)
    return sum_G


def _effective_number(mean: Estimate, correct_N: npt.NDArray[np.float64]) -> float:
    n, quantile = len(correct_N), (1 + mean.confidence) / 2
    if mean.num_clusters == n:
        return n
    plain = mean.value * (1 - mean.value) / (n - 1)
    effective = n / max(1.0, mean.standard_error**2 / plain) if plain > 0 else mean.num_clusters
    return effective * (student_t_quantile(quantile, n - 1) / student_t_quantile(quantile, mean.df)) ** 2


def _check_lengths(**columns: Any) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        given = " and ".join(f"{length} {name}" for name, length in lengths.items())
        raise EvaluationError(f"{given} were given; there must be one of each for every document.")


@lru_cache(maxsize=256)  # every estimate of a suite asks for the same few
def student_t_quantile(probability: float, df: float) -> float:
    """The t that a Student variable with `df` degrees of freedom stays below with this probability.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), section 26.7; so no scipy is needed.
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
