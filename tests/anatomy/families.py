"""A tiny config of every family of Mixture-of-Experts models that the tests of `anatomy` build."""

from transformers import AutoConfig

import hub_moe.modeling  # noqa: F401  (registers hub_moe and deepseek)

_ANY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}

# model type -> what makes it tiny
FAMILIES = {
    "hub_moe": {**_LATENT, **_DEEPSEEK},
    "deepseek": {"moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "deepseek_v2": {**_LATENT, **_DEEPSEEK},
    "deepseek_v3": {**_LATENT, **_DEEPSEEK, "q_lora_rank": 24},
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 8},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 8, "head_dim": 16},
    "olmoe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 12},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 24},
    "qwen3_next": {
        **_LINEAR,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 16,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}


def tiny_config(model_type, **changes):
    """The config of `FAMILIES[model_type]` with `changes` applied."""
    return AutoConfig.for_model(model_type, **{**_ANY, **FAMILIES[model_type], **changes})
