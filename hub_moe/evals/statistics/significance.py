"""Tests of "the two models are equally good" on paired scores, and their correction for several tasks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EvaluationError
from .estimates import Groups, Numbers, check_numbers, sum_by_group

_MOST_EXACT = 16  # nonzero differences whose 2**16 signs are all tried
_SIGNS_AT_ONCE = 2**21
_ROUNDING = 1e-12  # relative to the sum of all magnitudes: sums that differ by less are equal


def exact_mcnemar(num_only_base: int, num_only_candidate: int) -> float:
    """The two-sided p-value of McNemar's test, from the documents that exactly one of the models got right.

    If the models are equally good, each such document is the candidate's with probability 1/2, so
    p = min(1, 2 * P(X <= min(b, c))) with X binomial(b + c, 1/2) (McNemar 1947, Psychometrika 12, 153-157, with the
    binomial distribution in place of chi-squared). Documents that both got right or both wrong do not matter.
    """
    if num_only_base < 0 or num_only_candidate < 0:
        raise EvaluationError(f"Counts of documents cannot be negative: {num_only_base} and {num_only_candidate}.")
    discordant = num_only_base + num_only_candidate
    ways = term = 1
    for k in range(1, min(num_only_base, num_only_candidate) + 1):
        term = term * (discordant - k + 1) // k
        ways += term
    return min(1.0, 2 * ways / (1 << discordant))  # whole numbers up to here, so nothing under- or overflows


@dataclass(frozen=True)
class PermutationTest:
    """A two-sided p-value, and of how many signings of the differences: all of them where `is_exact`."""

    p_value: float
    is_exact: bool
    num_signings: int
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def permutation_test(
    differences: Numbers, *, groups: Groups | None = None, num_resamples: int = 9_999, seed: int = 0
) -> PermutationTest:
    """How often |sum of differences| is at least the observed one when each keeps or flips its sign at random.

    If the models are equally good, their two scores on a document could as well be swapped (Fisher 1935, The Design of
    Experiments, section 21). With groups, a group's differences flip together, as its documents are not independent.
    Up to 16 groups (or documents) that differ, all signings are counted; beyond that p = (1 + hits) / (1 + resamples)
    over random ones (Phipson and Smyth 2010, arXiv:1603.05766), the same for the same seed and the same differences in
    any order and with any signs.
    """
    sums = sum_by_group(check_numbers(differences, "difference"), groups)
    magnitudes = np.sort(np.abs(sums[sums != 0]))
    at_least = abs(math.fsum(sums)) - _ROUNDING * float(magnitudes.sum())
    if len(magnitudes) <= _MOST_EXACT:
        signed = _sum_all_signings(magnitudes)
        return PermutationTest(float(np.mean(np.abs(signed) >= at_least)), is_exact=True, num_signings=len(signed))
    chunks = _sum_random_signings(magnitudes, num_resamples, seed)
    hits = sum(int(np.count_nonzero(np.abs(signed) >= at_least)) for signed in chunks)
    return PermutationTest((1 + hits) / (1 + num_resamples), False, num_resamples, seed)


def adjust_by_holm(p_values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """p-values of m tests, made larger so that all those below alpha are right with probability 1 - alpha at least.

    In ascending order the k-th, from k = 0, is multiplied by m - k; none is below one before it, none above 1
    (Holm 1979, Scandinavian Journal of Statistics 6, 65-70). The tests may depend on each other.
    """
    p_M = check_numbers(p_values, "p-value")
    if ((p_M < 0) | (p_M > 1)).any():
        raise EvaluationError(f"p-values lie between 0 and 1, not {p_M.min():g} to {p_M.max():g}.")
    order_M = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.maximum.accumulate(p_M[order_M] * np.arange(len(p_M), 0, -1))
    return np.minimum(adjusted_M, 1.0)


def _sum_all_signings(magnitudes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    sums = np.zeros(1)
    for magnitude in magnitudes:
        sums = np.concatenate([sums + magnitude, sums - magnitude])
    return sums


def _sum_random_signings(
    magnitudes: npt.NDArray[np.float64], num_resamples: int, seed: int
) -> Iterator[npt.NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    total = float(magnitudes.sum())
    rows = max(1, _SIGNS_AT_ONCE // len(magnitudes))
    for start in range(0, num_resamples, rows):
        shape = (min(rows, num_resamples - start), -(-len(magnitudes) // 8))
        random = np.unpackbits(generator.integers(0, 256, shape, dtype=np.uint8), axis=1, count=len(magnitudes))
        yield 2 * (random.astype(np.float64) @ magnitudes) - total
