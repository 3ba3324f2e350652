"""Losses: of the next token, and in training on the router. Pure functions on tensors; padding never counts.

Shape letters: B sequences, L tokens of a sequence, E routed experts, K experts per token, G expert groups, T = B * L
tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from .configuration_hub_moe import HubMoeConfig
from .routing import score_experts

token_losses: Callable[..., Tensor | None] | None
try:  # beside a checkpoint this code also works where hub_moe is not installed
    from hub_moe.experts.cross_entropy import token_losses
except ImportError:
    token_losses = None

logger = logging.get_logger(__name__)

# output of a loss -> field of its weight
ROUTER_LOSS_WEIGHTS = {
    "aux_loss": "aux_loss_alpha",
    "device_aux_loss": "device_aux_loss_alpha",
    "z_loss": "router_z_loss_coef",
}


def token_loss(loss_function: Callable[..., Tensor], logits_BLV: Tensor, **given: Any) -> Tensor:
    """`loss_function(logits=..., **given)`, a float32 scalar.

    Args:
        loss_function: A model's own; where it is transformers' `ForCausalLMLoss`, compiled code may stand for it.
        logits_BLV: Logits.
        given: `labels` (B, L) or `shift_labels`, `vocab_size`, and as there `num_items_in_batch` and `ignore_index`.
    """
    loss = _compiled_loss(logits_BLV, **given) if loss_function is ForCausalLMLoss else None
    return loss_function(logits=logits_BLV, **given) if loss is None else loss


def _compiled_loss(
    logits_BLV: Tensor,
    *,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    if token_losses is None or logits_BLV.shape[-1] != vocab_size:
        return None
    if shift_labels is None:
        if not isinstance(labels, Tensor):
            return None
        shift_labels = shift_labels_ahead(labels, None, None, steps=1, ignore_index=ignore_index)
    label_T = shift_labels.reshape(-1).to(logits_BLV.device)
    losses_T = token_losses(logits_BLV.reshape(-1, vocab_size), label_T, ignore_index=ignore_index)
    if losses_T is None:
        return None
    count = (label_T != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses_T.sum() / count


def balance_losses(
    logits_BLE: Tensor,
    expert_BLK: Tensor,
    mask_BL: Tensor,
    *,
    scoring_func: str,
    num_groups: int | None,
    per_sequence: bool,
) -> tuple[Tensor, Tensor | None]:
    """Expert-level and device-level balance loss of one layer, unweighted float32 scalars.

    Expert level: sum over experts of f_i P_i, where f_i is the share of tokens that chose expert i times E / K, and P_i
    its mean score after normalising each token's scores to sum 1 (arXiv:2405.04434 eq. 23 to 25; arXiv:2412.19437
    eq. 17 to 20). Device level: the same over groups, with the mean f and the summed P of a group
    (arXiv:2405.04434 eq. 26 to 28). Perfect balance gives 1 for each.

    Args:
        logits_BLE: Router logits.
        expert_BLK: The experts really chosen, balancing bias included.
        mask_BL: 1 for tokens, 0 for padding.
        scoring_func: `"softmax"` or `"sigmoid"`.
        num_groups: Groups ("devices") for the second loss; None leaves it out.
        per_sequence: Balance each sequence by itself and average over sequences, instead of over the whole batch.
    """
    num_experts, top_k = logits_BLE.shape[-1], expert_BLK.shape[-1]
    scores_BLE = score_experts(logits_BLE.float(), scoring_func)
    share_BLE = scores_BLE / scores_BLE.sum(dim=-1, keepdim=True)
    chosen_BLE = torch.zeros_like(share_BLE).scatter(-1, expert_BLK, 1.0)
    if not per_sequence:
        share_BLE, chosen_BLE = share_BLE.flatten(0, 1)[None], chosen_BLE.flatten(0, 1)[None]
        mask_BL = mask_BL.flatten()[None]
    weight_BL1 = mask_BL.to(share_BLE).unsqueeze(-1)
    tokens_B1 = weight_BL1.sum(dim=1)
    f_BE = (chosen_BLE * weight_BL1).sum(dim=1) / tokens_B1.clamp(min=1) * (num_experts / top_k)
    p_BE = (share_BLE * weight_BL1).sum(dim=1) / tokens_B1.clamp(min=1)
    num_sequences = (tokens_B1 > 0).sum().clamp(min=1)
    expert_loss = (f_BE * p_BE).sum() / num_sequences
    if num_groups is None:
        return expert_loss, None
    f_BG = f_BE.unflatten(-1, (num_groups, -1)).mean(dim=-1)
    p_BG = p_BE.unflatten(-1, (num_groups, -1)).sum(dim=-1)
    return expert_loss, (f_BG * p_BG).sum() / num_sequences


def router_z_loss(logits_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits) squared, float32 scalar (arXiv:2202.08906 eq. 5)."""
    z_BL = torch.logsumexp(logits_BLE.float(), dim=-1).square()
    mask_BL = mask_BL.to(z_BL)
    return (z_BL * mask_BL).sum() / mask_BL.sum().clamp(min=1)


