"""The causal-LM forward that our models share: logits, and in training the losses that the stock classes lack.

Shape letters: B batch, L sequence, T = B * L tokens, D hidden, E routed experts, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput, MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .layers import HubMoeMoE, linear
from .losses import (
    ROUTER_LOSS_WEIGHTS,
    has_router_loss,
    mask_ahead,
    router_losses,
    shift_labels_ahead,
    token_loss,
    token_mask,
    total_loss,
    warn_of_detached_router,
    zip_layers,
)
from .routing import count_load


@dataclass
class HubMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` with HubMoe's losses, each unweighted and None where not computed.

    Args:
        loss: Next-token loss; in training mode plus the weighted losses below.
        aux_loss: Expert-level balance loss, summed over layers.
        device_aux_loss: Device-level balance loss, summed over layers.
        z_loss: Router z-loss, summed over layers.
        mtp_loss: Loss of the MTP layers, averaged over them.
        expert_load: Tokens per MoE layer and expert, int64 of shape (layers, E), padding excluded; MTP layers last.
        router_logits: One (T, E) tensor per MoE layer, padding included.
    """

    device_aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    mtp_loss: Tensor | None = None
    expert_load: Tensor | None = None


@dataclass
class MtpOutput(ModelOutput):
    """Final hidden states of each MTP layer, shapes (B, L - 1, D), (B, L - 2, D), ..., and what their routers did."""

    depth_hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    router_indices: tuple[Tensor, ...] | None = None


class MoeCausalLMMixin:
    """`forward` for a model with `model`, `lm_head` and `config`."""

    config: Any
    model: Any
    lm_head: Any
    loss_function: Any
    training: bool

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> HubMoeCausalLMOutputWithPast:
        """Logits of shape (B, L, V) and, with `labels`, the loss.

        With `output_router_logits=True`, or in training mode where a router loss has a weight, the output also holds
        the router losses and `expert_load`. The weighted losses join `loss` in training mode only, so that an
        evaluation loss is the plain next-token loss.
        """
        returns_routing = kwargs.pop("output_router_logits", self.config.output_router_logits)
        targets = labels if self.training else None
        records = bool(returns_routing or (targets is not None and has_router_loss(self.config)))
        recording = {"output_router_logits": records, "output_router_indices": records}
        if wants_only_last := _wants_only_last(kwargs.get("output_hidden_states"), self.config):
            kwargs["output_hidden_states"] = False  # a recorder would keep the layers from running in compiled steps
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **recording,
            **kwargs,
        )
        hidden_states = outputs.hidden_states
        if wants_only_last:
            hidden_states = (*[None] * self.config.num_hidden_layers, outputs.last_hidden_state)
        logits = linear(self.lm_head, slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        result = HubMoeCausalLMOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            router_logits=getattr(outputs, "router_logits", None) if returns_routing else None,
        )
        if labels is not None:
            given = {"labels": labels, "vocab_size": self.config.vocab_size, **kwargs}
            result.loss = token_loss(self.loss_function, logits, **given)
        ahead = None
        if targets is not None and self.config.num_mtp_layers and self.config.mtp_loss_coef:
            embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            ahead = self.model.predict_ahead(
                embeds, outputs.last_hidden_state, position_ids, attention_mask, **recording
            )
            result.mtp_loss = self._mtp_loss(
                ahead, targets, attention_mask, position_ids, num_items=kwargs.get("num_items_in_batch")
            )
        if records:
            self._summarise_routing(result, outputs, ahead, attention_mask, position_ids)
        if targets is not None:
            result.loss = total_loss(result, self.config, targets, kwargs.get("num_items_in_batch"))
        return result

    def _mtp_loss(
        self,
        ahead: MtpOutput,
        labels: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Mean over depths of each depth's cross-entropy (arXiv:2412.19437 eq. 24 and 25, without lambda)."""
        losses = []
        for depth, hidden in enumerate(ahead.depth_hidden_states or (), start=1):
            targets = shift_labels_ahead(labels, attention_mask, position_ids, steps=depth + 1)
            count = (targets != -100).sum().clamp(min=1) if num_items is None else num_items
            losses.append(
                token_loss(
                    self.loss_function,
                    linear(self.lm_head, hidden),
                    labels=None,
                    shift_labels=targets,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=count,
                )
            )
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self.lm_head.weight.device)

    def _summarise_routing(
        self,
        result: HubMoeCausalLMOutputWithPast,
        outputs: ModelOutput,
        ahead: MtpOutput | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> None:
        """Fill in the router losses and the expert load of `result`, MTP layers last."""
        mask_BL = token_mask(attention_mask, outputs.last_hidden_state.shape[:2], result.logits.device)
        layers = [(logits, chosen, mask_BL) for logits, chosen in zip_layers(outputs)]
        packed_positions = position_ids if attention_mask is None else None
        if ahead is not None:
            for depth, (logits, chosen) in enumerate(zip_layers(ahead), start=1):
                layers.append((logits, chosen, mask_ahead(mask_BL, packed_positions, depth=depth)))
        gates = [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, HubMoeMoE)]
        for (logits, _, _), gate in zip(layers, gates, strict=False):
            warn_of_detached_router(logits, self.config, is_trained=self.training and gate.weight.requires_grad)
        losses = [router_losses(*layer, self.config) for layer in layers]
        for name in ROUTER_LOSS_WEIGHTS:
            values = [loss[name] for loss in losses if name in loss]
            if values:
                setattr(
                    result,
                    name,
                    torch.stack([value.to(result.logits.device) for value in values]).sum(),
                )
        num_experts = self.config.n_routed_experts
        loads = [count_load(chosen, num_experts, mask.flatten()) for _, chosen, mask in layers]
        result.expert_load = torch.stack([load.to(result.logits.device) for load in loads]) if loads else None


def _wants_only_last(output_hidden_states: Any, config: Any) -> bool:
    """Whether the one hidden state asked for is the last, by its place from the end, and is the model's output."""
    is_output = getattr(config, "tie_last_hidden_states", None) in (None, True)
    return is_output and isinstance(output_hidden_states, int | list) and output_hidden_states in (-1, [-1])
