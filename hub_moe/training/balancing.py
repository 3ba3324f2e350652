"""Loss-free balancing: a bias per expert, moved after every optimizer step against the load (arXiv:2408.15664).

Shape letters: E routed experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..anatomy import MoeLayer, find_moe_layers
from ..errors import ConfigError, UnsupportedModelError
from .load import LoadCounter, measure_imbalance


def update_balancing_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """The next balancing bias, float32: up by `speed` for experts below the mean load, down for those above.

    Algorithm 1 of arXiv:2408.15664, also arXiv:2412.19437 section 2.1.2. Leading dimensions are layers.
    """
    load_E = load_E.float()
    return bias_E.float() + speed * torch.sign(load_E.mean(dim=-1, keepdim=True) - load_E)


class BalancingCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Balances the experts of a model while transformers' `Trainer` trains it.

    Once per optimizer step, whatever the gradient accumulation and the number of data-parallel processes, the load of
    that step moves each layer's balancing bias by the speed, which is `speed` first and 0 for the end. A step that
    fp16's loss scaling skips moves nothing. The bias is kept in float32. Layers whose router has none (deepseek_v4's
    first ones route by hash) are left alone. Not meant for adapters: one that does not carry the bias is not the model
    that was trained.

    The loads are kept, summed over windows of `window_steps` steps, in checkpoints too. Give it to `Trainer` at once
    (`callbacks=[...]`) rather than later, so that a bfloat16 bias becomes float32 before a checkpoint is read into it.

    Args:
        speed: Step of the bias; 0.001 in DeepSeek-V3.
        stop_at: Share of the steps after which the speed is 0; DeepSeek-V3: 14.3 of 14.8 T tokens, 0.966
            (arXiv:2412.19437 section 4.2).
        stop_after_tokens: Tokens, padding excluded, after which the speed is 0; None never.
        is_centred: Keep each layer's bias at mean 0. The choice depends on differences only, so routing stays the same.
        window_steps: Steps that are summed up in one entry of `history`.

    Raises:
        ConfigError: If `stop_at` is not in [0, 1] or another number is negative.
        UnsupportedModelError: On a model of which no router has a balancing bias.
    """

    def __init__(
        self,
        *,
        speed: float = 0.001,
        stop_at: float = 1.0,
        stop_after_tokens: int | None = None,
        is_centred: bool = False,
        window_steps: int = 100,
    ) -> None:
        if speed < 0 or not 0 <= stop_at <= 1 or (stop_after_tokens or 0) < 0 or window_steps < 1:
            raise ConfigError(
                f"Balancing with speed={speed}, stop_at={stop_at}, stop_after_tokens={stop_after_tokens} and "
                f"window_steps={window_steps}: expected a speed and tokens of at least 0, a share of the steps from 0 "
                "to 1 and a window of at least 1 step."
            )
        self.speed = speed
        self.stop_at = stop_at
        self.stop_after_tokens = stop_after_tokens
        self.is_centred = is_centred
        self.window_steps = window_steps
        self.history: list[list[list[int]]] = []
        self.layer_indices: list[int] = []
        self.tokens = 0
        self._layers: list[MoeLayer] = []
        self._counter: LoadCounter | None = None

    def imbalance(self) -> float:
        """Imbalance of the worst layer in the current window, 1.0 before the first step."""
        if not self.history:
            return 1.0
        return max(measure_imbalance(torch.tensor(load_E)).item() for load_E in self.history[-1])

    def current_speed(self, step: int, max_steps: int) -> float:
        """The speed of the step that follows `step` finished ones."""
        is_over = step >= self.stop_at * max_steps
        is_over |= self.stop_after_tokens is not None and self.tokens >= self.stop_after_tokens
        return 0.0 if is_over else self.speed

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        settings = ("speed", "stop_at", "stop_after_tokens", "is_centred", "window_steps")
        return {
            "args": {name: getattr(self, name) for name in settings},
            "attributes": {name: getattr(self, name) for name in ("history", "layer_indices", "tokens")},
        }

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the biases float32 before a checkpoint is read into them."""
        if kwargs.get("model") is not None:
            find_balanced_layers(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook into the model; after a resume, go on with the history of the checkpoint."""
        self.close()
        self._layers = find_balanced_layers(kwargs["model"], is_resumed=bool(state.global_step))
        self.layer_indices = [layer.index for layer in self._layers]
        self._counter = LoadCounter(kwargs["model"], self._layers)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved is not None:
            self.history = saved["attributes"]["history"]
            self.tokens = saved["attributes"]["tokens"]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the biases by the load of the step that just ended."""
        assert self._counter is not None
        loads = self._counter.take()
        was_skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        speed = 0.0 if was_skipped else self.current_speed(state.global_step, state.max_steps)
        if speed:
            for layer, load_E in zip(self._layers, loads, strict=True):
                self._move(layer, load_E, speed)
        self._remember([load_E.tolist() for load_E in loads], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Unhook."""
        self.close()

    def close(self) -> None:
        """Leave the model without hooks; `on_train_end` does it, and after an error in training the caller may."""
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    @torch.no_grad()
    def _move(self, layer: MoeLayer, load_E: Tensor, speed: float) -> None:
        bias = layer.balancing_bias
        assert bias is not None
        bias_E = gather_bias(bias)
        moved_E = update_balancing_bias(bias_E, load_E.to(bias_E.device), speed)
        if self.is_centred:
            moved_E -= moved_E.mean()
        moved = moved_E.view(bias.shape)
        bias.copy_(distribute_tensor(moved, bias.device_mesh, bias.placements) if isinstance(bias, DTensor) else moved)

    def _remember(self, loads: list[list[int]], step: int) -> None:
        first_layer = next((place for place, layer in enumerate(self._layers) if not layer.is_mtp), 0)
        self.tokens += sum(loads[first_layer]) // self._layers[first_layer].top_k
        if step % self.window_steps == 0 or not self.history:
            self.history.append([[0] * len(load) for load in loads])
        self.history[-1] = [
            [before + now for before, now in zip(*pair, strict=True)]
            for pair in zip(self.history[-1], loads, strict=True)
        ]


