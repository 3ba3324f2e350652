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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
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
    from hub_moe.experts import decoding as decoding
except ImportError:
    decoding = None  # type: ignore[assignment]

_OUR_EXPERTS = "hub_moe"  # as hub_moe.experts registers them
_STEPS_INTERFACE = 2
_ROUTER_SETTINGS = (
    *("scoring_func", "topk_method", "num_experts_per_tok", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor"),
)


def settings_of(config: Any) -> tuple[Any, ...]:
    """What a config says about how a layer computes, beside its sizes."""
    said = vars(config)  # plain reads take ten times as long, and this is asked at every step
    implementations = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
    # a module's own config may lack what that module does not ask for
    return *implementations, said.get("rope_interleave"), *[said.get(name) for name in _ROUTER_SETTINGS]


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
        return is_plain(module, x) and module.weight.is_contiguous() and nn.Linear.forward is FORWARDS[nn.Linear]
    if not is_untouched(module) or type(module).forward is not FORWARDS.get(type(module)):
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
            and "_apply_gate" not in vars(module)
            and HubMoeExperts._apply_gate is _GATE
            and all(is_like(stack, x) and stack.is_contiguous() for stack in stacks)
        )
    if type(module) is HubMoeRouter:
        bias = module.e_score_correction_bias
        is_plain_bias = bias is None or (
            type(bias) is Tensor and bias.dtype in (torch.float32, torch.bfloat16) and bias.is_contiguous()
        )
        return is_plain_bias and is_like(module.weight, x) and module.weight.is_contiguous()
    if type(module) is HubMoeMoE:
        parts = (module.gate, module.experts, module.shared_experts)
        return all(part is None or _is_known(part, x) for part in parts)
    if type(module) is HubMoeAttention:
        return all(part is None or _is_known(part, x) for part in module._modules.values())
    if type(module) not in (DeepseekV3RMSNorm, HubMoeRMSNorm):
        return False
    weight: Any = module.weight
    return is_like(weight, x) and bool(weight.is_contiguous())


def _is_silu(activation: Any) -> bool:
    is_own = type(activation) is SiLUActivation and SiLUActivation.forward is FORWARDS[SiLUActivation]
    return is_own and is_untouched(activation)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, a product with one weight; for few rows in one compiled call, else as `multiply`."""
    steps = find_steps(x, module)
    out: Tensor = multiply(module, x) if steps is None else steps.linear(x, module.weight)
    return out


def norm_of(module: Any) -> Any:
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
            normed: Tensor = steps.rms_norm(hidden_states, norm_of(self))
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

    def deciding(self) -> tuple[tuple[nn.Module, str], ...]:
        """Modules and names of their attributes, beside weights and inner modules, that decide on what is computed."""
        return ()

    def layer_weights(self) -> dict[str, Any]:
        """Fields of `LayerWeights` of hub_moe.experts.decoding."""
        return {"shared": self.weights()}


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

    def can_route(self) -> bool:
        """Whether bias and config fit the number of experts; if not, `route_tokens` says what is wrong."""
        num_experts, config, bias = self.weight.shape[0], self.config, self.e_score_correction_bias
        groups, kept = config.n_group or 1, config.topk_group or 1
        has_bias = config.topk_method == "noaux_tc"
        if has_bias and (bias is None or bias.shape != (num_experts,)):
            return False
        is_whole = num_experts % groups == 0 and 1 <= kept <= groups
        is_ranked = kept == groups or num_experts // groups >= (2 if has_bias else 1)
        return is_whole and is_ranked and 1 <= config.num_experts_per_tok <= num_experts


class HubMoeExperts(DeepseekV3Experts):
    """Routed experts as two fused parameters, run by whichever experts implementation the config names."""


_GATE = HubMoeExperts._apply_gate  # that compiled steps compute


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

    def deciding(self) -> tuple[tuple[nn.Module, str], ...]:
        """As of `HubMoeMLP`."""
        of_experts = [(self.experts, name) for name in ("config", "_is_expert_parallel", "_apply_gate")]
        return (self.gate, "config"), *of_experts

    def layer_weights(self) -> dict[str, Any]:
        """Fields of `LayerWeights` of hub_moe.experts.decoding."""
        weight, bias, config = self.gate.weight, self.gate.e_score_correction_bias, vars(self.gate.config)
        return {
            "shared": None if self.shared_experts is None else self.shared_experts.weights(),
            "router": decoding.Router(weight, bias, *[config[name] for name in _ROUTER_SETTINGS]),
            "experts": (self.experts.gate_up_proj, self.experts.down_proj),
        }


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
        """Outputs (B, L, D) and, from some implementations, the attention weights."""
        query, latent, k_rot = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            latent, k_rot = self.remember(past_key_values, latent, k_rot)
        return self.attend((query, latent, k_rot), attention_mask, past_key_values, **kwargs)

    def remember(self, cache: Cache, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Put new tokens' latents and rotated keys into the cache; returns those of all tokens."""
        give_room(cache, self.layer_idx)
        kept: tuple[Tensor, Tensor] = cache.update(latent, k_rot, self.layer_idx)
        return kept

    def attend(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` returns, from queries and all tokens' latents and rotated keys, laid out as by `_project`."""
        query, latent, k_rot = projected
        batch_size, seq_length = query.shape[0], query.shape[2]
        if past_key_values is not None and should_absorb(self, query, latent, attention_mask):
            are_rows = latent.stride(-1) == k_rot.stride(-1) == 1
            output, weights = attend_to_latents(
                query,
                LatentCache(latent.squeeze(1), k_rot.squeeze(1)),
                self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)),
                mask=attention_mask,
                scaling=self.scaling,
                needs_weights=self.config._attn_implementation == "eager",
                steps=find_steps(query[:, 0], self.kv_b_proj) if are_rows else None,
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

    def projections(self) -> Any:
        """The weights of `_project` as compiled steps take them."""
        q_a, q_norm, q_b = self.q_proj, self.q_a_layernorm, self.q_b_proj
        return decoding.Projections(
            self.q_a_proj.weight if q_a is None else q_a.weight,
            q_norm and norm_of(q_norm),
            q_b and q_b.weight,
            self.kv_a_proj_with_mqa.weight,
            norm_of(self.kv_a_layernorm),
            (self.qk_nope_head_dim, self.qk_rope_head_dim),
            self.config.rope_interleave,
        )

    def _project(self, hidden_BLD: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, N + R), latents (B, 1, L, C) and keys (B, 1, L, R), the rotary parts rotated."""
        with_latent = (self.q_a_proj, self.q_a_layernorm, self.q_b_proj)
        for_queries = (self.q_proj,) if self.q_lora_rank is None else with_latent
        steps = find_steps(hidden_BLD, *for_queries, self.kv_a_proj_with_mqa, self.kv_a_layernorm)
        if steps is not None and position_embeddings[0].dtype in (torch.float32, torch.bfloat16):
            query, latent, k_rot = steps.project(hidden_BLD, self.projections(), position_embeddings)
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


# of classes for whose modules compiled steps may stand; with another forward they are called
FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        *(nn.Linear, SiLUActivation, DeepseekV3RMSNorm, HubMoeRMSNorm),
        *(HubMoeMLP, HubMoeRouter, HubMoeExperts, HubMoeMoE, HubMoeAttention),
    )
}


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
