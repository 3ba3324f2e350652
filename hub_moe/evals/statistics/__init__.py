"""What scores of documents say about a model, and about the difference between two models. numpy only."""

from .comparison import Comparison, TaskComparison, compare_tasks
from .estimates import (
    Estimate,
    estimate_accuracy,
    estimate_bits_per_byte,
    estimate_mean,
    estimate_perplexity,
    estimate_ratio,
    minimum_detectable_effect,
    plan_detectable_difference,
)
from .pairing import DocumentScores, Pairs, pair_scores
from .significance import PermutationTest, adjust_by_holm, exact_mcnemar, permutation_test

__all__ = [
    "Comparison",
    "DocumentScores",
    "Estimate",
    "Pairs",
    "PermutationTest",
    "TaskComparison",
    "adjust_by_holm",
    "compare_tasks",
    "estimate_accuracy",
    "estimate_bits_per_byte",
    "estimate_mean",
    "estimate_perplexity",
    "estimate_ratio",
    "exact_mcnemar",
    "minimum_detectable_effect",
    "pair_scores",
    "permutation_test",
    "plan_detectable_difference",
]
