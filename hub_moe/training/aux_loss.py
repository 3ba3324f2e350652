"""The auxiliary loss of transformers' own families, counted once a step."""

from typing import Any

from torch import Tensor
from transformers import Trainer


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
