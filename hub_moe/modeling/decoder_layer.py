"""The layers of a HubMoe: attention and what feeds forward, as modules, or for a few new tokens in two compiled calls.

Shape letters: B batch, L sequence, D hidden, H heads, X head, S cached tokens, C latent, R rotary part.
"""

from collections.abc import Iterable
from itertools import chain
from operator import is_not
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from .absorbed_attention import costs_less, hides_plainly
from .configuration_hub_moe import HubMoeConfig
from .half_products import has_hooks, is_untouched
from .layers import (
    HubMoeAttention,
    HubMoeMLP,
    HubMoeMoE,
    HubMoeRMSNorm,
    decoding,
    find_steps,
    linear,
    norm_of,
    settings_of,
)


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
            prepared = None if steps is None else _prepare(self, hidden_states, steps, {})
            if prepared is not None and _can_rotate(position_embeddings):
                kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
                return self.decode(
                    prepared, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
                )
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
        **kwargs: Any,
    ) -> Tensor:
        """`forward` by compiled steps: one in front of the cache, and one behind where attention reads the latents."""
        attention = self.self_attn
        query_BHLX, latent_B1LC, rope_B1LR = prepared.project(x_BLD, rotation)
        latent_B1SC, rope_B1SR = attention.remember(cache, latent_B1LC, rope_B1LR)
        if prepared.reads_latents(attention, query_BHLX, (latent_B1SC, rope_B1SR), mask):
            latents = latent_B1SC.squeeze(1), rope_B1SR.squeeze(1)
            out_BLD: Tensor | None = prepared.finish(x_BLD, query_BHLX, latents, mask=mask, scaling=attention.scaling)
            if out_BLD is not None:
                return out_BLD
        attended_BLD, _ = attention.attend((query_BHLX, latent_B1SC, rope_B1SR), mask, cache, **kwargs)
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
        self._steps, self._dtype = steps, attention.o_proj.weight.dtype
        self._width = attention.o_proj.weight.shape[0]
        self.project = steps.prepare_projections(attention.projections()._replace(x_norm=norms[0]))
        self.finish = steps.prepare_layer(decoding.LayerWeights(*weights, **mlp.layer_weights()))
        inner = [each for each in layer.modules() if each is not layer]
        self._inner = [(each, type(each), vars(each), each._parameters, each._buffers, each._modules) for each in inner]
        kinds = dict.fromkeys(kind for _, kind, *_ in self._inner)
        called = [(kind, name) for kind in kinds for name in ("forward", "_apply_gate") if hasattr(kind, name)]
        self._methods = [(kind, name, getattr(kind, name)) for kind, name in called]
        modules = (layer, *[module for module, *_ in self._inner])
        self._children = [(each._modules, dict(each._modules)) for each in modules if each._modules]
        self._modules = [child for own, _ in self._children for child in own.values()]
        tensors = [own for each in modules[1:] for own in (each._parameters, each._buffers)]
        self._tensors = [(own, [(name, *_place_of(tensor)) for name, tensor in own.items()]) for own in tensors if own]
        self._empty = [own for own in (*tensors, *[each._modules for each in modules]) if not own]
        self._attributes = [(own, name, own.get(name)) for own, name in _deciding(layer)]
        configs = {id(said): said for _, name, said in self._attributes if name == "config"}
        self._settings = [(config, settings_of(config)) for config in configs.values()]

    def reads_latents(
        self, attention: HubMoeAttention, query_BHLX: Tensor, cached: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> bool:
        """Whether `finish` attends as `HubMoeAttention.attend` would: what of `should_absorb` is not known already."""
        latent_B1SC, rope_B1SR = cached
        new = query_BHLX.shape[2]
        if not (new == 1 if mask is None else hides_plainly(mask)) or (
            attention.training and attention.attention_dropout
        ):
            return False
        are_rows = latent_B1SC.stride(-1) == rope_B1SR.stride(-1) == 1 and latent_B1SC.dtype is self._dtype
        return are_rows and costs_less(attention, new, latent_B1SC.shape[2])

    def is_good(self, layer: HubMoeDecoderLayer, x: Tensor, steps: Any, said: dict[int, Any]) -> bool:
        """Whether compiled steps still compute what calling the layer does, for rows like `x`.

        Args:
            layer: The one of these steps.
            x: Rows.
            steps: Those in use for such rows.
            said: By the id of a config, which layers share, its `settings_of` at this moment; filled here.
        """
        if self._steps is not steps or x.dtype is not self._dtype or all_modules._has_any_global_hook():
            return False
        is_wide = x.dim() == 3 and x.shape[-1] == self._width
        return is_wide and self._are_same_settings(said) and self._are_same_modules() and self._are_same_weights()

    def _are_same_settings(self, said: dict[int, Any]) -> bool:
        for own, name, value in self._attributes:
            if own.get(name) is not value:
                return False
        for config, settings in self._settings:
            if id(config) not in said:
                said[id(config)] = settings_of(config)
            if said[id(config)] != settings:
                return False
        return True

    def _are_same_modules(self) -> bool:
        for own, children in self._children:
            if own != children:
                return False
        children_now = chain.from_iterable([own.values() for own, _ in self._children])
        if any(map(is_not, children_now, self._modules)):  # a module may say that it equals another
            return False
        for module, kind, own, parameters, buffers, children in self._inner:
            if type(module) is not kind or module.__dict__ is not own or has_hooks(module) or "forward" in own:
                return False
            if (
                own["_parameters"] is not parameters
                or own["_buffers"] is not buffers
                or own["_modules"] is not children
            ):
                return False
        return all(getattr(kind, name) is method for kind, name, method in self._methods)

    def _are_same_weights(self) -> bool:
        for own, places in self._tensors:
            if len(own) != len(places):
                return False
            for name, kind, address, dtype, shape in places:
                tensor = own.get(name)
                if type(tensor) is not kind:
                    return False
                if tensor is not None and (
                    tensor.data_ptr() != address
                    or tensor.dtype is not dtype
                    or tensor.shape != shape
                    or not tensor.is_contiguous()
                ):
                    return False
        return not any(self._empty)


def _place_of(tensor: Tensor | None) -> tuple[Any, ...]:
    """What makes it another weight than the contiguous one it was: its kind, where it lies, and how."""
    if tensor is None:
        return type(None), None, None, None
    return type(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape


def _deciding(layer: HubMoeDecoderLayer) -> list[tuple[dict[str, Any], str]]:
    """Attributes, by the place where they are, that decide on the arithmetic beside weights and inner modules."""
    attention = layer.self_attn
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.kv_a_layernorm, attention.q_a_layernorm)
    of_norms = [(norm, "variance_epsilon") for norm in norms if norm is not None]
    return [(vars(module), name) for module, name in (*of_norms, (attention, "config"), *layer.mlp.deciding())]


def _fits(layer: HubMoeDecoderLayer, width: int) -> bool:
    """Whether the layer attends as compiled steps do, takes states of `width`, and its weights fit each other."""
    attention, mlp = layer.self_attn, layer.mlp
    if attention.config._attn_implementation != "sdpa":  # what others give or take is theirs to say
        return False
    heads, value_size = attention.num_heads, attention.v_head_dim
    sizes = {"latent": attention.kv_lora_rank, "rope": attention.qk_rope_head_dim, "query": attention.qk_head_dim}
    expected = [
        (layer.input_layernorm.weight, (width,)),
        (layer.post_attention_layernorm.weight, (width,)),
        (attention.kv_a_layernorm.weight, (sizes["latent"],)),
        (attention.kv_a_proj_with_mqa.weight, (sizes["latent"] + sizes["rope"], width)),
        (attention.kv_b_proj.weight, (heads * (attention.qk_nope_head_dim + value_size), sizes["latent"])),
        (attention.o_proj.weight, (width, heads * value_size)),
    ]
    if attention.q_lora_rank is None:
        expected.append((attention.q_proj.weight, (heads * sizes["query"], width)))
    else:
        rank = attention.q_a_layernorm.weight.shape[0]
        expected += [
            (attention.q_a_proj.weight, (rank, width)),
            (attention.q_b_proj.weight, (heads * sizes["query"], rank)),
        ]
    block = mlp if isinstance(mlp, HubMoeMLP) else mlp.shared_experts
    if block is not None:
        inner = block.gate_proj.weight.shape[0]
        expected += [(each.weight, (inner, width)) for each in (block.gate_proj, block.up_proj)]
        expected.append((block.down_proj.weight, (width, inner)))
    if isinstance(mlp, HubMoeMoE):
        if not mlp.gate.can_route():
            return False
        num_experts, inner = mlp.gate.weight.shape[0], mlp.experts.down_proj.shape[2]
        expected += [
            (mlp.gate.weight, (num_experts, width)),
            (mlp.experts.gate_up_proj, (num_experts, 2 * inner, width)),
            (mlp.experts.down_proj, (num_experts, width, inner)),
        ]
    return all(weight.shape == shape for weight, shape in expected)


# not kept in the layers, which are copied and saved
_PREPARED: WeakKeyDictionary[nn.Module, PreparedSteps] = WeakKeyDictionary()
_FORWARD = HubMoeDecoderLayer.forward


def prepare_layers(
    layers: Iterable[Any], x: Tensor, rotation: tuple[Tensor, Tensor], cache: Cache | None
) -> list[PreparedSteps] | None:
    """What `decode` of each layer needs, asked for all at once; None where one of them has to be called."""
    steps = None if cache is None or not _can_rotate(rotation) else find_steps(x)
    if steps is None:
        return None
    prepared = []
    said: dict[int, Any] = {}
    for layer in layers:
        is_own = type(layer) is HubMoeDecoderLayer and type(layer).forward is _FORWARD and is_untouched(layer)
        one = _prepare(layer, x, steps, said) if is_own else None
        if one is None:
            return None
        prepared.append(one)
    return prepared


def _can_rotate(rotation: tuple[Tensor, Tensor]) -> bool:
    return rotation[0].dtype in (torch.float32, torch.bfloat16)


def _prepare(layer: HubMoeDecoderLayer, x: Tensor, steps: Any, said: dict[int, Any]) -> PreparedSteps | None:
    """The steps of `layer` for rows like `x`; None where its modules have to be called; `said` as in `is_good`."""
    prepared = _PREPARED.get(layer)
    if prepared is None or not prepared.is_good(layer, x, steps, said):
        parts = (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp)
        if x.dim() != 3 or find_steps(x, *parts) is None or not _fits(layer, x.shape[-1]):
            _PREPARED.pop(layer, None)
            return None
        prepared = _PREPARED[layer] = PreparedSteps(layer, steps)
    return prepared