def shift_labels_ahead(
    labels_BL: Tensor, mask_BL: Tensor | None, position_ids_BL: Tensor | None, *, steps: int, ignore_index: int = -100
) -> Tensor:
    """Labels that position i has to predict `steps` tokens ahead, of shape (B, L - steps + 1).

    `ignore_index` stands in the last column, where position i is padding, and where the label lies in another packed
    document. Documents are told apart by `position_ids_BL` starting anew; without it each row is one document.
    """
    ahead_BL = labels_BL[..., steps:]
    if mask_BL is not None:
        ahead_BL = ahead_BL.masked_fill(mask_BL[:, : ahead_BL.shape[1]] == 0, ignore_index)
    if position_ids_BL is not None:
        distance_BL = position_ids_BL[:, steps:] - position_ids_BL[:, :-steps]
        ahead_BL = ahead_BL.masked_fill(distance_BL != steps, ignore_index)
    return nn.functional.pad(ahead_BL, (0, 1), value=ignore_index)


def has_router_loss(config: HubMoeConfig) -> bool:
    """Whether training adds a loss on the router."""
    return any(getattr(config, field) for field in ROUTER_LOSS_WEIGHTS.values())


def router_losses(logits_TE: Tensor, expert_TK: Tensor, mask_BL: Tensor, config: HubMoeConfig) -> dict[str, Tensor]:
    """The unweighted router losses of one layer: `aux_loss`, `z_loss`, and with a weight `device_aux_loss`."""
    logits_BLE = logits_TE.view(*mask_BL.shape, -1)
    mask_BL = mask_BL.to(logits_TE.device)
    expert_loss, device_loss = balance_losses(
        logits_BLE,
        expert_TK.view(*mask_BL.shape, -1),
        mask_BL,
        scoring_func=config.scoring_func,
        num_groups=config.n_group if config.device_aux_loss_alpha else None,
        per_sequence=config.seq_aux,
    )
    losses = {"aux_loss": expert_loss, "z_loss": router_z_loss(logits_BLE, mask_BL)}
    return losses if device_loss is None else {**losses, "device_aux_loss": device_loss}


def warn_of_detached_router(logits_TE: Tensor, config: HubMoeConfig, *, is_trained: bool) -> None:
    """Say aloud, once, that a router loss has a weight and cannot work: its logits carry no gradient."""
    if not (is_trained and torch.is_grad_enabled() and has_router_loss(config)) or logits_TE.requires_grad:
        return
    weights = {name: getattr(config, name) for name in ROUTER_LOSS_WEIGHTS.values()}
    used = ", ".join(f"{name}={value}" for name, value in weights.items() if value)
    logger.warning_once(
        f"{used} cannot reach the router, whose logits carry no gradient: training goes on WITHOUT this loss. Use "
        "activation_checkpointing_kwargs={'use_reentrant': False}, or set the weight to 0."
    )


def total_loss(result: Any, config: HubMoeConfig, labels_BL: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """`result.loss` plus its router and MTP losses, weighted.

    Under gradient accumulation `num_items_in_batch` counts the labels of all micro-batches. The router losses are means
    over one micro-batch, so each is scaled by that micro-batch's part of the labels.
    """
    part: Tensor | float = 1.0
    if num_items_in_batch is not None:
        part = (labels_BL[:, 1:] != -100).sum() / num_items_in_batch
    loss: Tensor = result.loss
    if result.mtp_loss is not None:
        loss = loss + config.mtp_loss_coef * result.mtp_loss
    for name, field in ROUTER_LOSS_WEIGHTS.items():
        value, weight = getattr(result, name), getattr(config, field)
        if weight and value is not None:
            loss = loss + weight * part * value
    return loss


def token_mask(attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """1 for tokens and 0 for padding, shape (B, L); only a mask of two dimensions says which tokens are padding."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -shape[1] :].to(device)
    return torch.ones(shape, dtype=torch.int64, device=device)


def mask_ahead(mask_BL: Tensor, position_ids: Tensor | None, *, depth: int) -> Tensor:
    """1 where MTP depth `depth` has a whole chain of tokens of one document, shape (B, L - depth).

    Position i joins the hidden state of token i with the tokens up to i + depth. Where one of them is padding, or the
    last lies in another packed document, position i is no token to that depth.
    """
    length = mask_BL.shape[1] - depth
    whole_BL = torch.stack([mask_BL[:, i : i + length] != 0 for i in range(depth + 1)]).all(dim=0)
    if position_ids is not None:
        whole_BL = whole_BL & (position_ids[:, depth:] - position_ids[:, :-depth] == depth)
    return whole_BL.long()


def renumber_segments(position_ids: Tensor, *, depth: int) -> Tensor:
    """Positions for MTP depth `depth` in packed rows, from 0 in each segment, of shape (B, L - depth).

    A segment is what one document gives; a position whose chain reaches into the next document is one by itself, so
    that nothing attends to it.
    """
    ones_BL = torch.ones_like(position_ids)
    whole_BL = mask_ahead(ones_BL, position_ids, depth=depth) != 0
    starts_BL = ~whole_BL
    starts_BL[:, 1:] |= ~whole_BL[:, :-1]
    starts_BL[:, :1] = True
    index_BL = torch.arange(whole_BL.shape[1], device=position_ids.device).expand_as(whole_BL)
    return index_BL - torch.where(starts_BL, index_BL, 0).cummax(dim=-1).values


def zip_layers(outputs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Router logits and chosen experts of each recorded MoE layer."""
    return zip(outputs.router_logits or (), outputs.router_indices or (), strict=True)
