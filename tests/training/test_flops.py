import pytest
import torch
from transformers import AutoModelForCausalLM

from hub_moe.anatomy import find_moe_layers, measure_footprint
from hub_moe.training.flops import find_peak, measure_training_cost, plan_training_cost

from ..anatomy.families import FAMILIES, tiny_config


def _cost(model):
    return measure_training_cost(model, find_moe_layers(model))


def _build(model_type="hub_moe", **changes):
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_training_everything_costs_three_forwards(model_type):
    model = _build(model_type)
    expected = measure_footprint(model.config).training_flops(24)
    # what the footprint counts as active and the model does not train is nothing
    assert _cost(model).flops_per_token(24) == pytest.approx(expected, rel=1e-9)


def test_a_frozen_weight_between_trained_ones_costs_four():
    model = _build()
    everything = _cost(model)
    frozen = model.model.layers[1].self_attn.o_proj.weight
    frozen.requires_grad_(False)
    assert everything.flops_per_token(24) - _cost(model).flops_per_token(24) == 2 * frozen.numel()


def test_routed_experts_cost_what_a_token_meets():
    model = _build()
    everything = _cost(model)
    experts = model.model.layers[1].mlp.experts
    experts.requires_grad_(False)
    size = sum(parameter.numel() for parameter in experts.parameters())
    assert everything.flops_per_token(0) - _cost(model).flops_per_token(0) == 2 * size * 2 / 8


def test_what_lies_below_the_first_trained_layer_is_only_run_forward():
    model = _build()
    model.requires_grad_(False)
    only_forward = measure_footprint(model.config).forward_flops(24)
    assert _cost(model).flops_per_token(24) == only_forward
    head = model.lm_head.weight.requires_grad_(True)
    assert _cost(model).flops_per_token(24) == only_forward + 4 * head.numel()
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    assert norm.dim() == 1
    backward_everywhere = 2 * only_forward + measure_footprint(model.config).attention_flops(24)
    assert _cost(model).flops_per_token(24) == backward_everywhere + 2 * head.numel()


def test_the_embedding_is_looked_up_and_a_tied_head_multiplied():
    tied, apart = _build(tie_word_embeddings=True), _build()
    assert _cost(tied).flops_per_token(0) == _cost(apart).flops_per_token(0)


def test_mtp_layers_are_run_in_training():
    without, with_mtp = _build(), _build(num_mtp_layers=1, mtp_loss_coef=0.3)
    idle = _build(num_mtp_layers=1, mtp_loss_coef=0.0)
    layer = with_mtp.model.mtp_layers[0]
    experts = sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
    matrices = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() > 1)
    met = matrices - experts * 6 / 8 + with_mtp.lm_head.weight.numel()
    assert _cost(with_mtp).flops_per_token(0) - _cost(without).flops_per_token(0) == 6 * met
    assert _cost(idle).flops_per_token(0) == _cost(without).flops_per_token(0)


def test_the_peak_of_a_processor_is_measured_and_says_so():
    peak = find_peak(torch.device("cpu"), torch.float32)
    assert peak.source == "measured: 1024 x 1024 float32 matrix product"
    assert peak.flops > 1e8


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312.0e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
    ],
)
def test_the_peak_of_a_known_gpu_is_published(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    peak = find_peak(torch.device("cuda"), torch.bfloat16)
    assert peak.flops == flops
    assert peak.source.startswith("published: NVIDIA")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_plan_of_training_everything_or_all_experts_is_what_a_model_costs(model_type):
    model = _build(model_type)
    footprint = measure_footprint(model.config)
    full = plan_training_cost(footprint, model.config, "full")
    assert full.cost.flops_per_token(24) == pytest.approx(_cost(model).flops_per_token(24), rel=1e-9)
    assert full.parameters == full.trained_parameters == sum(each.numel() for each in model.parameters())
    model.requires_grad_(False)
    for layer in find_moe_layers(model):
        layer.experts.requires_grad_(True)
    experts = plan_training_cost(footprint, model.config, "experts", expert_share=1.0)
    assert experts.cost.flops_per_token(24) == pytest.approx(_cost(model).flops_per_token(24), rel=1e-9)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert experts.trained_parameters == trained


def test_a_plan_counts_mtp_layers_where_they_are_trained():
    for coefficient in (0.3, 0.0):
        model = _build(num_mtp_layers=1, mtp_loss_coef=coefficient)
        planned = plan_training_cost(measure_footprint(model.config), model.config, "full")
        assert planned.runs_mtp == bool(coefficient)
        assert planned.cost.flops_per_token(24) == pytest.approx(_cost(model).flops_per_token(24), rel=1e-9)


def test_a_plan_of_adapters_counts_what_peft_adds():
    pytest.importorskip("peft")
    from hub_moe.training.lora import add_adapters
    from hub_moe.training.method_config import LoraMethod

    model = _build()
    names = {name.rpartition(".")[2] for name, each in model.named_modules() if "self_attn." in f"{name}"}
    linear = tuple(sorted(name for name in names if "proj" in name))
    planned = plan_training_cost(measure_footprint(model.config), model.config, "lora", rank=4)
    adapted = add_adapters(model, LoraMethod(r=4, target_modules=linear))
    assert planned.trained_parameters == sum(each.numel() for each in adapted.parameters() if each.requires_grad)
