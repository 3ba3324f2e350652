"""Speculative decoding with MTP layers that are already in memory: `generate(use_mtp=True)`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from ..errors import GenerationError


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
    """Drafts one token per MTP layer.

    Raises:
        GenerationError: If the model has no MTP layers, or the prompt comes as embeddings.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        logits_processor: Any = None,
    ) -> None:
        self.num_mtp_layers = main_model.config.num_mtp_layers
        if not self.num_mtp_layers:
            raise GenerationError("use_mtp=True needs MTP layers, and this model has none (num_mtp_layers=0).")
        if model_kwargs.get("inputs_embeds") is not None:
            raise GenerationError("use_mtp=True drafts from token ids; give input_ids rather than inputs_embeds.")
        self.model_kwargs_overrides = {"output_hidden_states": -1}
        self.device: torch.device = main_model.model.layers[-1].eh_proj.weight.device
        self.mtp_model = InMemoryMtpModel(main_model)
        self.mtp_cache = MtpCache(config=main_model.config.get_mtp_config())
        self.mtp_cache.activate_past_recording()
        self.do_sample = generation_config.do_sample
        self.logits_processor = logits_processor
        self.is_main_model_prefill = True
