"""The first DeepSeekMoE (arXiv:2401.06066), which transformers 5 has no class for: Llama with HubMoe's experts."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

from .causal_lm import MoeCausalLMMixin
from .checkpoint import CheckpointMixin
from .configuration_deepseek import DeepseekConfig
from .layers import DefaultExpertsMixin, HubMoeExperts, HubMoeMoE, HubMoeRouter
from .registration import register_model_classes


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama attention, then a dense block or experts, as `DeepseekConfig.is_moe_layer` says."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.is_moe_layer(layer_idx):
            self.mlp = HubMoeMoE(config)


class DeepseekPreTrainedModel(DefaultExpertsMixin, CheckpointMixin, LlamaPreTrainedModel):
    """What the DeepseekMoE models share: initialisation, recording, loading and saving."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(HubMoeRouter, index=0),
        "router_indices": OutputRecorder(HubMoeRouter, index=2),
    }

    def __init__(self, config: DeepseekConfig) -> None:
        config.validate()
        # not super(): the stock model classes behind us would first build themselves
        PreTrainedModel.__init__(self, config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HubMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, HubMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The DeepSeekMoE backbone: token ids to final hidden states."""

    def __init__(self, config: DeepseekConfig) -> None:
        DeepseekPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(MoeCausalLMMixin, DeepseekPreTrainedModel, LlamaForCausalLM, GenerationMixin):
    """DeepSeekMoE with a language-model head and, in training, its balance loss."""

    def __init__(self, config: DeepseekConfig) -> None:
        DeepseekPreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """DeepSeekMoE with a classifier on the last token."""


class DeepseekForTokenClassification(GenericForTokenClassification, DeepseekPreTrainedModel):
    """DeepSeekMoE with a classifier on every token."""


AUTO_CLASSES = {
    "AutoModel": "DeepseekModel",
    "AutoModelForCausalLM": "DeepseekForCausalLM",
    "AutoModelForSequenceClassification": "DeepseekForSequenceClassification",
    "AutoModelForTokenClassification": "DeepseekForTokenClassification",
}

register_model_classes(DeepseekConfig, {auto: globals()[name] for auto, name in AUTO_CLASSES.items()})
