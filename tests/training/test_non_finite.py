"""Where NaN and infinity are first seen."""

import torch

from hub_moe.training.non_finite import describe_divergence, find_non_finite


def _batch():
    return {"input_ids": torch.arange(2, 10)[None], "labels": torch.arange(2, 10)[None]}


def test_a_healthy_model_is_finite(tiny_model):
    assert find_non_finite(tiny_model.named_parameters()) is None
    assert describe_divergence(tiny_model, [_batch()]) == "a repeated forward is finite"


def test_a_broken_weight_is_named(tiny_model):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.gate.weight[2, 3] = float("inf")
    assert describe_divergence(tiny_model, [_batch()]) == "the weight model.layers.1.mlp.gate.weight is not finite"


def test_the_innermost_module_whose_output_overflows_first_is_named(tiny_model):
    with torch.no_grad():
        tiny_model.model.layers[1].self_attn.kv_b_proj.weight.mul_(1e6)
        tiny_model.model.layers[1].self_attn.o_proj.weight.fill_(3e38)
    where = describe_divergence(tiny_model, [_batch()])
    assert where == "the first output that is not finite is that of model.layers.1.self_attn.o_proj (Linear)"
    hooks = [module._forward_hooks for module in tiny_model.modules()]
    assert not any(hooks)


def test_a_gradient_that_is_not_finite_is_named(tiny_model):
    tiny_model.lm_head.weight.grad = torch.full_like(tiny_model.lm_head.weight, float("nan"))
    assert describe_divergence(tiny_model, [_batch()]) == "the gradient of lm_head.weight is not finite"
