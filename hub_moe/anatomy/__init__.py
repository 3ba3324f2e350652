"""Where the experts of a transformers MoE are and what the model costs: the one place that knows families."""

from .footprint import Footprint, measure_footprint
from .moe_layers import MoeLayer, find_moe_layers
from .parameters import KINDS, Kind, SortedParameter, sort_parameters
from .profile import DomainProfile, ExpertProfile, LayerProfile
from .routing import LayerRouting, Routing, record_routing

__all__ = [
    "KINDS",
    "DomainProfile",
    "ExpertProfile",
    "Footprint",
    "Kind",
    "LayerProfile",
    "LayerRouting",
    "MoeLayer",
    "Routing",
    "SortedParameter",
    "find_moe_layers",
    "measure_footprint",
    "record_routing",
    "sort_parameters",
]
