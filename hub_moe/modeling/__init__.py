"""The model classes. Importing this registers them, and expert patches, with transformers' Auto classes.

It also registers `experts_implementation="hub_moe"`, which these classes use unless another is asked for.
"""

from ..experts import IMPLEMENTATION as EXPERTS_IMPLEMENTATION
from ..patches.registration import ExpertPatchConfig, ExpertPatchForCausalLM
from .configuration_deepseek import DeepseekConfig
from .configuration_hub_moe import HubMoeConfig
from .modeling_deepseek import (
    DeepseekForCausalLM,
    DeepseekForSequenceClassification,
    DeepseekForTokenClassification,
    DeepseekModel,
)
from .modeling_hub_moe import (
    HubMoeForCausalLM,
    HubMoeForSequenceClassification,
    HubMoeForTokenClassification,
    HubMoeModel,
)

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "EXPERTS_IMPLEMENTATION",
    "ExpertPatchConfig",
    "ExpertPatchForCausalLM",
    "HubMoeConfig",
    "HubMoeForCausalLM",
    "HubMoeForSequenceClassification",
    "HubMoeForTokenClassification",
    "HubMoeModel",
]
