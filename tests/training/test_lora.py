"""Adapters: what a person named got one, or they are told what did not."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_moe.errors import ConfigError
from hub_moe.training.method_config import LoraMethod

from ..anatomy.families import tiny_config

pytest.importorskip("peft")
from hub_moe.training.lora import add_adapters, find_adapters

MLP = ("gate_proj", "up_proj", "down_proj")


def _adapt(model_type, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    return add_adapters(model, LoraMethod(r=2, **settings))


@pytest.mark.parametrize("targets", [MLP, "all-linear"])
def test_shared_experts_and_dense_layers_that_peft_leaves_out_on_deepseek_are_told(targets):
    with pytest.raises(
        ConfigError, match=r"names 9 modules .* such as model\.layers\.0\.mlp\.gate_proj; include"
    ) as told:
        _adapt("deepseek_v3", target_modules=targets)
    assert '"mlp.shared_experts.up_proj.weight"' in str(told.value)


def test_the_hint_of_the_error_includes_what_was_left_out():
    parts = [f"mlp.{shared}{name}.weight" for shared in ("", "shared_experts.") for name in MLP]
    model = _adapt("deepseek_v3", target_modules=MLP, target_parameters=tuple(parts))
    places = find_adapters(model)
    assert {f"model.layers.2.{part}" for part in parts[3:]} < set(places)
    assert "model.layers.1.mlp.experts.gate_up_proj" in places
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def test_what_is_left_out_may_be_accepted():
    accepted = ("shared_experts", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    places = find_adapters(_adapt("deepseek_v3", target_modules=MLP, accept_left_out=accepted))
    assert all(".mlp.experts." in place for place in places)


def test_routed_experts_that_peft_leaves_out_on_hub_moe_are_told():
    with pytest.raises(ConfigError, match=r"names 4 modules .* such as model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        _adapt("hub_moe", target_modules=MLP)


def test_a_router_that_nobody_named_is_told_and_one_that_was_named_is_trained():
    with pytest.raises(ConfigError, match=r"would train the router model\.layers\.0\.mlp\.gate, which was not named"):
        _adapt("qwen3_moe", target_modules="all-linear")
    places = find_adapters(_adapt("qwen3_moe", target_modules="all-linear", target_parameters=("mlp.gate.weight",)))
    assert "model.layers.0.mlp.gate.weight" in places


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "mixtral", "gpt_oss", "hub_moe"])
def test_routed_experts_of_every_layer_get_adapters(model_type):
    places = find_adapters(_adapt(model_type, routed_experts=True))
    first = 1 if model_type in ("deepseek_v3", "hub_moe") else 0
    stacks = {f"model.layers.{i}.mlp.experts.{name}" for i in range(first, 3) for name in ("gate_up_proj", "down_proj")}
    assert set(places) == stacks


def test_a_name_that_matches_nothing_is_told_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"target_modules names 'q_porj', .* self_attn\.q_proj"):
        _adapt("hub_moe", target_modules=("q_porj",))
    with pytest.raises(ConfigError, match="target_parameters names 'mlp.experts.w1'"):
        _adapt("hub_moe", target_parameters=("mlp.experts.w1",))
