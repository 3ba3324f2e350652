"""Implementations of expert layers for transformers' ExpertsInterface; importing this registers them."""

from .cpu_forward import hub_moe_experts_forward
from .liger import liger_experts_forward
from .products import describe_for_record
from .split import Chosen, freeze_all_but, merge_experts, split_experts, trained_tensors
from .stacks import IMPLEMENTATION

__all__ = [
    "IMPLEMENTATION",
    "Chosen",
    "describe_for_record",
    "freeze_all_but",
    "hub_moe_experts_forward",
    "liger_experts_forward",
    "merge_experts",
    "split_experts",
    "trained_tensors",
]
