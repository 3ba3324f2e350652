"""Where the experts of a transformers MoE are and what the model costs: the one place that knows families."""

from .changes import ChangeTable, Fingerprint, compare_fingerprints, fingerprint
from .expert_tensors import expert_tensors, hash_tensor, named_tensors
from .footprint import Footprint, measure_footprint
from .moe_layers import MoeLayer, find_moe_layers
from .parameters import KINDS, Kind, SortedParameter, sort_parameters
from .profile import DomainProfile, ExpertProfile, LayerProfile
from .routing import LayerRouting, Routing, record_routing

__all__ = [
    "KINDS",
    "DomainProfile",
    "ExpertProfile",
    "ChangeTable",
    "Fingerprint",
    "Footprint",
    "Kind",
    "LayerProfile",
    "LayerRouting",
    "MoeLayer",
    "Routing",
    "SortedParameter",
    "compare_fingerprints",
    "expert_tensors",
    "find_moe_layers",
    "fingerprint",
    "hash_tensor",
    "measure_footprint",
    "named_tensors",
    "record_routing",
    "sort_parameters",
]
