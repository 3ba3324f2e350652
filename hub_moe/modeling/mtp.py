"""Drafts of the MTP layers that are already in memory, for `generate(use_mtp=True)`, and how many of them were right.

Shape letters: B batch, L sequence, P prompt, S all columns of the token ids, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpModel

from ..errors import GenerationError
from .latent_cache import Places, place_rows


@dataclass
class MtpAcceptance:
    """How many drafts of one `generate(use_mtp=True)` were right, by depth, all rows together.

    A draft is accepted if it became a token of the output without a forward pass of its own, so every depth below it
    was accepted too, and new tokens = passes each row took part in + accepted drafts.

    Args:
        drafted: Drafts that the model verified.
        accepted: Those it would have chosen itself.
    """

    drafted: list[int]
    accepted: list[int]

    @classmethod
    def of(cls, depth: int) -> "MtpAcceptance":
        """Nothing counted yet, for that many MTP layers."""
        return cls([0] * depth, [0] * depth)

    @property
    def rate(self) -> float:
        """Accepted over drafted, of all depths; 0 where nothing was drafted."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    def add(self, drafts: int, accepted: int) -> None:
        """Count one row's step: `drafts` tokens verified, of which the first `accepted` stay."""
        for depth in range(drafts):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < accepted


def require_drafts(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise GenerationError if the model has no MTP layers, or the prompt comes as embeddings."""
    if not config.num_mtp_layers:
        raise GenerationError("use_mtp=True needs MTP layers, and this model has none (num_mtp_layers=0).")
    if model_kwargs.get("inputs_embeds") is not None:
        raise GenerationError("use_mtp=True drafts from token ids; give input_ids rather than inputs_embeds.")


class Prompt(NamedTuple):
    """The columns a batch starts with: which of them are tokens (bool), and the last one's position (B, 1)."""

    mask_BP: Tensor
    last_position_B1: Tensor

    def positions(self, columns_BL: Tensor) -> Tensor:
        """Position ids of columns."""
        return (columns_BL + (self.last_position_B1 + 1 - self.mask_BP.shape[1])).clamp(min=0)

    def mask(self, columns_BL: Tensor, end: int, *, config: Any, dtype: torch.dtype) -> Tensor:
        """What the tokens at `columns_BL` see of the columns before `end`: (B, 1, L, end).

        Bool with True for what is seen, or numbers of `dtype` to add for attention that is `eager`.
        """
        seen_BLS = torch.arange(end, device=columns_BL.device) <= columns_BL[..., None]
        seen_BLS[..., : self.mask_BP.shape[1]] &= self.mask_BP[:, None]
        if config._attn_implementation != "eager":
            return seen_BLS[:, None]
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=seen_BLS.device)
        return torch.where(seen_BLS[:, None], hidden.new_zeros(()), hidden)


