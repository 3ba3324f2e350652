"""Loss-free balancing: a bias per expert, moved after every optimizer step against the load (arXiv:2408.15664).

Shape letters: B batch, L sequence, T = B * L tokens, N layers with experts, E routed experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..anatomy import MoeLayer, find_moe_layers
from ..errors import UnsupportedModelError

_BIAS_NAME = "e_score_correction_bias"


def update_balancing_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """The next balancing bias, float32: up by `speed` for experts below the mean load, down for those above.

    Algorithm 1 of arXiv:2408.15664, also arXiv:2412.19437 section 2.1.2. Leading dimensions are layers.
    """
    load_E = load_E.float()
    return bias_E.float() + speed * torch.sign(load_E.mean(dim=-1, keepdim=True) - load_E)


def measure_imbalance(load_E: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, float32: 1 is even, E is one expert doing everything.

    It is 1 + MaxVio of arXiv:2408.15664. Leading dimensions are layers; a layer without load counts as even.
    """
    load_E = load_E.float()
    mean = load_E.mean(dim=-1)
    return torch.where(mean > 0, load_E.amax(dim=-1) / mean.clamp(min=1e-9), 1.0)


class LoadCounter:
    """Counts how many tokens each expert receives while a model trains.

    Counted is what passes through the model's own `forward` in training mode. A forward that gradient checkpointing
    repeats in the backward pass runs outside of it and is not counted twice. Padding, told by a two-dimensional
    `attention_mask`, is not counted. The counts live outside the model: as buffers, DDP would overwrite them with those
    of rank 0.

    Raises:
        UnsupportedModelError: If the model's layers differ in their number of experts, or a router does not return
            `(logits, weights, chosen experts)`.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer]) -> None:
        if len({layer.num_experts for layer in layers}) != 1:
            raise UnsupportedModelError("Counting load needs the same number of experts in every layer.")
        self.load_NE = torch.zeros(len(layers), layers[0].num_experts, dtype=torch.int64)
        self._is_counting = False
        self._mask_BL: Tensor | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        for place, layer in enumerate(layers):
            self._hooks.append(layer.router.register_forward_hook(self._make_router_hook(place)))

    def take(self) -> Tensor:
        """The load since the last call, int64 of shape (N, E), summed over data-parallel processes."""
        load_NE, self.load_NE = self.load_NE, torch.zeros_like(self.load_NE)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load_NE)
        return load_NE

    def close(self) -> None:
        """Stop counting and leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if model.training and mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise UnsupportedModelError(
                "Counting load needs an attention_mask of shape (batch, length) or none; other masks do not say "
                "which tokens are padding."
            )
        self._is_counting = model.training
        self._mask_BL = mask

    def _end(self, *_: Any) -> None:
        self._is_counting = False
        self._mask_BL = None

    def _make_router_hook(self, place: int) -> Any:
        def count(router: nn.Module, _: Any, output: Any) -> None:
            if not self._is_counting:
                return
            if not isinstance(output, tuple) or len(output) != 3 or output[2].is_floating_point():
                raise UnsupportedModelError(
                    f"The router {type(router).__name__} does not return (logits, weights, chosen experts)."
                )
            chosen_TK = output[2].detach()
            counted_TK = self._counted_tokens(len(chosen_TK), chosen_TK.device)[:, None].expand_as(chosen_TK)
            load_E = torch.zeros(self.load_NE.shape[1], dtype=torch.int64, device=chosen_TK.device)
            load_E.scatter_add_(0, chosen_TK.flatten(), counted_TK.flatten())
            self.load_NE = self.load_NE.to(load_E.device)
            self.load_NE[place] += load_E

        return count

    def _counted_tokens(self, num_tokens: int, device: torch.device) -> Tensor:
        """1 for tokens and 0 for padding, int64 of shape (T,). MTP layers see the last columns of the batch only."""
        if self._mask_BL is None:
            return torch.ones(num_tokens, dtype=torch.int64, device=device)
        length = num_tokens // len(self._mask_BL)
        return (self._mask_BL[:, -length:].to(device) != 0).long().flatten()


class BalancingCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Balances the experts of a model while transformers' `Trainer` trains it.

    Once per optimizer step, whatever the gradient accumulation, the load of that step moves each layer's balancing bias
    by `speed`. The loads are kept, summed over windows of `window_steps` steps, in checkpoints too. Not meant for
    adapters: one that does not carry the bias is not the model that was trained.

    Args:
        speed: Step of the bias; 0.001 in DeepSeek-V3.
        window_steps: Steps that are summed up in one entry of `history`.

    Raises:
        UnsupportedModelError: On training a model whose routers have no balancing bias.
    """

    def __init__(self, *, speed: float = 0.001, window_steps: int = 100) -> None:
        self.speed = speed
        self.window_steps = window_steps
        self.history: list[list[list[int]]] = []
        self.layer_indices: list[int] = []
        self._layers: list[MoeLayer] = []
        self._counter: LoadCounter | None = None

    def imbalance(self) -> float:
        """Imbalance of the worst layer in the current window, 1.0 before the first step."""
        return measure_imbalance(torch.tensor(self.history[-1])).max().item() if self.history else 1.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"speed": self.speed, "window_steps": self.window_steps},
            "attributes": {"history": self.history, "layer_indices": self.layer_indices},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook into the model; after a resume, go on with the history of the checkpoint."""
        model = kwargs["model"]
        self._layers = find_moe_layers(model)
        for layer in self._layers:
            bias_E = getattr(layer.router, _BIAS_NAME, None)
            if bias_E is None:
                raise UnsupportedModelError(
                    f"{layer.name} has no balancing bias; loss-free balancing needs topk_method='noaux_tc'."
                )
            bias_E.data = bias_E.data.float()
        self.layer_indices = [layer.index for layer in self._layers]
        self._counter = LoadCounter(model, self._layers)
        if state.global_step:
            self.history = state.stateful_callbacks[type(self).__name__]["attributes"]["history"]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases by the load of the step that just ended."""
        assert self._counter is not None
        load_NE = self._counter.take().cpu()
        for layer, load_E in zip(self._layers, load_NE, strict=True):
            bias_E = getattr(layer.router, _BIAS_NAME)
            bias_E.copy_(update_balancing_bias(bias_E, load_E.to(bias_E.device), self.speed))
        if state.global_step % self.window_steps == 0 or not self.history:
            self.history.append(torch.zeros_like(load_NE).tolist())
        self.history[-1] = (torch.tensor(self.history[-1]) + load_NE).tolist()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unhook."""
        if self._counter is not None:
            self._counter.close()
