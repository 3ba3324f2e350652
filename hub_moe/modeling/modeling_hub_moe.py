"""The HubMoe models, registered with transformers' Auto classes.

Shape letters: B batch, L sequence, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CandidateGenerator
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..errors import ConfigError
from .causal_lm import MoeCausalLMMixin, MtpOutput
from .checkpoint import CheckpointMixin
from .configuration_hub_moe import HubMoeConfig
from .conversion import register_model_classes
from .decoder_layer import HubMoeDecoderLayer, HubMoeMtpLayer, prepare_layers
from .drafted_decoding import decode_with_drafts, must_leave_it
from .layers import (
    DefaultExpertsMixin,
    HubMoeAttention,
    HubMoeRMSNorm,
    HubMoeRotaryEmbedding,
    HubMoeRouter,
)
from .losses import mask_ahead, renumber_segments, token_mask
from .mtp import HubMoeCandidateGenerator, MtpAcceptance, require_drafts


class HubMoePreTrainedModel(DefaultExpertsMixin, CheckpointMixin, DeepseekV3PreTrainedModel):
    """What every HubMoe model shares: initialisation, recording, loading and saving."""

    config: HubMoeConfig
    config_class = HubMoeConfig
    _no_split_modules = ["HubMoeDecoderLayer", "HubMoeMtpLayer"]
    _can_record_outputs = {
        "hidden_states": HubMoeDecoderLayer,
        "attentions": HubMoeAttention,
        "router_logits": OutputRecorder(HubMoeRouter, index=0),
        "router_indices": OutputRecorder(HubMoeRouter, index=2),
    }
    # DeepSeek ships copies of the embedding and the head inside its MTP layers
    _keys_to_ignore_on_load_unexpected = [
        r"layers\.\d+\.embed_tokens\.weight",
        r"layers\.\d+\.shared_head\.head\.weight",
        r"rotary_emb\.inv_freq",
    ]

    def __init__(self, config: HubMoeConfig) -> None:
        config.validate()
        # not super(): the stock model classes behind us would first build themselves
        PreTrainedModel.__init__(self, config)
        if config.topk_method != "noaux_tc":
            self._keep_in_fp32_modules_strict: list[str] = []  # no balancing bias to keep

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HubMoeRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class HubMoeModel(HubMoePreTrainedModel, DeepseekV3Model):
    """The HubMoe backbone: token ids to final hidden states. It has no MTP layers; `HubMoeForCausalLM` adds them."""

    def __init__(self, config: HubMoeConfig) -> None:
        HubMoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(HubMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HubMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Final hidden states (B, L, D) of token ids (B, L) or their embeddings (B, L, D), as in the stock classes.

        Raises:
            ValueError: If both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds was expected.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary_emb(hidden, position_ids)
        layers = list(self.layers)[: self.config.num_hidden_layers]  # a slice would be a new module at every step
        prepared = prepare_layers(layers, hidden, rotation, past_key_values)
        layer: Any
        given = {"position_ids": position_ids, "use_cache": use_cache, **kwargs}
        for place, layer in enumerate(layers):
            if prepared is not None:
                hidden = layer.decode(prepared[place], hidden, rotation, mask, past_key_values, **given)
            else:
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    past_key_values=past_key_values,
                    position_embeddings=rotation,
                    **given,
                )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    @property
    def mtp_layers(self) -> nn.ModuleList:
        """The MTP layers, behind the `num_hidden_layers` ordinary ones."""
        return self.layers[self.config.num_hidden_layers :]

    @capture_outputs
    def predict_ahead(
        self,
        inputs_embeds: Tensor,
        last_hidden_state: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> MtpOutput:
        """Run the MTP layers over a whole sequence, each one token shorter than the last (training only, no cache).

        Args:
            inputs_embeds: Of the main model, (B, L, D).
            last_hidden_state: Of the main model, after its final norm, (B, L, D).
            position_ids: (B, L) or (1, L); None counts from 0.
            attention_mask: (B, L), 0 for padding, or None.
            kwargs: Only `output_router_logits` and `output_router_indices`, read by the recorder.
        """
        hidden = last_hidden_state
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ConfigError(
                f"MTP layers train with an attention mask of shape (batch, tokens), not {tuple(attention_mask.shape)}; "
                "set mtp_loss_coef=0 to train without them."
            )
        mask_BL = token_mask(attention_mask, (hidden.shape[0], hidden.shape[1]), hidden.device)
        is_packed = position_ids is not None and attention_mask is None
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        depths = []
        for depth, layer in enumerate(self.mtp_layers, start=1):
            if inputs_embeds.shape[1] <= depth:
                break
            embeds, positions = inputs_embeds[:, depth:], position_ids[:, depth:]
            in_segment = renumber_segments(position_ids, depth=depth) if is_packed else positions
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=None if attention_mask is None else mask_ahead(mask_BL, None, depth=depth),
                past_key_values=None,
                position_ids=in_segment,
            )
            hidden = layer(
                embeds,
                hidden[:, :-1],
                attention_mask=mask,
                position_ids=in_segment,
                position_embeddings=self.rotary_emb(embeds, positions),
            )
            depths.append(hidden)
        return MtpOutput(depth_hidden_states=tuple(depths))


class HubMoeForCausalLM(MoeCausalLMMixin, HubMoePreTrainedModel, DeepseekV3ForCausalLM, GenerationMixin):
    """HubMoe with a language-model head, training losses and MTP layers.

    Attributes:
        mtp_acceptance: How many drafts of the last `generate(use_mtp=True)` were right; None before.
    """

    mtp_acceptance: MtpAcceptance | None = None

    def __init__(self, config: HubMoeConfig) -> None:
        HubMoePreTrainedModel.__init__(self, config)
        self.model = HubMoeModel(config)
        self.model.layers.extend(HubMoeMtpLayer(config, depth) for depth in range(config.num_mtp_layers))
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _assisted_decoding(self, input_ids: Tensor, generation_config: Any, **given: Any) -> Any:
        """With `use_mtp=True`, greedy: drafts for each row of a batch. All else is left to transformers."""
        if generation_config.use_mtp:
            require_drafts(self.config, given)
            self.mtp_acceptance = MtpAcceptance.of(self.config.num_mtp_layers)
            if not must_leave_it(self, generation_config, given, batch=len(input_ids)):
                return decode_with_drafts(self, input_ids, generation_config, given, self.mtp_acceptance)
        return super()._assisted_decoding(input_ids, generation_config=generation_config, **given)

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """Draft with the MTP layers in memory; transformers would read them from disk again at every call."""
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(generation_config, *args, **kwargs)
        assert self.mtp_acceptance is not None
        return HubMoeCandidateGenerator(
            self,
            generation_config,
            logits_processor=kwargs.get("logits_processor"),
            acceptance=self.mtp_acceptance,
        )


class HubMoeForSequenceClassification(GenericForSequenceClassification, HubMoePreTrainedModel):
    """HubMoe with a classifier on the last token."""


class HubMoeForTokenClassification(GenericForTokenClassification, HubMoePreTrainedModel):
    """HubMoe with a classifier on every token."""


AUTO_CLASSES = {
    "AutoModel": "HubMoeModel",
    "AutoModelForCausalLM": "HubMoeForCausalLM",
    "AutoModelForSequenceClassification": "HubMoeForSequenceClassification",
    "AutoModelForTokenClassification": "HubMoeForTokenClassification",
}

register_model_classes(HubMoeConfig, {auto: globals()[name] for auto, name in AUTO_CLASSES.items()})
