"""The layers of a HubMoe: attention and what feeds forward, as modules, or for a few new tokens in two compiled calls.

Shape letters: B batch, L sequence, D hidden, H heads, X head, S cached tokens, C latent, R rotary part.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from .configuration_hub_moe import HubMoeConfig
from .half_products import is_untouched
from .layers import HubMoeAttention, HubMoeMLP, HubMoeMoE, HubMoeRMSNorm, decoding, find_steps, linear, norm_of


class HubMoeDecoderLayer(DeepseekV3DecoderLayer):
    """Attention and either a dense block or experts, as `HubMoeConfig.is_moe_layer` says."""

    def __init__(self, config: HubMoeConfig, layer_idx: int, *, has_experts: bool | None = None) -> None:
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = HubMoeAttention(config, layer_idx)
        if has_experts is None:
            has_experts = config.is_moe_layer(layer_idx)
        self.mlp = HubMoeMoE(config) if has_experts else HubMoeMLP(config)
        self.input_layernorm = HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (B, L, D) to those behind the layer."""
        if past_key_values is not None and position_embeddings is not None:
            steps = find_steps(hidden_states)
            prepared = None if steps is None else _prepare(self, hidden_states, steps)
            if prepared is not None and _can_rotate(position_embeddings):
                return self.decode(prepared, hidden_states, position_embeddings, attention_mask, past_key_values)
        out: Tensor = super().forward(
            hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs
        )
        return out

    def decode(
        self,
        prepared: "PreparedSteps",
        x_BLD: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        """`forward` by compiled steps: one in front of the cache, and one behind where attention reads the latents."""
        attention = self.self_attn
        query_BHLX, latent_B1LC, rope_B1LR = prepared.project(x_BLD, rotation)
        latent_B1SC, rope_B1SR = attention.remember(cache, latent_B1LC, rope_B1LR)
        if attention.reads_latents(query_BHLX, latent_B1SC, rope_B1SR, mask):
            latents = latent_B1SC.squeeze(1), rope_B1SR.squeeze(1)
            out_BLD: Tensor | None = prepared.finish(x_BLD, query_BHLX, latents, mask=mask, scaling=attention.scaling)
            if out_BLD is not None:
                return out_BLD
        attended_BLD, _ = attention.attend((query_BHLX, latent_B1SC, rope_B1SR), mask, cache)
        x_BLD = x_BLD + attended_BLD
        fed: Tensor = x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
        return fed


class HubMoeMtpLayer(HubMoeDecoderLayer):
    """One multi-token-prediction depth (arXiv:2412.19437 section 2.2), its weights named as DeepSeek names them.

    Embedding and head are the main model's. `shared_head.norm` ends the layer, and the normed state goes on to the next
    depth, as in transformers' `MtpModel`.
    """

    def __init__(self, config: HubMoeConfig, depth: int) -> None:
        # the layer index is the place in the MTP cache, which counts depths from 0
        super().__init__(config, depth, has_experts=True)
        self.enorm = HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": HubMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)})

    def forward(  # type: ignore[override]  # two inputs
        self, inputs_embeds: Tensor, previous_hidden_state: Tensor, **kwargs: Any
    ) -> Tensor:
        """Hidden states of shape (B, L, D) from the next tokens' embeddings and the states one depth below."""
        both = torch.cat([self.enorm(inputs_embeds), self.hnorm(previous_hidden_state)], dim=-1)
        hidden: Tensor = self.shared_head["norm"](super().forward(linear(self.eh_proj, both), **kwargs))
        return hidden


class PreparedSteps:
    """The compiled steps of a layer, and how to tell that its modules and weights are still those.

    Asking the modules of a layer what they are takes as long as the arithmetic of some of them. So that is done once;
    after that a step asks whether each is the same object without hooks, and whether each weight lies where it did.
    """

    def __init__(self, layer: HubMoeDecoderLayer, steps: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        weights = attention.kv_b_proj.weight, attention.o_proj.weight, norms[1]
        self._steps, self._dtype, self._settings = steps, attention.o_proj.weight.dtype, mlp.settings()
        self.project = steps.prepare_projections(attention.projections()._replace(x_norm=norms[0]))
        self.finish = steps.prepare_layer(decoding.LayerWeights(*weights, **mlp.layer_weights()))
        self._inner = [module for module in layer.modules() if module is not layer]
        self._children = [(each._modules, tuple(each._modules.items())) for each in (layer, *self._inner)]
        self._tensors = [
            (own, name, type(tensor), tensor.dtype, tensor.data_ptr())
            for module in self._inner
            for own in (module._parameters, module._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]

    def is_good(self, layer: HubMoeDecoderLayer, x: Tensor, steps: Any) -> bool:
        """Whether compiled steps still compute what calling the layer does, for rows like `x`."""
        if self._steps is not steps or x.dtype is not self._dtype or all_modules._has_any_global_hook():
            return False
        for own, children in self._children:
            for name, child in children:
                if own.get(name) is not child:
                    return False
        for module in self._inner:
            hooks = module._forward_hooks or module._forward_pre_hooks
            if hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__:
                return False
        for tensors, name, kind, dtype, address in self._tensors:
            tensor = tensors.get(name)
            if type(tensor) is not kind or tensor.dtype is not dtype or tensor.data_ptr() != address:
                return False
        return bool(self._settings == layer.mlp.settings())


_PREPARED: WeakKeyDictionary[nn.Module, PreparedSteps] = (
    WeakKeyDictionary()
)  # not in the layer, which is copied and saved


def prepare_layers(
    layers: Iterable[nn.Module], x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | None
) -> list[PreparedSteps] | None:
    """What `decode` of each layer needs, asked for all at once; None where one of them has to be called."""
    steps = None if cache is None or not _can_rotate(rotation) else find_steps(x)
    if steps is None:
        return None
    prepared = []
    for layer in layers:
        one = _prepare(layer, x, steps) if type(layer) is HubMoeDecoderLayer and is_untouched(layer) else None
        if one is None:
            return None
        prepared.append(one)
    return prepared


def _can_rotate(rotation: tuple[Tensor, Tensor]) -> bool:
    return rotation[0].dtype in (torch.float32, torch.bfloat16)


def _prepare(layer: HubMoeDecoderLayer, x: Tensor, steps: Any) -> PreparedSteps | None:
    """The compiled steps of `layer` for rows like `x`; None where its modules have to be called."""
    prepared = _PREPARED.get(layer)
    if prepared is None or not prepared.is_good(layer, x, steps):
        if find_steps(x, layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp) is None:
            _PREPARED.pop(layer, None)
            return None
        prepared = _PREPARED[layer] = PreparedSteps(layer, steps)
    return prepared