def gather_bias(bias: Tensor) -> Tensor:
    """A balancing bias as a plain tensor of shape (E,); where FSDP shards it, every process has to call this."""
    whole = bias.full_tensor() if isinstance(bias, DTensor) else bias
    return whole.detach().view(-1)


def find_balanced_layers(model: nn.Module, *, is_resumed: bool = False) -> list[MoeLayer]:
    """The layers whose router has a balancing bias, which is float32 from now on.

    Raises:
        UnsupportedModelError: If no layer has one, or if it was not float32 while a checkpoint was read into it.
    """
    layers = [layer for layer in find_moe_layers(model) if layer.balancing_bias is not None]
    if not layers:
        raise UnsupportedModelError(_no_bias_message(model.config))
    narrow = [bias for bias in _biases(layers) if bias.dtype != torch.float32]
    if narrow and is_resumed:
        raise UnsupportedModelError(
            f"The balancing bias was {narrow[0].dtype} while a checkpoint was read into it and has been rounded; give "
            "the BalancingCallback to Trainer(callbacks=[...]), which makes it float32 in time."
        )
    for bias in narrow:
        bias.data = bias.data.float()
    return layers


def _biases(layers: Sequence[MoeLayer]) -> list[Tensor]:
    return [layer.balancing_bias for layer in layers if layer.balancing_bias is not None]


def _no_bias_message(config: Any) -> str:
    config = config.get_text_config(decoder=True)
    if hasattr(config, "topk_method") and hasattr(config, "aux_loss_alpha"):
        instead = "set topk_method='noaux_tc' in its config to give it one, or balance by aux_loss_alpha"
    elif hasattr(config, "router_aux_loss_coef"):
        instead = "balance by its auxiliary loss: output_router_logits=True and router_aux_loss_coef in its config"
    else:
        instead = "train it without a BalancingCallback"
    return f"Model type {config.model_type!r} has no balancing bias in its routers; {instead}."


class AuxLossOnce(Trainer):  # type: ignore[misc]
    """A Trainer in which `router_aux_loss_coef` weighs what it says, however the batch is split.

    The forward of a stock family (qwen3_moe, mixtral, olmoe, gpt_oss, ...) adds the whole auxiliary loss of a
    micro-batch, while its next-token loss is divided by the labels of all micro-batches and processes: over 8
    micro-batches the auxiliary loss counts 8 times (huggingface/transformers issue 48690). Here each counts by its
    micro-batch's part of the labels. HubMoe's own losses are right without this.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `transformers.Trainer.compute_loss`."""
        labels: Any = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        weight = getattr(self.model.config.get_text_config(decoder=True), "router_aux_loss_coef", None)
        aux_loss = getattr(outputs, "aux_loss", None)
        is_divided = model.training and isinstance(labels, Tensor) and num_items_in_batch is not None
        if weight and is_divided and isinstance(aux_loss, Tensor):
            part = (labels[..., 1:] != -100).sum() / num_items_in_batch
            processes = self.accelerator.num_processes // self.get_tp_size()
            scale = processes if self.args.average_tokens_across_devices else 1
            loss = loss - scale * weight * (1 - part) * aux_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss
