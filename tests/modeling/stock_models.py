"""Tiny stock models, one for each routing variant of the DeepSeek line, to compare ours with."""

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}

# name -> (model class, config class, what differs from SHAPE)
VARIANTS = {
    "v2_lite": (DeepseekV2ForCausalLM, DeepseekV2Config, {"topk_method": "greedy", "rope_parameters": YARN}),
    "v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {"topk_method": "group_limited_greedy", "q_lora_rank": 24, "routed_scaling_factor": 16.0},
    ),
    "v2_biases": (DeepseekV2ForCausalLM, DeepseekV2Config, {"attention_bias": True, "mlp_bias": True, "n_group": None}),
    "v3": (DeepseekV3ForCausalLM, DeepseekV3Config, {"q_lora_rank": 24, "rope_parameters": YARN}),
    "v3_raw_weights": (DeepseekV3ForCausalLM, DeepseekV3Config, {"norm_topk_prob": False, "attention_bias": True}),
    "v3_tied": (DeepseekV3ForCausalLM, DeepseekV3Config, {"tie_word_embeddings": True}),
    "v3_half_rotation": (DeepseekV3ForCausalLM, DeepseekV3Config, {"rope_interleave": False}),
    "moonlight": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5},
    ),
    "one_expert": (DeepseekV3ForCausalLM, DeepseekV3Config, {"num_experts_per_tok": 1, "first_k_dense_replace": 0}),
}


def save_stock(variant, folder, *, dtype=torch.float32, **save_options):
    """Save a seeded stock model whose balancing bias matters, and return its class."""
    model_class, config_class, changes = VARIANTS[variant]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **changes}))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("bias"):
                tensor.normal_(std=0.02)
            elif "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, **save_options)
    return model_class
