"""Token-expert pairs sorted by expert: what all products of an experts layer on the CPU share.

Shape letters: T tokens, K experts per token, S token-expert pairs, E routed experts, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class SortedPairs:
    """The pairs in the order in which they are computed; those of experts that live elsewhere are left out."""

    order_S: Tensor  # int64, where in (T, K) each pair comes from
    token_S: Tensor  # int64, the token of each pair
    ends: tuple[int, ...]  # of E experts: where the pairs of each end
    num_tokens: int
    top_k: int

    @property
    def are_all_here(self) -> bool:
        """Whether no pair was left out, as under expert parallelism some are."""
        return self.order_S.shape[0] == self.num_tokens * self.top_k

    def behind(self, first: int) -> "SortedPairs":
        """The pairs from `first` on alone, of the same experts."""
        ends = tuple(max(end - first, 0) for end in self.ends)
        return replace(self, order_S=self.order_S[first:], token_S=self.token_S[first:], ends=ends)


def sort_pairs_by_expert(
    expert_TK: Tensor, num_experts: int, *, may_be_elsewhere: bool = False, chosen: Sequence[int] = ()
) -> SortedPairs:
    """Sort once for all products, forward and backward; stable, so that a run can be repeated bit by bit.

    Args:
        expert_TK: Integer expert ids.
        may_be_elsewhere: Ids from `num_experts` on stand for experts of another process (expert parallelism).
        chosen: Experts whose pairs come behind all others, in this order, as if they were further experts.

    Raises:
        ConfigError: For an id that no expert has.
    """
    key_S = expert_TK.reshape(-1)
    if key_S.numel():
        lowest, highest = key_S.aminmax()
        if lowest < 0 or (highest >= num_experts and not may_be_elsewhere):
            raise ConfigError(
                f"The router chose expert ids from {int(lowest)} to {int(highest)}; the layer has {num_experts} "
                "experts, numbered from 0."
            )
    if chosen:
        place_E = torch.arange(num_experts)
        place_E[list(chosen)] = torch.arange(num_experts, num_experts + len(chosen))
        key_S, num_experts = place_E[key_S], num_experts + len(chosen)
    sorted_S, order_S = torch.sort(key_S, stable=True)
    ends = torch.searchsorted(sorted_S, torch.arange(num_experts, dtype=sorted_S.dtype), right=True).tolist()
    order_S = order_S[: ends[-1]]
    top_k = expert_TK.shape[-1]
    return SortedPairs(order_S, order_S // top_k, tuple(ends), expert_TK.shape[0], top_k)


def sum_over_experts(y_SD: Tensor, weight_S: Tensor | None, pairs: SortedPairs) -> Tensor:
    """Each token's rows, times their weights if there are any, added up: (T, D) in the dtype of `y`.

    Rows are taken token by token, so neither order nor rounding depends on the number of threads.
    """
    out_TD = y_SD.new_zeros(pairs.num_tokens, y_SD.shape[-1])
    if not pairs.are_all_here:
        rows_SD = y_SD if weight_S is None else y_SD * weight_S.unsqueeze(-1)
        return out_TD.index_add_(0, pairs.token_S, rows_SD)
    place_TK = torch.empty_like(pairs.order_S)
    place_TK[pairs.order_S] = torch.arange(pairs.order_S.shape[0])
    place_TK = place_TK.view(-1, pairs.top_k)
    for place_T in place_TK.unbind(1):
        if weight_S is None:
            out_TD += y_SD[place_T]
        else:
            out_TD.addcmul_(y_SD[place_T], weight_S[place_T].unsqueeze(-1))
    return out_TD
