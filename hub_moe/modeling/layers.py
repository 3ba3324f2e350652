"""The blocks of a HubMoe layer: what differs from transformers' deepseek_v3, and nothing else.

Shape letters: B batch, L sequence, T = B * L tokens, D hidden, E routed experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)

from .absorbed_attention import LatentCache, attend_to_latents, should_absorb
from .causal_attention import attend_to_past, suits_blocks
from .configuration_hub_moe import HubMoeConfig
from .half_products import is_like, is_plain, is_untouched, multiply
from .latent_cache import give_room
from .routing import route_tokens

try:  # beside a checkpoint this code also works where hub_moe is not installed
    from hub_moe.experts import decoding
except ImportError:
    decoding = None  # type: ignore[assignment]

_OUR_EXPERTS = "hub_moe"  # as hub_moe.experts registers them
_STEPS_INTERFACE = 1


def find_steps(x: Tensor, *modules: nn.Module) -> Any:
    """The compiled steps that may stand for `modules`, called with rows like `x`; None where these have to be called.

    They may where there are any (`find_steps` of hub_moe.experts.decoding) and every module is what its class says: a
    product with a plain weight, a norm, a block of such, without hooks, adapters, quantisation or sharding.
    """
    steps = None if decoding is None else decoding.find_steps(x, _STEPS_INTERFACE)
    return steps if steps is not None and all(_is_known(module, x) for module in modules) else None


def _is_known(module: nn.Module, x: Tensor) -> bool:
    """Whether compiled steps compute what calling `module` does."""
    if type(module) is nn.Linear:
        return is_plain(module, x) and module.weight.is_contiguous()
    if not is_untouched(module):
        return False
    if type(module) is HubMoeMLP:
        return _is_silu(module.act_fn) and all(
            _is_known(each, x) for each in (module.gate_proj, module.up_proj, module.down_proj)
        )
    if type(module) is HubMoeExperts:
        stacks = (module.gate_up_proj, module.down_proj)
        return (
            module.config._experts_implementation == _OUR_EXPERTS
            and _is_silu(module.act_fn)
            and not getattr(module, "_is_expert_parallel", False)
            and all(is_like(stack, x) and stack.is_contiguous() for stack in stacks)
        )
    return type(module) in (DeepseekV3RMSNorm, HubMoeRMSNorm) and is_like(module.weight, x)


def _is_silu(activation: Any) -> bool:
    return type(activation) is SiLUActivation and is_untouched(activation)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, a product with one weight; for few rows in one compiled call, else as `multiply`."""
    steps = find_steps(x, module)
    out: Tensor = multiply(module, x) if steps is None else steps.linear(x, module.weight)
    return out


def _norm(module: Any) -> Any:
    """A norm as compiled steps take it."""
    return decoding.Norm(module.weight, module.variance_epsilon)


class HubMoeRotaryEmbedding(DeepseekV3RotaryEmbedding):
    """Cosines and sines in the model's dtype, or in float32 where `rope_in_float32` says so."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.rope_in_float32:
            x = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = super().forward(x, position_ids)
        return cos, sin


class HubMoeRMSNorm(DeepseekV3RMSNorm):
    """RMS norm; for few rows in one compiled call, which rounds once."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        steps = find_steps(hidden_states, self)
        if steps is not None:
            normed: Tensor = steps.rms_norm(hidden_states, _norm(self))
            return normed
        normed = super().forward(hidden_states)
        return normed


class HubMoeMLP(DeepseekV2MLP):
    """SwiGLU block of dense layers and shared experts."""

    def forward(self, x: Tensor) -> Tensor:
        steps = find_steps(x, self)
        if steps is None:
            return multiply(self.down_proj, self.act_fn(multiply(self.gate_proj, x)) * multiply(self.up_proj, x))
        out: Tensor = steps.feed_forward(x, self.weights())
        return out

    def weights(self) -> Any:
        """As compiled steps take them."""
        return decoding.FeedForward(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class HubMoeRouter(nn.Module):
    """Scores tokens against experts, picks K of E and returns `(logits_TE, weight_TK, expert_TK)`, logits float32."""

    e_score_correction_bias: Tensor | None  # the balancing bias, float32; None where the choice does not use one

    def __init__(self, config: HubMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        has_bias = config.topk_method == "noaux_tc"
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts) if has_bias else None)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TD = hidden_states.view(-1, hidden_states.shape[-1])
        steps = find_steps(hidden_TD)
        if steps is not None and is_like(self.weight, hidden_TD) and self.weight.is_contiguous():
            logits_TE = steps.linear(hidden_TD, self.weight, torch.float32)
        else:
            logits_TE = nn.functional.linear(hidden_TD.float(), self.weight.float())
        weight_TK, expert_TK = route_tokens(logits_TE, self.e_score_correction_bias, self.config)
        return logits_TE, weight_TK, expert_TK


class HubMoeExperts(DeepseekV3Experts):
    """Routed experts as two fused parameters, run by whichever experts implementation the config names."""


