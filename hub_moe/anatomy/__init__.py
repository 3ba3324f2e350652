"""Where the experts of a transformers MoE are and what the model costs: the one place that knows families."""

from .changes import ChangeTable, Fingerprint, compare_fingerprints, fingerprint
from .expert_tensors import expert_tensors, hash_tensor, named_tensors
from .footprint import Footprint, measure_footprint
from .moe_layers import MoeLayer, find_moe_layers
from .parameters import KINDS, Kind, SortedParameter, sort_parameters

__all__ = [
    "KINDS",
    "ChangeTable",
    "Fingerprint",
    "Footprint",
    "Kind",
    "MoeLayer",
    "SortedParameter",
    "compare_fingerprints",
    "expert_tensors",
    "find_moe_layers",
    "fingerprint",
    "hash_tensor",
    "measure_footprint",
    "named_tensors",
    "sort_parameters",
]
