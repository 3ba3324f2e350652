"""The experts of a layer that are trained apart from its frozen stack: where they lie, for all who look for experts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHOSEN = "chosen"  # the name of the module below the layer's experts


class ChosenExperts(nn.Module):
    """Trainable copies of some rows of a layer's expert stacks, one parameter for each stack and named like it.

    Row i of every parameter is expert `expert_ids[i]`; while this stands beside the stacks, their own rows of these
    experts are not used.
    """

    is_chosen_E: Tensor  # int64, 1 for a chosen expert

    def __init__(self, experts: nn.Module, expert_ids: Sequence[int], dtype: torch.dtype | None = None) -> None:
        """Copy the rows of `expert_ids`, in `dtype` if that is given."""
        super().__init__()
        self.expert_ids = tuple(sorted(expert_ids))
        for name, stack in experts.named_parameters(recurse=False):
            rows = torch.tensor(self.expert_ids, dtype=torch.int64, device=stack.device)
            self.register_parameter(name, nn.Parameter(stack.detach()[rows].to(dtype or stack.dtype)))
        is_chosen_E = torch.zeros(stack.shape[0], dtype=torch.int64, device=stack.device)
        self.register_buffer("is_chosen_E", is_chosen_E.index_fill(0, rows, 1), persistent=False)

    def extra_repr(self) -> str:
        return f"expert_ids={list(self.expert_ids)}"


def find_chosen(experts: nn.Module) -> ChosenExperts | None:
    """The chosen experts beside the stacks of a layer, or None where the layer is not split."""
    chosen = getattr(experts, CHOSEN, None)
    return chosen if isinstance(chosen, ChosenExperts) else None
