"""The load of every expert while a model trains, and how uneven it is.

Shape letters: B batch, L sequence, T = B * L tokens, E routed experts, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import MoeLayer
from ..errors import UnsupportedModelError


def measure_imbalance(load_E: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, float32: 1 is even, E is one expert doing everything.

    It is 1 + MaxVio of arXiv:2408.15664. Leading dimensions are layers; a layer without load counts as even.
    """
    load_E = load_E.float()
    mean = load_E.mean(dim=-1)
    return torch.where(mean > 0, load_E.amax(dim=-1) / mean.clamp(min=1e-9), 1.0)


class LoadCounter:
    """Counts how many tokens each expert receives while a model trains.

    Counted is what passes through the model's own `forward` in training mode with gradients. A forward that gradient
    checkpointing repeats in the backward pass runs outside of it and is not counted twice; evaluation, and passes of a
    training model under `no_grad`, are not counted. Padding, told by a two-dimensional `attention_mask`, is not counted
    either; an MTP layer counts the positions whose whole chain of tokens lies in one document. The counts live outside
    the model: as buffers, DDP would overwrite them with those of rank 0.

    Raises:
        UnsupportedModelError: In the forward, if a router does not return `(logits, weights, chosen experts)`, or the
            mask does not name the padding.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        self.layers = list(layers)
        self._loads = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in layers]
        self._ranks_with_same_batch: int = getattr(model, "tp_size", None) or 1
        self._is_counting = False
        self._shape_BL = (0, 0)
        self._mask_BL: Tensor | None = None
        self._positions_BL: Tensor | None = None
        self._positions_seen = 0
        self._sequences_seen: Tensor | int = 0
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for place, layer in enumerate(layers):
            self._hooks.append(layer.router.register_forward_hook(self._make_router_hook(place)))

    def take(self) -> list[Tensor]:
        """The load of each layer since the last call, int64 of shape (E,), summed over data-parallel processes.

        Every process has to call it equally often.
        """
        loads, self._loads = self._loads, [torch.zeros_like(load_E) for load_E in self._loads]
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return loads
        together = torch.cat([load_E.to(loads[0].device) for load_E in loads])
        torch.distributed.all_reduce(together)
        together //= self._ranks_with_same_batch
        return list(together.split([len(load_E) for load_E in loads]))

    def mean_length(self) -> float:
        """Positions per sequence in this process, packed documents taken apart; 0 before the first forward."""
        return self._positions_seen / max(1, int(self._sequences_seen))

    def close(self) -> None:
        """Stop counting and leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_counting = model.training and torch.is_grad_enabled()
        if not self._is_counting:
            return
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if len(args) > 1 or (mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)):
            raise UnsupportedModelError(
                "Counting load needs, by keyword, an attention_mask of shape (batch, length) or none; other masks do "
                "not say which tokens are padding."
            )
        given = args[0] if args else kwargs.get("input_ids")
        self._shape_BL = (given if given is not None else kwargs["inputs_embeds"]).shape[:2]
        self._mask_BL = mask
        self._positions_BL = positions if isinstance(positions, Tensor) and mask is None else None
        self._positions_seen += self._shape_BL[0] * self._shape_BL[1]
        if self._positions_BL is not None and self._positions_BL.shape == self._shape_BL:
            self._sequences_seen += torch.count_nonzero(self._positions_BL == 0)
        else:
            self._sequences_seen += self._shape_BL[0]

    def _end(self, *_: Any) -> None:
        self._is_counting = False
        self._mask_BL = self._positions_BL = None

    def _make_router_hook(self, place: int) -> Any:
        layer = self.layers[place]

        def count(router: nn.Module, _: Any, output: Any) -> None:
            if not self._is_counting:
                return
            if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
                raise UnsupportedModelError(
                    f"The router {type(router).__name__} does not return (logits, weights, chosen experts)."
                )
            chosen_TK = output[2].detach().flatten(0, -2).long()
            counted_T1 = self._counted_tokens(len(chosen_TK), chosen_TK.device, layer)[:, None]
            load_E = torch.zeros(layer.num_experts, dtype=torch.int64, device=chosen_TK.device)
            load_E.scatter_add_(0, chosen_TK.flatten(), counted_T1.expand_as(chosen_TK).flatten())
            self._loads[place] = self._loads[place].to(load_E.device) + load_E

        return count

    def _counted_tokens(self, num_tokens: int, device: torch.device, layer: MoeLayer) -> Tensor:
        """1 for tokens and 0 for padding, int64 of shape (T,). MTP depth d sees the last L - d columns of the batch."""
        batch_size, whole_length = self._shape_BL
        length = num_tokens // batch_size
        depth = whole_length - length
        if length * batch_size != num_tokens or depth < 0 or (depth and not layer.is_mtp):
            raise UnsupportedModelError(
                f"The router of {layer.name} saw {num_tokens} tokens of a batch of {batch_size} x {whole_length}, so "
                "hub_moe cannot tell which of them are padding."
            )
        counted_BL = torch.ones(batch_size, length, dtype=torch.bool, device=device)
        if self._mask_BL is not None:
            mask_BL = self._mask_BL.to(device) != 0
            for step in range(depth + 1):
                counted_BL &= mask_BL[:, step : step + length]
        if depth and self._positions_BL is not None:
            positions_BL = self._positions_BL.to(device)
            counted_BL &= positions_BL[:, depth:] - positions_BL[:, :-depth] == depth
        return counted_BL.long().flatten()
