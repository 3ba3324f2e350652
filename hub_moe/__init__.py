"""hub_moe: Mixture-of-Experts models, shared and improved on the Hugging Face Hub.

`import hub_moe` is cheap and registers nothing. Touching a model name (`hub_moe.HubMoeConfig`) or importing
`hub_moe.modeling` registers the classes with transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY_NAMES = {
    "DeepseekConfig": "hub_moe.modeling",
    "DeepseekForCausalLM": "hub_moe.modeling",
    "DeepseekModel": "hub_moe.modeling",
    "ExpertPatch": "hub_moe.patches",
    "HubMoeConfig": "hub_moe.modeling",
    "HubMoeForCausalLM": "hub_moe.modeling",
    "HubMoeForSequenceClassification": "hub_moe.modeling",
    "HubMoeForTokenClassification": "hub_moe.modeling",
    "HubMoeModel": "hub_moe.modeling",
    "apply_patch": "hub_moe.patches",
    "load": "hub_moe.loading",
    "remove_patch": "hub_moe.patches",
    "swap_patch": "hub_moe.patches",
}

if TYPE_CHECKING:
    from hub_moe.loading import load
    from hub_moe.modeling import (
        DeepseekConfig,
        DeepseekForCausalLM,
        DeepseekModel,
        HubMoeConfig,
        HubMoeForCausalLM,
        HubMoeForSequenceClassification,
        HubMoeForTokenClassification,
        HubMoeModel,
    )
    from hub_moe.patches import ExpertPatch, apply_patch, remove_patch, swap_patch

__all__ = [
    "DeepseekConfig",
    "DeepseekForCausalLM",
    "DeepseekModel",
    "ExpertPatch",
    "HubMoeConfig",
    "HubMoeForCausalLM",
    "HubMoeForSequenceClassification",
    "HubMoeForTokenClassification",
    "HubMoeModel",
    "apply_patch",
    "load",
    "remove_patch",
    "swap_patch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'hub_moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_NAMES])
