"""Metrics and comparisons for `evaluate.combine`, made directly, as `evaluate.load` would ask the Hub for them.

    evaluate.combine([BitsPerByte(), Perplexity("word")]).compute(predictions=log_likelihoods, references=texts)
    evaluate.combine([PairedAccuracyDifference(), ExactMcnemar()]).compute(
        predictions1=of_the_base, predictions2=of_the_candidate, references=labels
    )

The formulas and their sources stand in `hub_moe.evals.statistics`. Every value is a plain number.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, EvaluationError
from .statistics import Estimate, estimate_bits_per_byte, estimate_mean, estimate_perplexity, exact_mcnemar

_ERROR_BARS = """Adding Error Bars to Evals: A Statistical Approach to Language Model Evaluations.
Evan Miller, 2024. arXiv:2411.00640"""
_TEXT_SCORES = """
Args:
    predictions: The log-likelihood of each document in nats, summed over its tokens.
    references: """
_LABELS = """
Args:
    predictions1: The base's answer to each document.
    predictions2: The candidate's.
    references: The right answers; an answer is right if it equals the reference."""


class BitsPerByte(evaluate.Metric):
    """Bits per UTF-8 byte with standard error and 95 % interval; references are the texts, or their sizes in bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Bits that a model needs for each UTF-8 byte of the texts; lower is better.",
            citation=_ERROR_BARS,
            inputs_description=f"{_TEXT_SCORES}The texts, or their sizes in bytes.",
            features=_offer({"predictions": "float64", "references": "string"}, {"references": "int64"}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[str] | Sequence[int]) -> dict[str, float]:
        _check_present(references, "reference")
        sizes = [len(each.encode()) if isinstance(each, str) else each for each in references]
        return _name("bits_per_byte", estimate_bits_per_byte(predictions, sizes))


class Perplexity(evaluate.Metric):
    """Perplexity with standard error and 95 % interval.

    `Perplexity()` is per token, and references are the numbers of tokens; `Perplexity("word")` and `Perplexity("byte")`
    take the texts and count words between white space, or UTF-8 bytes.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _COUNTS:
            raise ConfigError(
                f"Perplexity per {self.config_name!r} is unknown; choose word or byte, or none for tokens."
            )
        is_per_token = self.config_name == "default"
        return evaluate.MetricInfo(
            description="The exponential of the negative log-likelihood per token, word or byte; lower is better.",
            citation=_ERROR_BARS,
            inputs_description=_TEXT_SCORES + ("The number of tokens of each." if is_per_token else "The texts."),
            features=datasets.Features(
                predictions=datasets.Value("float64"), references=datasets.Value("int64" if is_per_token else "string")
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[Any]) -> dict[str, float]:
        _check_present(references, "reference")
        unit = "token" if self.config_name == "default" else self.config_name
        counts = [_COUNTS[self.config_name](each) for each in references]
        return _name(f"{unit}_perplexity", estimate_perplexity(predictions, counts))


class PairedAccuracyDifference(evaluate.Comparison):
    """Accuracy of the second model minus that of the first on the same documents, with a paired 95 % interval."""

    def _info(self) -> evaluate.ComparisonInfo:
        return _describe_comparison(
            "The difference of two accuracies on the same documents, with the standard error of the paired difference.",
            "\n    groups: What documents belong together, such as a passage, for a clustered standard error.",
        )

    def _compute(
        self,
        predictions1: Sequence[Any],
        predictions2: Sequence[Any],
        references: Sequence[Any],
        groups: Sequence[Hashable] | None = None,
    ) -> dict[str, float]:
        difference_N = _mark(predictions2, references).astype(float) - _mark(predictions1, references)
        return _name("accuracy_difference", estimate_mean(difference_N, groups=groups))


class ExactMcnemar(evaluate.Comparison):
    """The exact, two-sided McNemar test that two models are right equally often; documents must not belong together."""

    def _info(self) -> evaluate.ComparisonInfo:
        return _describe_comparison(
            "McNemar's test with the binomial distribution, on the documents that one of two models got right."
        )

    def _compute(
        self, predictions1: Sequence[Any], predictions2: Sequence[Any], references: Sequence[Any]
    ) -> dict[str, float]:
        right1_N, right2_N = _mark(predictions1, references), _mark(predictions2, references)
        only_first, only_second = int((right1_N & ~right2_N).sum()), int((right2_N & ~right1_N).sum())
        p_value = exact_mcnemar(only_first, only_second)
        return {"mcnemar_p_value": p_value, "only_first_right": only_first, "only_second_right": only_second}


_COUNTS: dict[str, Callable[[Any], int]] = {
    "default": int,
    "word": lambda text: len(text.split()),
    "byte": lambda text: len(text.encode()),
}


def _name(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        name: estimate.value,
        f"{name}_stderr": estimate.standard_error,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
    }


def _mark(predictions: Sequence[Any], references: Sequence[Any]) -> npt.NDArray[np.bool_]:
    """Which predictions are right. Labels come as texts or as numbers."""
    _check_present([*predictions, *references], "label")
    return np.array([one == other for one, other in zip(predictions, references, strict=True)], dtype=bool)


def _check_present(values: Sequence[Any], what: str) -> None:
    missing = sum(value is None or value != value for value in values)
    if missing:
        raise EvaluationError(f"{missing} {what}s are None or NaN; count such documents apart and leave them out.")


def _describe_comparison(description: str, more_arguments: str = "") -> evaluate.ComparisonInfo:
    names = ("predictions1", "predictions2", "references")
    return evaluate.ComparisonInfo(
        description=description,
        citation=_ERROR_BARS,
        inputs_description=_LABELS + more_arguments,
        features=_offer(dict.fromkeys(names, "string"), dict.fromkeys(names, "float64")),
    )


def _offer(first: dict[str, str], instead: dict[str, str]) -> list[datasets.Features]:
    """Two formats, tried in this order: evaluate refuses a number for a text, but would cast a text to a number."""
    return [
        datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
        for kinds in (first, {**first, **instead})
    ]
