import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, sort_parameters
from hub_moe.errors import UnsupportedModelError

from .families import FAMILIES, tiny_config

WITH_DENSE_FIRST_LAYER = {"hub_moe", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe"}
WITH_BALANCING_BIAS = {"hub_moe", "deepseek_v3", "glm4_moe"}
WITHOUT_SHARED_EXPERTS = {"qwen3_moe", "olmoe", "mixtral", "gpt_oss"}


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def build_on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_modules_found_are_those_that_run(model_type):
    model = build(tiny_config(model_type))
    layers = find_moe_layers(model)
    ran = set()
    for layer in layers:
        for part in (layer.router, layer.experts, layer.shared_experts):
            if part is not None:
                part.register_forward_hook(lambda module, *_: ran.add(module))
    model(torch.arange(7)[None])

    assert [layer.index for layer in layers] == ([1, 2] if model_type in WITH_DENSE_FIRST_LAYER else [0, 1, 2])
    assert {(layer.num_experts, layer.top_k, layer.is_mtp) for layer in layers} == {(8, 2, False)}
    assert all((layer.shared_experts is None) == (model_type in WITHOUT_SHARED_EXPERTS) for layer in layers)
    assert all({layer.router, layer.experts} <= ran for layer in layers)
    assert all(layer.shared_experts in ran for layer in layers if layer.shared_experts is not None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_zeroing_the_experts_found_leaves_only_the_shared_ones(model_type):
    model = build(tiny_config(model_type))
    layer = find_moe_layers(model)[-1]
    for parameter in layer.experts.parameters():
        torch.nn.init.zeros_(parameter)
    hidden = torch.randn(1, 5, 32)
    out = model.get_submodule(layer.name)(hidden)
    out = out[0] if isinstance(out, tuple) else out

    has_shared_inside = layer.shared_experts in set(model.get_submodule(layer.name).children())
    assert (out.abs().max() > 0) == has_shared_inside


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_has_one_kind_and_none_is_left_over(model_type):
    model = build_on_meta(tiny_config(model_type))
    parameters = sort_parameters(model, find_moe_layers(model))

    assert sum(p.size for p in parameters) == model.num_parameters()
    assert [p.name for p in parameters if p.kind == "other"] == []
    kinds = {p.kind for p in parameters}
    assert {"routed_experts", "router", "attention", "norms", "embeddings", "head"} <= kinds
    assert ("dense_mlp" in kinds) == (model_type in WITH_DENSE_FIRST_LAYER)
    assert ("shared_experts" in kinds) == (model_type not in WITHOUT_SHARED_EXPERTS)


def test_mtp_layers_are_marked_and_counted_apart():
    model = build_on_meta(tiny_config("hub_moe", num_mtp_layers=2))
    layers = find_moe_layers(model)
    parameters = sort_parameters(model, layers)

    assert [(layer.index, layer.is_mtp) for layer in layers] == [(1, False), (2, False), (3, True), (4, True)]
    assert {p.name.split(".")[2] for p in parameters if p.kind == "mtp"} == {"3", "4"}
    assert all(p.active_size == 0 for p in parameters if p.kind == "mtp")
    without = build_on_meta(tiny_config("hub_moe"))
    assert sum(p.size for p in parameters if p.kind != "mtp") == without.num_parameters()


def test_a_tied_head_is_stored_once_and_used():
    parameters = sort_of(tiny_config("hub_moe", tie_word_embeddings=True))
    [head] = [p for p in parameters if p.kind == "head"]

    assert (head.size, head.active_size) == (0, 128 * 32)


def sort_of(config):
    model = build_on_meta(config)
    return sort_parameters(model, find_moe_layers(model))


def test_the_gate_of_a_shared_expert_counts_with_it():
    kinds = {p.name: p.kind for p in sort_of(tiny_config("qwen2_moe"))}

    assert kinds["model.layers.0.mlp.shared_expert_gate.weight"] == "shared_experts"
    assert kinds["model.layers.0.mlp.gate.weight"] == "router"


def test_a_dense_model_is_an_error_that_names_its_type():
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=16, num_hidden_layers=1, vocab_size=16)
    with pytest.raises(UnsupportedModelError, match="'llama' has no routed experts"):
        find_moe_layers(build_on_meta(config))


@pytest.mark.parametrize("model_type", ["jetmoe", "longcat_flash"])
def test_experts_of_an_unknown_form_are_an_error_that_names_the_type(model_type):
    with pytest.raises(UnsupportedModelError, match=f"{model_type!r} keeps its experts in a form"):
        find_moe_layers(build_on_meta(AutoConfig.for_model(model_type)))


def test_a_config_without_top_k_is_an_error_that_names_the_field():
    model = build_on_meta(tiny_config("deepseek_v2", num_experts_per_tok=None))
    with pytest.raises(UnsupportedModelError, match="expected one of num_experts_per_tok"):
        find_moe_layers(model)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_balancing_bias_is_found_live_where_the_family_has_one(model_type):
    layers = find_moe_layers(build(tiny_config(model_type)))
    assert {layer.balancing_bias is not None for layer in layers} == {model_type in WITH_BALANCING_BIAS}
    if model_type in WITH_BALANCING_BIAS:
        layers[0].router.e_score_correction_bias = torch.nn.Buffer(torch.ones(8))
        assert layers[0].balancing_bias.tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [("minimax_m2", (256,)), ("afmoe", (64,)), ("ernie4_5_moe", (1, 64)), ("hy_v3", (192,))],
)
def test_a_balancing_bias_is_found_on_the_block_and_on_statics_too(model_type, shape):
    layers = find_moe_layers(build_on_meta(AutoConfig.for_model(model_type)))
    assert {tuple(layer.balancing_bias.shape) for layer in layers} == {shape}


def test_layers_that_route_by_hash_have_no_bias():
    layers = find_moe_layers(build_on_meta(AutoConfig.for_model("deepseek_v4")))
    assert [layer.index for layer in layers if layer.balancing_bias is None] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft
def test_experts_under_an_adapter_are_found():
    peft = pytest.importorskip("peft")
    base = build(tiny_config("hub_moe"))
    expected = [layer.experts for layer in find_moe_layers(base)]
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=stacks))
    assert [layer.experts for layer in find_moe_layers(model)] == expected
