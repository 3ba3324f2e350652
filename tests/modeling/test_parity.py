"""A native checkpoint gives the same logits, loss and gradients in HubMoe as in the stock class."""

import subprocess
import sys

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from hub_moe.modeling import HubMoeForCausalLM
from tests.modeling.stock_models import SHAPE, VARIANTS, save_stock


def _batch():
    tokens = torch.randint(2, 128, (3, 17))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _run(model, batch):
    model.train()
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_loss_and_gradients_equal_the_stock_class(variant, tmp_path):
    stock = save_stock(variant, tmp_path).from_pretrained(tmp_path)
    ours = HubMoeForCausalLM.from_pretrained(tmp_path)
    batch = _batch()
    expected, expected_gradients = _run(stock, batch)
    actual, gradients = _run(ours, batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_logits_equal_the_stock_class_within_one_rounding(variant, tmp_path):
    stock = save_stock(variant, tmp_path, dtype=torch.bfloat16).from_pretrained(tmp_path)
    stock.set_experts_implementation("hub_moe")  # ours by default: grouped_mm rounds between products
    ours = HubMoeForCausalLM.from_pretrained(tmp_path)
    assert ours.dtype == stock.dtype == torch.bfloat16
    batch = _batch()
    with torch.no_grad():
        expected, actual = stock(**batch), ours(**batch)
    one_rounding = 2.0**-8
    torch.testing.assert_close(actual.logits, expected.logits, rtol=one_rounding, atol=one_rounding * 0.01)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=one_rounding, atol=0)


@pytest.mark.parametrize("variant", ["v2_lite", "v3"])
def test_sharded_checkpoint_equals_the_whole_one(variant, tmp_path):
    save_stock(variant, tmp_path / "whole")
    save_stock(variant, tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    whole = HubMoeForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    shards = HubMoeForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_kimi_k2_config_loads_as_deepseek_v3_does(tmp_path):
    save_stock("moonlight", tmp_path)
    config_file = tmp_path / "config.json"
    expected = HubMoeForCausalLM.from_pretrained(tmp_path).config.to_dict()
    text = config_file.read_text().replace('"model_type": "deepseek_v3"', '"model_type": "kimi_k2"')
    config_file.write_text(text)
    assert HubMoeForCausalLM.from_pretrained(tmp_path).config.to_dict() == expected


def test_v2_weights_that_are_normalised_are_not_scaled_as_in_deepseeks_code(tmp_path):
    """The stock class ignores norm_topk_prob; DeepSeek's own gate divides by the sum and then does not scale."""
    config = DeepseekV2Config(
        **{**SHAPE, "topk_method": "greedy", "norm_topk_prob": True, "routed_scaling_factor": 16.0}
    )
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    router = HubMoeForCausalLM.from_pretrained(tmp_path).model.layers[1].mlp.gate
    hidden = torch.randn(5, 32)
    logits, weights, experts = router(hidden)
    best = torch.softmax(logits, dim=-1).topk(2, dim=-1)
    assert torch.equal(experts.sort().values, best.indices.sort().values)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5))
    expected = best.values / best.values.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.sort(descending=True).values, expected)


def test_default_experts_implementation_is_hub_moe_and_the_stock_classes_keep_theirs_in_a_fresh_process():
    code = """
from hub_moe.modeling import DeepseekConfig, DeepseekForCausalLM, HubMoeConfig, HubMoeForCausalLM
shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8)
ours = HubMoeForCausalLM(HubMoeConfig(**shape)).config._experts_implementation
first = DeepseekForCausalLM(DeepseekConfig(**shape)).config._experts_implementation
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
print(ours, first, DeepseekV3ForCausalLM(DeepseekV3Config(**shape)).config._experts_implementation)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, first, stock = result.stdout.split()
    assert (ours, first, stock) == ("hub_moe", "hub_moe", "grouped_mm")
