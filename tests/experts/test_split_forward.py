"""The split forwards against those that they are twins of, outputs and gradients."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation

from hub_moe.anatomy import find_moe_layers
from hub_moe.anatomy.moe_layers import CHOSEN, ChosenExperts
from hub_moe.errors import ConfigError
from hub_moe.experts import split_experts
from hub_moe.experts.grouped_products import Part, multiply, multiply_at_once
from hub_moe.experts.split_forward import grouped_split_experts_forward, split_experts_forward

from ..anatomy.families import FAMILIES, tiny_config

CHOSEN_IDS = [6, 1]
LAYOUTS = {
    "plain": {},
    "with biases": {"has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed with biases": {"is_transposed": True, "has_bias": True},
    "without a gate": {"has_gate": False},
    "without a gate, with biases": {"has_gate": False, "has_bias": True},
    "with a norm behind the experts": {"has_post_expert_norm": True},
}


TWINS = {"grouped_mm": grouped_split_experts_forward, "hub_moe": split_experts_forward}
twins = pytest.mark.parametrize("twin", TWINS)


@pytest.fixture(params=["torch", "compiled"])
def products(request, monkeypatch):
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", request.param)


class Config:
    def __init__(self, implementation):
        self._experts_implementation = implementation


def make_experts(
    *, has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False, implementation="grouped_mm"
):
    """An experts module of any layout that transformers' decorator knows.

    E = 5, D = 24, F = 8, or 16 without a gate: grouped_mm wants rows of a multiple of 16 bytes, and MKL rounds by where
    rows begin in a line of 64 bytes, which must not change with their order if two outputs are to agree bit by bit.
    """

    inner = 8 if has_gate else 16

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = 5, nn.functional.silu
            up, up_width = ("gate_up_proj", 16) if has_gate else ("up_proj", inner)
            for name, rows, columns in ((up, up_width, 24), ("down_proj", 24, inner)):
                shape = (5, columns, rows) if is_transposed else (5, rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))
                if has_bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(5, rows)))
            if has_post_expert_norm:
                self.post_expert_norm = nn.LayerNorm(24)

        def forward(self, *inputs):
            raise NotImplementedError

    torch.manual_seed(1)
    decorate = use_experts_implementation(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, has_post_expert_norm=has_post_expert_norm
    )
    return decorate(Experts)(Config(implementation))


def split(experts, expert_ids):
    for parameter in experts.parameters(recurse=False):
        parameter.requires_grad_(False)
    if expert_ids:
        experts.add_module(CHOSEN, ChosenExperts(experts, expert_ids))


def run(forward, experts, expert_TK, *, dtype=torch.float32):
    """Output, gradients of input and weights, and gradients of the parameters."""
    torch.manual_seed(2)
    x_TD = torch.randn(expert_TK.shape[0], 24, dtype=dtype, requires_grad=True)
    weight_TK = torch.rand(expert_TK.shape).requires_grad_()
    out_TD = forward(experts, x_TD, expert_TK, weight_TK)
    torch.manual_seed(3)
    out_TD.backward(torch.randn(out_TD.shape, dtype=dtype))
    return out_TD, x_TD.grad, weight_TK.grad, {name: each.grad for name, each in experts.named_parameters()}


def compare(twin, layout, expert_TK, expert_ids, **tolerance):
    whole, parted = make_experts(**layout, implementation=twin), make_experts(**layout)
    split(parted, expert_ids)
    out, dx, dweight, gradients = run(lambda module, *inputs: module(*inputs), whole, expert_TK)
    split_out, split_dx, split_dweight, split_gradients = run(TWINS[twin], parted, expert_TK)

    assert torch.equal(split_out, out)
    torch.testing.assert_close(split_dx, dx, **tolerance)
    torch.testing.assert_close(split_dweight, dweight, **tolerance)
    for name, stack_gradient in gradients.items():
        if name.startswith("post_expert_norm"):
            torch.testing.assert_close(split_gradients[name], stack_gradient, **tolerance)
            continue
        assert split_gradients[name] is None
        if expert_ids:
            rows = split_gradients[f"{CHOSEN}.{name}"]
            torch.testing.assert_close(rows, stack_gradient[sorted(expert_ids)], **tolerance)


@twins
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("expert_ids", [[3, 1], [0, 1, 2, 3, 4], []], ids=["some", "all", "none"])
def test_every_layout_gives_the_output_of_its_twin_and_its_gradients(twin, layout, expert_ids, products):
    compare(twin, layout, torch.tensor([[0, 3], [1, 4], [3, 1], [2, 0], [3, 4], [1, 3], [4, 2]]), expert_ids)


@twins
@pytest.mark.parametrize("layout", [{}, {"has_bias": True}], ids=["plain", "with biases"])
@pytest.mark.parametrize(
    "expert_TK",
    [[[0, 3]], [[0, 2]] * 4, [[3], [3], [3]], [[1, 3]] * 3, [[4], [2]]],
    ids=["one token", "none to a chosen one", "all to one chosen", "all to two chosen", "one each"],
)
def test_odd_numbers_of_tokens_give_the_output_of_the_twin_and_its_gradients(twin, layout, expert_TK, products):
    compare(twin, layout, torch.tensor(expert_TK), [1, 3])


@twins
@pytest.mark.parametrize("expert_TK", [[[0, 2]] * 3, [[0, 1], [2, 3]], [[1, 3]] * 2], ids=["none", "some", "all"])
def test_the_lowest_trained_layer_keeps_less_and_gets_the_same_gradients(twin, expert_TK, products):
    """Where neither input nor router need a gradient, only the pairs of chosen experts are computed again."""
    for layout in LAYOUTS.values():
        experts = make_experts(**layout)
        split(experts, [1, 3])
        x_TD, weight_TK = torch.randn(len(expert_TK), 24), torch.rand(len(expert_TK), 2)
        gradients = []
        for needs_gradient in (True, False):
            experts.zero_grad()
            TWINS[twin](
                experts, x_TD.requires_grad_(needs_gradient), torch.tensor(expert_TK), weight_TK
            ).sum().backward()
            gradients.append({name: each.grad for name, each in experts.chosen.named_parameters()})
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, msg=f"{layout} {name}")


@twins
def test_no_tokens_give_no_output_and_gradients_of_zero(twin, products):
    experts = make_experts()
    split(experts, [2])
    out, dx, dweight, gradients = run(TWINS[twin], experts, torch.zeros(0, 2, dtype=torch.int64))

    assert out.shape == dx.shape == (0, 24)
    assert dweight.shape == (0, 2)
    assert torch.equal(gradients["chosen.down_proj"], torch.zeros(1, 24, 8))


@twins
def test_a_chosen_expert_without_tokens_gets_a_gradient_of_zero(twin, products):
    experts = make_experts(has_bias=True)
    split(experts, [1, 3])
    *_, gradients = run(TWINS[twin], experts, torch.tensor([[0], [3], [2]]))

    for name, parameter in experts.chosen.named_parameters():
        gradient = gradients[f"chosen.{name}"]
        assert not gradient[0].any(), name
        assert gradient[1].any(), name
        assert gradient.shape == parameter.shape


@twins
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_split_model_gives_the_logits_of_its_twin_and_the_gradients_of_eager(model_type, twin):
    model, whole = (build(model_type) for _ in range(2))
    model.set_experts_implementation(twin)
    ids = torch.randint(0, 128, (2, 9))
    split_experts(model, {layer.index: CHOSEN_IDS for layer in find_moe_layers(model)[::2]})
    logits, demb, gradients = train_step(model, ids)
    whole.set_experts_implementation(twin)
    assert torch.equal(logits, train_step(whole, ids)[0])
    whole.set_experts_implementation("eager")
    eager_logits, eager_demb, eager_gradients = train_step(whole, ids)

    torch.testing.assert_close(logits, eager_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(demb, eager_demb, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        expected = eager_gradients[name.replace(f".{CHOSEN}.", ".")]
        expected = expected[sorted(CHOSEN_IDS)] if f".{CHOSEN}." in name else expected
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=name)
    stacks = {f"{layer.name}.experts.{name}" for layer in find_moe_layers(whole) for name in layer.experts._parameters}
    assert not stacks & gradients.keys()


def build(model_type, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).train()


def train_step(model, ids):
    """Logits, gradient of the embedded tokens and gradients by name."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return output.logits.detach(), embedded.grad, gradients


