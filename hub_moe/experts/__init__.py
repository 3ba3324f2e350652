"""Implementations of expert layers for transformers' ExpertsInterface."""

from .split import Chosen, freeze_all_but, merge_experts, split_experts, trained_tensors

__all__ = ["Chosen", "freeze_all_but", "merge_experts", "split_experts", "trained_tensors"]
