"""The experts implementation of our models where none is asked for."""

from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_OURS = "hub_moe"


class DefaultExpertsMixin:
    """Chooses `hub_moe`, or transformers' own default where hub_moe is not installed, as beside exported code."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for "@use_experts_implementation" in the text of the model's file; the decorator itself
        # sits on the parent of HubMoeExperts
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `transformers.PreTrainedModel.get_correct_experts_implementation`."""
        if requested_experts is None and _OURS in ALL_EXPERTS_FUNCTIONS:
            requested_experts = _OURS
        parent: Any = super()
        chosen: str = parent.get_correct_experts_implementation(requested_experts)
        return chosen
