"""A few tokens without gradients: experts on the CPU compute them in one compiled call where their layout allows it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM

from hub_moe.errors import ConfigError
from hub_moe.experts import IMPLEMENTATION, cpu_forward, decoding, hub_moe_experts_forward
from hub_moe.experts.compiled_products import find_levels, load_level
from hub_moe.experts.stacks import stacks_of

from ..anatomy.families import FAMILIES, tiny_config
from .naive import LAYOUTS, draw_inputs, make_double, make_experts, naive_forward

MIXED = torch.tensor([[0, 3], [1, 4], [3, 1], [4, 0]])
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}

pytestmark = pytest.mark.skipif(not find_levels(), reason="no compiled products for this processor")


@pytest.fixture(params=find_levels(), autouse=True)
def level(request, monkeypatch):
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    steps = decoding.DecodingSteps(load_level(request.param).library)
    monkeypatch.setattr(decoding, "_steps_for", lambda asked: steps if asked == "compiled" else None)
    return request.param


def feed(experts, inputs):
    """The output, and whether it came from the one call."""
    x_TD, expert_TK, weight_TK = inputs
    with torch.no_grad():
        alone_TD = cpu_forward._feed_few(experts, x_TD, (expert_TK, weight_TK), stacks_of(experts))
        out_TD = hub_moe_experts_forward(experts, x_TD, expert_TK, weight_TK)
    assert alone_TD is None or torch.equal(out_TD.nan_to_num(), alone_TD.nan_to_num())
    return out_TD, alone_TD is not None


def check(experts, inputs):
    x_TD, expert_TK, weight_TK = inputs
    expected_TD = naive_forward(make_double(experts), x_TD.double(), expert_TK, weight_TK.double()).detach()
    out_TD, is_one_call = feed(experts, inputs)
    assert out_TD.dtype == x_TD.dtype
    assert out_TD.shape == expected_TD.shape
    assert (out_TD.double() - expected_TD).norm() <= TOLERANCES[experts.down_proj.dtype] * expected_TD.norm()
    return is_one_call


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_few_tokens_give_the_naive_output_in_one_call(tokens, dtype):
    assert check(make_experts().to(dtype), draw_inputs(MIXED[:tokens], dtype=dtype)[:3])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sizes", [{"D": 37, "F": 13, "E": 5}, {"D": 1, "F": 1, "E": 5}, {"D": 130, "F": 67, "E": 7}])
def test_sizes_that_no_vector_divides(sizes, dtype):
    assert check(make_experts(sizes=sizes).to(dtype), draw_inputs(MIXED, hidden=sizes["D"], dtype=dtype)[:3])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "pattern", [MIXED, torch.tensor([[3, 0], [2, 3], [3, 1], [4, 3]]), torch.tensor([[4, 3, 2, 1, 0]]), MIXED.flip(1)]
)
@pytest.mark.parametrize("sizes", [{"D": 24, "F": 8, "E": 5}, {"D": 130, "F": 67, "E": 7}], ids=str)
def test_the_bits_are_those_of_the_products(sizes, pattern, dtype, level, monkeypatch):
    monkeypatch.setattr(cpu_forward, "choose_products", lambda asked: load_level(level))
    experts = make_experts(sizes=sizes).to(dtype)
    x_TD, expert_TK, weight_TK, _ = draw_inputs(pattern, hidden=sizes["D"], dtype=dtype)
    products_TD = hub_moe_experts_forward(experts, x_TD, expert_TK, weight_TK).detach()
    out_TD, is_one_call = feed(experts, (x_TD, expert_TK, weight_TK))
    assert is_one_call
    assert torch.equal(out_TD, products_TD)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_layouts_are_left_to_the_products(layout):
    assert check(make_experts(**layout), draw_inputs(MIXED)[:3]) == (layout == {})


def test_strided_tokens_and_ids_of_32_bits():
    x_TD, expert_TK, weight_TK, _ = draw_inputs(MIXED)
    strided = x_TD.mT.contiguous().mT, expert_TK.mT.contiguous().mT.int(), weight_TK.mT.contiguous().mT
    assert check(make_experts(), strided)


def test_strided_weights_other_dtypes_many_tokens_and_many_of_one_expert_are_left_to_the_products():
    experts, inputs = make_experts(), draw_inputs(MIXED)[:3]
    experts.down_proj = nn.Parameter(torch.randn(5, 24, 16)[:, :, ::2])
    assert not check(experts, inputs)
    assert not check(make_experts().bfloat16(), inputs)
    assert not check(make_experts(), draw_inputs(torch.cat([MIXED, MIXED[:1]]))[:3])
    assert not check(make_experts(), draw_inputs(torch.full((5, 2), 3))[:3])
    assert not check(make_experts(), draw_inputs(MIXED[:0])[:3])


def test_with_gradients_or_without_the_compiled_code_they_are_left_to_the_products(monkeypatch):
    experts, (x_TD, expert_TK, weight_TK, _) = make_experts(), draw_inputs(MIXED)
    assert cpu_forward._feed_few(experts, x_TD, (expert_TK, weight_TK), stacks_of(experts)) is None
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    assert not check(experts, (x_TD, expert_TK, weight_TK))


@pytest.mark.parametrize("expert_id", [-1, 5, 2**40])
def test_an_expert_id_that_no_expert_has_is_an_error(expert_id):
    experts, inputs = make_experts(), draw_inputs(torch.tensor([[0, expert_id]]))[:3]
    with torch.no_grad(), pytest.raises(ConfigError, match="numbered from 0"):
        hub_moe_experts_forward(experts, *inputs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda x, ids, weights: (x[:, :-1], ids, weights),
        lambda x, ids, weights: (x[:-1], ids, weights),
        lambda x, ids, weights: (x[None], ids, weights),
        lambda x, ids, weights: (x, ids, weights[:, :1]),
        lambda x, ids, weights: (x, ids, weights[:-1]),
        lambda x, ids, weights: (x, ids[:, 0], weights[:, 0]),
        lambda x, ids, weights: (x, ids[None], weights[None]),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_an_error_that_names_their_shapes(change, grad):
    inputs = change(*draw_inputs(MIXED)[:3])
    with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match="take tokens") as error:
        hub_moe_experts_forward(make_experts(), *inputs)
    assert str([tuple(each.shape) for each in inputs]) in str(error.value)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", [1, 2, "experts"])
def test_inputs_and_experts_on_several_devices_are_an_error(place, grad):
    experts, inputs = make_experts(), list(draw_inputs(MIXED)[:3])
    if place == "experts":
        experts = experts.to("meta")
    else:
        inputs[place] = inputs[place].to("meta")
    with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match="on one device"):
        hub_moe_experts_forward(experts, *inputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
@pytest.mark.parametrize("place", [0, 2])
def test_tangents_of_forward_mode_are_not_lost(place):
    experts, inputs = make_experts(), list(draw_inputs(MIXED)[:3])
    with torch.no_grad(), forward_ad.dual_level():
        inputs[place] = forward_ad.make_dual(inputs[place], torch.ones_like(inputs[place]))
        with pytest.raises(NotImplementedError, match="jvp"):
            hub_moe_experts_forward(experts, *inputs)


def test_what_is_not_a_number_stays_with_its_token():
    experts, (x_TD, expert_TK, weight_TK, _) = make_experts(), draw_inputs(MIXED)
    x_TD[2] = float("nan")
    out_TD, is_one_call = feed(experts, (x_TD, expert_TK, weight_TK))
    assert is_one_call
    assert out_TD.isnan().any(1).tolist() == [row == 2 for row in range(4)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_logits_of_eager(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
    tokens = torch.randint(0, 128, (2, 3))
    logits = []
    for implementation in ("eager", IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