@twins
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_near_to_float32_as_grouped_mm_is(dtype, twin):
    expert_TK = torch.tensor([[0, 3], [1, 4], [3, 1], [2, 0]] * 8)
    exact = run(lambda module, *inputs: module(*inputs), make_experts(), expert_TK)[:3]
    whole, parted = make_experts().to(dtype), make_experts().to(dtype)
    split(parted, [1, 3])
    theirs = run(lambda module, *inputs: module(*inputs), whole, expert_TK, dtype=dtype)[:3]
    ours = run(TWINS[twin], parted, expert_TK, dtype=dtype)[:3]

    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        assert (our.float() - right).norm() <= 1.1 * (their.float() - right).norm()


@twins
def test_float32_copies_beside_a_bfloat16_stack_get_float32_gradients(twin):
    experts = make_experts().to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    experts.add_module(CHOSEN, ChosenExperts(experts, [1, 3], torch.float32))
    out, *_, gradients = run(TWINS[twin], experts, torch.tensor([[0, 3], [1, 4]]), dtype=torch.bfloat16)

    assert out.dtype == torch.bfloat16
    assert gradients["chosen.down_proj"].dtype == torch.float32
    assert gradients["chosen.down_proj"].any()


@twins
def test_gradients_are_those_of_finite_differences(twin):
    experts = make_experts(has_bias=True).double()
    split(experts, [1, 3])
    expert_TK = torch.tensor([[0, 3], [1, 4], [3, 2]])
    x_TD = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def forward(x_TD, weight_TK, *_):
        return TWINS[twin](experts, x_TD, expert_TK, weight_TK)

    assert torch.autograd.gradcheck(forward, (x_TD, weight_TK, *experts.chosen.parameters()), fast_mode=True)


