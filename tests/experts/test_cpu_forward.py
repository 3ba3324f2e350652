"""The experts on the CPU against the naive definition in float64: outputs and gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hub_moe.errors import ConfigError, UnsupportedModelError
from hub_moe.experts import IMPLEMENTATION, cpu_forward, hub_moe_experts_forward
from hub_moe.experts import products as products_module
from hub_moe.experts.compiled_products import find_levels, load_level

from ..anatomy.families import FAMILIES, tiny_config
from .naive import LAYOUTS, draw_inputs, expected_of, make_experts, run

MIXED = [[0, 3], [1, 4], [3, 1], [2, 0], [3, 4], [1, 3], [4, 2]]
PATTERNS = {
    "one token": [[0, 3]],
    "an empty expert": MIXED[:2] + [[1, 3]] * 3,
    "all to one expert": [[3]] * 9,
    "all to two experts": [[1, 3]] * 7,
    "no tokens": [],
}
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}
# rounded between the products, so that a few pre-activations fall on the other side of a clamp
FAST_BFLOAT16 = 4e-2


@pytest.fixture(params=["torch", "torch with fast bfloat16", "compiled", "avx2"], autouse=True)
def products(request, monkeypatch):
    if request.param == "avx2":
        if "avx2" not in find_levels():
            pytest.skip("this processor has no AVX2")
        monkeypatch.setattr(cpu_forward, "choose_products", lambda dtype: load_level("avx2"))
    else:
        monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", request.param.split()[0])
    monkeypatch.setattr(products_module, "has_fast_bfloat16", lambda: "fast" in request.param)
    return request.param


@pytest.fixture
def check(products):
    """Runs a layer and compares; see `compare`."""
    return lambda experts, inputs: compare(
        experts, inputs, FAST_BFLOAT16 if "fast" in products and experts.down_proj.dtype == torch.bfloat16 else None
    )


def ids(pattern, top_k=2):
    return torch.tensor(pattern, dtype=torch.int64).view(-1, len(pattern[0]) if pattern else top_k)


def compare(experts, inputs, tolerance=None):
    """Output and gradients as the naive ones, by the norm of the difference relative to theirs."""
    expected = expected_of(experts, inputs)
    actual = run(hub_moe_experts_forward, experts, inputs)
    tolerance = tolerance or TOLERANCES[experts.down_proj.dtype]
    for name, tensor in actual.items():
        assert tensor is not None, name
        assert tensor.shape == expected[name].shape
        error = (tensor.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error <= tolerance, (name, error)
    return actual


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_naive_output_and_gradients(layout, dtype, check, monkeypatch):
    if dtype == torch.float64:  # by torch alone, unless the compiled products were asked for
        monkeypatch.undo()
    experts = make_experts(**layout).to(dtype)
    check(experts, draw_inputs(ids(MIXED), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "as gpt-oss"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_odd_numbers_of_tokens_give_the_naive_output_and_gradients(pattern, layout, dtype, check):
    experts = make_experts(**LAYOUTS[layout]).to(dtype)
    actual = check(experts, draw_inputs(ids(pattern), dtype=dtype))
    idle = sorted(set(range(5)) - {expert for row in pattern for expert in row})
    assert not actual["ddown_proj"][idle].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "as gpt-oss"])
@pytest.mark.parametrize(
    "sizes",
    [{"D": 37, "F": 13, "E": 3}, {"D": 1, "F": 1, "E": 2}, {"D": 130, "F": 67, "E": 7}, {"D": 64, "F": 32, "E": 4}],
    ids=str,
)
def test_sizes_that_no_tile_divides_give_the_naive_output_and_gradients(sizes, layout, dtype, check):
    experts = make_experts(sizes=sizes, **LAYOUTS[layout]).to(dtype)
    torch.manual_seed(0)
    expert_TK = torch.rand(61, sizes["E"]).topk(2).indices
    check(experts, draw_inputs(expert_TK, hidden=sizes["D"], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_not_contiguous_give_the_naive_output_and_gradients(dtype, check):
    experts = make_experts().to(dtype)
    wide = torch.randn(5, 48, 40).to(dtype)
    experts.gate_up_proj = nn.Parameter(wide[:, ::3, 8:32])
    experts.down_proj = nn.Parameter(wide[:, :24, ::5])
    x_TD, expert_TK, weight_TK, dout_TD = draw_inputs(ids(MIXED), dtype=dtype)
    strided = x_TD.mT.contiguous().mT
    assert not strided.is_contiguous()
    check(experts, (strided, expert_TK.mT.contiguous().mT, weight_TK, dout_TD.mT.contiguous().mT))


def test_hidden_states_of_another_dtype_than_the_weights_are_computed_and_come_back_in_their_own(check):
    experts = make_experts().bfloat16()
    actual = check(experts, draw_inputs(ids(MIXED), dtype=torch.float32))
    assert actual["out"].dtype == actual["dx"].dtype == torch.float32
    assert actual["ddown_proj"].dtype == torch.bfloat16


def test_frozen_weights_cost_no_weight_gradient(monkeypatch):
    made = []
    experts = make_experts()
    products = cpu_forward.choose_products(torch.float32)
    stack_gradient = type(products).stack_gradient
    monkeypatch.setattr(
        type(products), "stack_gradient", lambda *args: made.append(args[-1].shape) or stack_gradient(*args)
    )
    experts.gate_up_proj.requires_grad_(False)
    inputs = draw_inputs(ids(MIXED))
    partly = run(hub_moe_experts_forward, experts, inputs)
    assert partly["dgate_up_proj"] is None
    assert made == [(5, 8, 24)]
    experts.requires_grad_(False)
    frozen = run(hub_moe_experts_forward, experts, inputs)
    assert len(made) == 1
    assert torch.equal(frozen["dx"], expected := partly["dx"])
    assert expected.any()


def test_without_gradients_nothing_is_kept_for_backward():
    experts = make_experts().requires_grad_(False)
    x_TD, expert_TK, weight_TK, _ = draw_inputs(ids(MIXED))
    assert hub_moe_experts_forward(experts, x_TD, expert_TK, weight_TK).grad_fn is None


def test_gradient_checkpointing_gives_the_same_gradients():
    experts = make_experts()
    inputs = draw_inputs(ids(MIXED))
    again = run(lambda *args: checkpoint(hub_moe_experts_forward, *args, use_reentrant=False), experts, inputs)
    for name, tensor in run(hub_moe_experts_forward, experts, inputs).items():
        assert torch.equal(again[name], tensor), name


def test_gradients_of_a_second_backward_add_up_in_the_layout_of_the_parameter():
    experts = make_experts(is_transposed=True)
    inputs = draw_inputs(ids(MIXED))
    once = run(hub_moe_experts_forward, experts, inputs)["ddown_proj"].clone()
    hub_moe_experts_forward(experts, *inputs[:3]).backward(inputs[3])
    torch.testing.assert_close(experts.down_proj.grad, 2 * once)
    assert experts.down_proj.grad.stride() == experts.down_proj.stride()


def test_pairs_of_experts_of_another_process_are_left_out(check):
    experts = make_experts()
    experts._is_expert_parallel = True
    check(experts, draw_inputs(torch.tensor([[0, 5], [5, 5], [7, 2]])))


@pytest.mark.parametrize("expert_id", [-1, 5])
def test_an_expert_id_that_no_expert_has_is_an_error(expert_id):
    experts = make_experts()
    with pytest.raises(ConfigError, match="numbered from 0"):
        hub_moe_experts_forward(experts, *draw_inputs(torch.tensor([[0, expert_id]]))[:3])


def test_weights_that_are_no_floating_point_stack_are_an_error_that_names_what_to_use():
    experts = make_experts().requires_grad_(False)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match='experts_implementation="grouped_mm"'):
        hub_moe_experts_forward(experts, *draw_inputs(ids(MIXED))[:3])


def test_a_trained_activation_is_an_error_that_names_what_to_use():
    experts = make_experts()
    experts.act_fn = nn.PReLU()
    with pytest.raises(UnsupportedModelError, match=r"act_fn\.weight.*grouped_mm"):
        hub_moe_experts_forward(experts, *draw_inputs(ids(MIXED))[:3])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_logits_and_gradients_of_eager(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).train()
    tokens = torch.randint(0, 128, (2, 9))
    results = []
    for implementation in ("eager", IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        model.zero_grad()
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        results.append([output.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_products_in_the_dtype_of_the_weights():
    experts = make_experts()
    inputs = draw_inputs(ids(MIXED))
    expected = run(hub_moe_experts_forward, experts, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(hub_moe_experts_forward, experts, inputs)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_it_is_registered_in_the_interface_of_transformers():
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is hub_moe_experts_forward
