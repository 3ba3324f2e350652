"""DeepSeekMoE v1 against its mathematics written out (arXiv:2401.06066 section 3), as no library class exists."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hub_moe.modeling import DeepseekConfig, DeepseekForCausalLM

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "aux_loss_alpha": 0.0,
}


def _swiglu(x, tensors, prefix):
    gate, up, down = (tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts_by_hand(x, tensors, prefix, config):
    """Every token through its best experts, one after the other, plus the shared experts."""
    scores = torch.softmax(x @ tensors[f"{prefix}.gate.weight"].T, dim=-1)
    output = torch.zeros_like(x)
    for token in range(x.shape[0]):
        best = scores[token].topk(config["num_experts_per_tok"])
        weights = best.values / best.values.sum() if config.get("norm_topk_prob") else best.values
        for weight, expert in zip(weights, best.indices.tolist(), strict=True):
            output[token] += weight * _swiglu(x[token], tensors, f"{prefix}.experts.{expert}")
    return output + _swiglu(x, tensors, f"{prefix}.shared_experts")


def _rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def _rotate(x, positions):
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angle = positions[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def _attention_by_hand(x, tensors, prefix, config):
    length, width = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (
        (x @ tensors[f"{prefix}.{name}_proj.weight"].T).view(length, -1, width // heads).transpose(0, 1)
        for name in "qkv"
    )
    positions = torch.arange(length)
    q, k = _rotate(q, positions), _rotate(k, positions)
    k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
    scores = (q @ k.transpose(1, 2)) / (width // heads) ** 0.5 + torch.ones(length, length).tril().log()
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(length, width) @ tensors[f"{prefix}.o_proj.weight"].T


def _forward_by_hand(tokens, tensors, config):
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = _rms_norm(x, tensors[f"{prefix}.input_layernorm.weight"])
        x = x + _attention_by_hand(normed, tensors, f"{prefix}.self_attn", config)
        normed = _rms_norm(x, tensors[f"{prefix}.post_attention_layernorm.weight"])
        if layer < config["first_k_dense_replace"]:
            x = x + _swiglu(normed, tensors, f"{prefix}.mlp")
        else:
            x = x + _experts_by_hand(normed, tensors, f"{prefix}.mlp", config)
    return _rms_norm(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_logits_equal_the_mathematics_written_out(norm_topk_prob, tmp_path):
    config = {**SHAPE, "norm_topk_prob": norm_topk_prob}
    DeepseekForCausalLM(DeepseekConfig(**config)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(3, 96, (13,))
    expected = _forward_by_hand(tokens, load_file(tmp_path / "model.safetensors"), config)
    torch.testing.assert_close(model(tokens[None]).logits[0], expected, rtol=1e-4, atol=1e-5)


def _write_as_released(folder, changes):
    """The config.json that DeepSeek published for deepseek-moe-16b-base, with our small sizes."""
    released = {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "deepseek",
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps({**released, **SHAPE, **changes}))


def test_released_layout_loads_natively_though_its_own_code_is_broken(tmp_path):
    DeepseekForCausalLM(DeepseekConfig(**SHAPE)).save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    (tmp_path / "modeling_deepseek.py").write_text(
        "from transformers.utils.import_utils import is_torch_fx_available\n"
    )
    (tmp_path / "configuration_deepseek.py").write_text("raise ImportError\n")
    _write_as_released(tmp_path, {})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is DeepseekForCausalLM
    assert model.config._experts_implementation == "hub_moe"
    tokens = torch.randint(3, 96, (9,))
    expected = _forward_by_hand(tokens, load_file(tmp_path / "model.safetensors"), SHAPE)
    torch.testing.assert_close(model(tokens[None]).logits[0], expected, rtol=1e-4, atol=1e-5)


def test_names_on_disk_are_per_expert(tmp_path):
    DeepseekForCausalLM(DeepseekConfig(**SHAPE)).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in names
    assert not any(".experts." in name for name in names if ".layers.0." in name)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DeepseekConfig)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "hub_moe"])
def test_every_experts_implementation_gives_the_same_logits_and_gradients(implementation):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**{**SHAPE, "aux_loss_alpha": 0.01})).train()
    tokens = torch.randint(3, 96, (2, 9))
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        model.zero_grad()
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        results.append([outputs.logits, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert outputs.aux_loss is not None


def test_greedy_generation_with_cache_equals_without():
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**SHAPE)).eval()
    prompt = torch.randint(3, 96, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
