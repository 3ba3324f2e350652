"""How good a model is, next to what it has to beat.

Importing this imports neither torch nor evaluate; `hub_moe.evals.metrics` holds what `evaluate.combine` takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY_NAMES = {
    "CodeLength": "bits_per_byte",
    "Comparison": "statistics",
    "DocumentScores": "statistics",
    "Estimate": "statistics",
    "Pairs": "statistics",
    "TaskComparison": "statistics",
    "build_suite": "tasks",
    "check_suite": "preflight",
    "compare_tasks": "statistics",
    "list_suites": "suites",
    "load_suite": "suites",
    "pair_scores": "statistics",
    "plan_detectable_difference": "statistics",
    "score_with_compressor": "bits_per_byte",
    "score_with_model": "bits_per_byte",
    "score_with_unigrams": "bits_per_byte",
}

if TYPE_CHECKING:
    from .bits_per_byte import CodeLength, score_with_compressor, score_with_model, score_with_unigrams
    from .preflight import check_suite
    from .statistics import (
        Comparison,
        DocumentScores,
        Estimate,
        Pairs,
        TaskComparison,
        compare_tasks,
        pair_scores,
        plan_detectable_difference,
    )
    from .suites import list_suites, load_suite
    from .tasks import build_suite

__all__ = [
    "CodeLength",
    "Comparison",
    "DocumentScores",
    "Estimate",
    "Pairs",
    "TaskComparison",
    "build_suite",
    "check_suite",
    "compare_tasks",
    "list_suites",
    "load_suite",
    "pair_scores",
    "plan_detectable_difference",
    "score_with_compressor",
    "score_with_model",
    "score_with_unigrams",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    raise AttributeError(f"module 'hub_moe.evals' has no attribute {name!r}")