def saved_numbers(twin, experts, *, x_needs_gradient):
    sizes = []
    x_TD = torch.randn(64, 24, requires_grad=x_needs_gradient)
    own = {each.data_ptr() for each in experts.parameters()}

    def keep(tensor):
        if tensor.is_floating_point() and tensor.data_ptr() not in own:
            sizes.append(tensor.untyped_storage().size() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TWINS[twin](experts, x_TD, torch.tensor([[0, 3], [1, 4]] * 32), torch.rand(64, 2))
    return sum(sizes)


@twins
def test_backward_keeps_preactivations_and_the_input_of_chosen_experts_and_nothing_else(twin, products):
    experts = make_experts()
    split(experts, [1])
    num_pairs, num_chosen = 128, 32

    assert saved_numbers(twin, experts, x_needs_gradient=True) == num_pairs * 16 + num_chosen * 24 + num_pairs
    assert saved_numbers(twin, experts, x_needs_gradient=False) == num_chosen * (16 + 24) + num_pairs


def test_one_kernel_for_all_experts_equals_a_product_for_each():
    counts = (3, 0, 4, 1)
    stack = torch.randn(4, 24, 8).mT
    x_SA = torch.randn(8, 8)
    out = torch.empty(8, 24)
    multiply_at_once(x_SA, Part(stack, counts), out)

    assert torch.equal(out, multiply(x_SA, [Part(stack, counts)]))


def test_a_frozen_stack_that_should_be_trained_is_an_error():
    experts = make_experts()
    split(experts, [1])
    experts.down_proj.requires_grad_(True)
    with pytest.raises(ConfigError, match="a frozen stack requires a gradient, which it would not get"):
        split_experts_forward(experts, torch.randn(1, 24), torch.tensor([[0]]), torch.ones(1, 1))