class MtpDrafter:
    """Drafts for a batch whose rows grow at their own pace, one token per MTP layer.

    Depth k joins the hidden state of column c with the token of column c + k and so predicts column c + k + 1. At a
    row's last columns that token is a draft itself; the next call computes those columns again with what came of it.

    Args:
        model: A HubMoeForCausalLM; its layers are used as they are.
        prompt: The columns that the hidden states of the first call are of.
    """

    def __init__(self, model: Any, prompt: Prompt) -> None:
        self._model, self._prompt = model, prompt
        self._cache = DynamicCache()
        self._again = min(model.config.num_mtp_layers - 1, prompt.mask_BP.shape[1])
        self._tail_BAD: Tensor | None = None  # the last hidden states of each row, for the columns computed again

    def draft(
        self, ids_BS: Tensor, hidden_BLD: Tensor, *, known: Sequence[int], first: Sequence[int], count: int
    ) -> None:
        """Write each row's next `count` tokens, as far as the MTP layers guess them, behind its known ones.

        Args:
            ids_BS: Token ids, written to; their first column is the prompt's.
            hidden_BLD: Of the main model, after its final norm, in each row from its column `first` on.
            known: How many tokens each row has; hidden states behind the last but one of them are ignored.
            first: Column of each row's first hidden state.
            count: At most the number of MTP layers.
        """
        if self._tail_BAD is not None:
            hidden_BLD = torch.cat((self._tail_BAD, hidden_BLD), dim=1)
            first = [column - self._again for column in first]
        device, backbone = hidden_BLD.device, self._model.model
        last_B = torch.tensor([max(0, n - 2 - start) for n, start in zip(known, first, strict=True)], device=device)
        known_B1 = spread_columns(known, 1, device=ids_BS.device)
        columns_BL = spread_columns(first, hidden_BLD.shape[1], device=device)
        mask = self._make_room(columns_BL, max(first) + hidden_BLD.shape[1], hidden_BLD)
        self._tail_BAD = _rows_up_to(hidden_BLD, last_B, count=self._again)
        for depth, layer in enumerate(backbone.mtp_layers[:count], start=1):
            embeds = backbone.embed_tokens(ids_BS.gather(1, (columns_BL + depth).to(ids_BS.device)).to(device))
            positions = self._prompt.positions(columns_BL + depth)
            hidden_BLD = layer(
                embeds,
                hidden_BLD,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=backbone.rotary_emb(embeds, positions),
                past_key_values=self._cache,
            )
            logits_B1V = self._model.lm_head(_rows_up_to(hidden_BLD, last_B, count=1))
            ids_BS.scatter_(1, known_B1 + (depth - 1), logits_B1V.argmax(dim=-1).to(ids_BS.device))

    def _make_room(self, columns_BL: Tensor, end: int, hidden_BLD: Tensor) -> Tensor | None:
        """The mask of a pass over `columns_BL`, for which the cache has places then."""
        config = self._model.config
        if self._tail_BAD is None:
            mask_BP = self._prompt.mask_BP
            mask: Tensor | None = create_causal_mask(
                config=config,
                inputs_embeds=hidden_BLD,
                attention_mask=None if mask_BP.all() else mask_BP,
                past_key_values=None,
            )
            return mask
        place_rows(self._cache, Places(columns_BL, end))
        return self._prompt.mask(columns_BL, end, config=config, dtype=hidden_BLD.dtype)


def spread_columns(first: Sequence[int], count: int, *, device: torch.device) -> Tensor:
    """`count` columns from each row's `first` on, int64 of shape (B, count)."""
    return torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)


def _rows_up_to(hidden_BLD: Tensor, last_B: Tensor, *, count: int) -> Tensor:
    """In each row of the batch the `count` states up to the one numbered `last_B`, (B, count, D)."""
    index_BA = (last_B[:, None] + torch.arange(1 - count, 1, device=last_B.device)).clamp(min=0)
    return hidden_BLD.gather(1, index_BA[..., None].expand(-1, -1, hidden_BLD.shape[-1]))


class InMemoryMtpModel(MtpModel):
    """transformers' MTP drafting over the MTP layers of `main_model`, sharing every weight and copying none."""

    def __init__(self, main_model: PreTrainedModel) -> None:
        PreTrainedModel.__init__(self, main_model.config)
        self.num_mtp_layers = main_model.config.num_mtp_layers
        self.use_post_norm = True
        self.use_shared_post_norm = False
        self.has_per_layer_rope = False
        self.layers = nn.ModuleList(main_model.model.mtp_layers)
        self.tie_with_main_model(main_model)
        self.training = False  # of this wrapper only: the layers are the main model's


class HubMoeCandidateGenerator(MTPCandidateGenerator):
    """Drafts one token per MTP layer for transformers' own assisted generation, which samples, and counts."""

    def __init__(
        self, main_model: PreTrainedModel, generation_config: Any, *, logits_processor: Any, acceptance: MtpAcceptance
    ) -> None:
        self.num_mtp_layers = main_model.config.num_mtp_layers
        self.model_kwargs_overrides = {"output_hidden_states": -1}
        self.device: torch.device = main_model.model.layers[-1].eh_proj.weight.device
        self.mtp_model = InMemoryMtpModel(main_model)
        self.mtp_cache = MtpCache(config=main_model.config.get_mtp_config())
        self.mtp_cache.activate_past_recording()
        self.do_sample = generation_config.do_sample
        self.logits_processor = logits_processor
        self.is_main_model_prefill = True
        self._acceptance = acceptance
        self._has_drafted = False

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Count; transformers calls this after every verification, the first time for the prompt without drafts."""
        self._acceptance.add(self.num_mtp_layers if self._has_drafted else 0, int(num_matches))
        self._has_drafted = True