class HubMoeMoE(DeepseekV3MoE):
    """Routed experts plus, where the config has any, shared experts."""

    def __init__(self, config: HubMoeConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.experts = HubMoeExperts(config)
        self.gate = HubMoeRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = HubMoeMLP(config, intermediate_size=width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.gate(hidden_states)
        hidden_TD = hidden_states.view(-1, hidden_states.shape[-1])
        steps = find_steps(hidden_states, self.experts, *([self.shared_experts] if self.shared_experts else []))
        if steps is not None:
            stacks = (self.experts.gate_up_proj, self.experts.down_proj)
            shared = self.shared_experts.weights() if self.shared_experts else None
            out: Tensor | None = steps.feed_forward(
                hidden_states, shared, decoding.Routed(*stacks, expert_TK, weight_TK)
            )
            if out is not None:
                return out
        routed: Tensor = self.experts(hidden_TD, expert_TK, weight_TK).view(*hidden_states.shape)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class HubMoeAttention(DeepseekV3Attention):
    """Multi-head latent attention whose rotation may run in float32 (`rope_in_float32`).

    Few new tokens over a long cache attend to the latents themselves (`attend_to_latents`); prompts and training expand
    them, as the stock class always does.
    """

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_size, seq_length = hidden_states.shape[:-1]
        query, latent, k_rot = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            give_room(past_key_values, self.layer_idx)
            latent, k_rot = past_key_values.update(latent, k_rot, self.layer_idx)
        if past_key_values is not None and should_absorb(self, query, latent, attention_mask):
            are_rows = latent.stride(-1) == k_rot.stride(-1) == 1
            output, weights = attend_to_latents(
                query,
                LatentCache(latent.squeeze(1), k_rot.squeeze(1)),
                self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)),
                mask=attention_mask,
                scaling=self.scaling,
                needs_weights=self.config._attn_implementation == "eager",
                steps=find_steps(hidden_states, self.kv_b_proj) if are_rows else None,
            )
            return linear(self.o_proj, output.reshape(batch_size, seq_length, -1)), weights

        key, value = self.expand_kv(latent, k_rot)
        if suits_blocks(self, query, key, attention_mask, kwargs):
            output = attend_to_past(query, key, value, scaling=self.scaling).transpose(1, 2)
            return multiply(self.o_proj, output.reshape(batch_size, seq_length, -1)), None
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return multiply(self.o_proj, output.reshape(batch_size, seq_length, -1).contiguous()), weights

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, H, S, N + R) and values (B, H, S, V) of latents (B, 1, S, C) and rotated keys (B, 1, S, R)."""
        both = multiply(self.kv_b_proj, kv_nope.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = both.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat((k_nope, k_rot.expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def _project(self, hidden_BLD: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, N + R), latents (B, 1, L, C) and keys (B, 1, L, R), the rotary parts rotated."""
        with_latent = (self.q_a_proj, self.q_a_layernorm, self.q_b_proj)
        for_queries = (self.q_proj,) if self.q_lora_rank is None else with_latent
        steps = find_steps(hidden_BLD, *for_queries, self.kv_a_proj_with_mqa, self.kv_a_layernorm)
        if steps is not None and position_embeddings[0].dtype in (torch.float32, torch.bfloat16):
            q_a, q_norm, q_b = for_queries if len(for_queries) == 3 else (*for_queries, None, None)
            weights = decoding.Projections(
                q_a.weight,
                q_norm and _norm(q_norm),
                q_b and q_b.weight,
                self.kv_a_proj_with_mqa.weight,
                _norm(self.kv_a_layernorm),
                (self.qk_nope_head_dim, self.qk_rope_head_dim),
                self.config.rope_interleave,
            )
            query, latent, k_rot = steps.project(hidden_BLD, weights, position_embeddings)
            return query, latent, k_rot

        batch_size, seq_length = hidden_BLD.shape[:-1]
        query = hidden_BLD
        for module in for_queries:
            query = multiply(module, query) if type(module) is nn.Linear else module(query)
        query = query.view(batch_size, seq_length, -1, self.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        both = multiply(self.kv_a_proj_with_mqa, hidden_BLD)
        latent, k_rot = both.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        # one "head" each, so that every cache class can hold them
        latent = self.kv_a_layernorm(latent).view(batch_size, 1, seq_length, self.kv_lora_rank)
        k_rot = k_rot.view(batch_size, 1, seq_length, self.qk_rope_head_dim)
        rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
        q_rot, k_rot = (part.to(query.dtype) for part in rotate(q_rot, k_rot, *position_embeddings))
        return torch.cat((q_pass, q_rot), dim=-1), latent, k_rot


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

    def forward(self, inputs_embeds: Tensor, previous_hidden_state: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states of shape (B, L, D) from the next tokens' embeddings and the states one depth below."""
        both = torch.cat([self.enorm(inputs_embeds), self.hnorm(previous_hidden_state)], dim=-1)
        hidden: Tensor = self.shared_head["norm"](super().forward(linear(self.eh_proj, both), **kwargs))
        return hidden


class DefaultExpertsMixin:
    """Chooses the experts implementation where none is asked for.

    That is `hub_moe`, or transformers' own default where hub_moe is not installed, as beside exported code.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for "@use_experts_implementation" in the text of the model's file; the decorator itself
        # sits on the parent of HubMoeExperts
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `transformers.PreTrainedModel.get_correct_experts_implementation`."""
        if requested_experts is None and _OUR_EXPERTS in ALL_EXPERTS_FUNCTIONS:
            requested_experts = _OUR_EXPERTS
        parent: Any = super()
        chosen: str = parent.get_correct_experts_implementation(requested_experts)
        return chosen
