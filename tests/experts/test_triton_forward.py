"""The experts on GPUs against the naive definition in float64; without a GPU, in Triton's interpreter.

Blocks are tiny here, so that small layers have several tiles in every direction.
"""

import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

pytest.importorskip("triton", reason="triton has no build for this system")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)

from hub_moe.experts import hub_moe_experts_forward, stacks, triton_forward, triton_kernels
from hub_moe.experts.triton_forward import triton_experts_forward

from ..anatomy.families import tiny_config
from .naive import LAYOUTS, draw_inputs, expected_of, make_experts, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [[0, 3], [1, 4], [3, 1], [2, 0], [3, 4], [1, 3], [4, 2]]
PATTERNS = {
    "one token": [[0, 3]],
    "an empty expert": MIXED[:2] + [[1, 3]] * 3,
    "all to one expert": [[3]] * 40,
    "all to two experts": [[1, 3]] * 21,
    "no tokens": [],
}
# the interpreter cuts a bfloat16 off where a GPU rounds
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3 if DEVICE == "cuda" else 2.5e-2, torch.float16: 2e-3}
# rounded between the products, so that a few pre-activations fall on the other side of a clamp
CLAMPED = {torch.float32: 2e-6, torch.bfloat16: 1e-1, torch.float16: 5e-2}
KNOWN = {name: layout for name, layout in LAYOUTS.items() if not layout.get("has_post_expert_norm")}


@pytest.fixture(autouse=True)
def _tiny_blocks(monkeypatch):
    rows = [(32, 16, 4, 2, 1), (16, 16, 4, 2, 1)]
    squares = [(16, 32, 16, 4, 2, 1)]
    for name, blocks in triton_kernels.BLOCKS.items():
        tiny = squares if name == "stack_gradient" else rows
        monkeypatch.setitem(triton_kernels.BLOCKS, name, (tiny,) * len(blocks))
    triton_kernels.tuned_kernel.cache_clear()
    yield
    triton_kernels.tuned_kernel.cache_clear()


def ids(pattern, top_k=2):
    return torch.tensor(pattern, dtype=torch.int64).view(-1, len(pattern[0]) if pattern else top_k)


def on_device(experts, inputs):
    return experts.to(DEVICE), tuple(each.to(DEVICE) for each in inputs)


def check(experts, inputs, tolerances=TOLERANCES):
    """Output and gradients as the naive ones, by the norm of the difference relative to theirs."""
    expected = expected_of(experts, inputs)
    actual = run(triton_experts_forward, *on_device(experts, inputs))
    for name, tensor in actual.items():
        assert tensor is not None, name
        assert tensor.shape == expected[name].shape
        error = (tensor.cpu().double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error <= tolerances[experts.down_proj.dtype], (name, error)
    return actual


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", KNOWN.values(), ids=KNOWN.keys())
def test_every_layout_gives_the_naive_output_and_gradients(layout, dtype):
    experts = make_experts(**layout).to(dtype)
    check(experts, draw_inputs(ids(MIXED), dtype=dtype), CLAMPED if layout.get("is_clamped") else TOLERANCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "with biases", "transposed"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_odd_numbers_of_tokens_give_the_naive_output_and_gradients(pattern, layout, dtype):
    experts = make_experts(**LAYOUTS[layout]).to(dtype)
    actual = check(experts, draw_inputs(ids(pattern), dtype=dtype))
    idle = sorted(set(range(5)) - {expert for row in pattern for expert in row})
    assert not actual["ddown_proj"][idle].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "with biases", "transposed"])
@pytest.mark.parametrize(
    "sizes",
    [{"D": 37, "F": 13, "E": 3}, {"D": 1, "F": 1, "E": 2}, {"D": 50, "F": 35, "E": 4}, {"D": 64, "F": 32, "E": 4}],
    ids=str,
)
def test_sizes_that_no_tile_divides_give_the_naive_output_and_gradients(sizes, layout, dtype):
    experts = make_experts(sizes=sizes, **LAYOUTS[layout]).to(dtype)
    torch.manual_seed(0)
    check(experts, draw_inputs(torch.rand(23, sizes["E"]).topk(2).indices, hidden=sizes["D"], dtype=dtype))


@pytest.mark.parametrize("bucket", range(len(triton_kernels.ROWS_OF_TILE)))
def test_the_blocks_that_a_gpu_takes_give_the_naive_output_and_gradients(bucket, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(triton_forward, "_bucket", lambda num_pairs, num_experts: bucket)
    experts = make_experts(sizes={"D": 272, "F": 144, "E": 3}).bfloat16()
    torch.manual_seed(0)
    check(experts, draw_inputs(torch.rand(150, 3).topk(2).indices, hidden=272, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_that_are_not_contiguous_give_the_naive_output_and_gradients(dtype):
    experts = make_experts().to(DEVICE, dtype)
    wide = torch.randn(5, 48, 40).to(DEVICE, dtype)
    experts.gate_up_proj = nn.Parameter(wide[:, ::3, 8:32])
    experts.down_proj = nn.Parameter(wide[:, :24, ::5])
    x_TD, expert_TK, weight_TK, dout_TD = draw_inputs(ids(MIXED), dtype=dtype)
    inputs = (x_TD.mT.contiguous().mT, expert_TK.mT.contiguous().mT, weight_TK, dout_TD.mT.contiguous().mT)
    expected = expected_of(experts.cpu(), inputs)
    experts.gate_up_proj, experts.down_proj = nn.Parameter(wide[:, ::3, 8:32]), nn.Parameter(wide[:, :24, ::5])
    for name, tensor in run(triton_experts_forward, experts, [each.to(DEVICE) for each in inputs]).items():
        error = (tensor.cpu().double() - expected[name]).norm() / expected[name].norm()
        assert error <= TOLERANCES[dtype], (name, error)


def test_hidden_states_of_another_dtype_than_the_weights_are_computed_and_come_back_in_their_own():
    experts = make_experts().bfloat16()
    actual = check(experts, draw_inputs(ids(MIXED), dtype=torch.float32))
    assert actual["out"].dtype == actual["dx"].dtype == torch.float32
    assert actual["ddown_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["plain", "clamped"])
@pytest.mark.parametrize("frozen", [("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")], ids=str)
def test_a_frozen_stack_costs_no_weight_gradient_and_changes_no_other(frozen, layout, monkeypatch):
    made = []
    gradient = triton_forward._stack_gradient
    monkeypatch.setattr(triton_forward, "_stack_gradient", lambda *args: made.append(args[2].shape) or gradient(*args))
    experts, inputs = on_device(make_experts(**LAYOUTS[layout]), draw_inputs(ids(MIXED)))
    all_trained = run(triton_experts_forward, experts, inputs)
    made.clear()
    for name in frozen:
        getattr(experts, name).requires_grad_(False)
    partly = run(triton_experts_forward, experts, inputs)
    assert len(made) == 2 - len(frozen)
    for name, tensor in partly.items():
        if name[1:] in frozen:
            assert tensor is None
        else:
            assert torch.equal(tensor, all_trained[name]), name


def test_each_gradient_alone_is_the_same_as_beside_the_others():
    experts, inputs = on_device(make_experts(has_bias=True), draw_inputs(ids(MIXED)))
    x_TD, expert_TK, weight_TK, dout_TD = inputs
    everything = run(triton_experts_forward, experts, inputs)
    tensors = {"dx": x_TD, "dweight": weight_TK, **{f"d{name}": each for name, each in experts.named_parameters()}}
    for name, tensor in tensors.items():
        for each in tensors.values():
            each.requires_grad_(each is tensor)
        out_TD = triton_experts_forward(experts, x_TD, expert_TK, weight_TK)
        (gradient,) = torch.autograd.grad(out_TD, tensor, dout_TD)
        torch.testing.assert_close(gradient, everything[name])


def test_for_backward_only_input_preactivations_and_routing_are_kept():
    experts = make_experts(sizes={"D": 64, "F": 32, "E": 4}).bfloat16()
    torch.manual_seed(0)
    inputs = draw_inputs(torch.rand(128, 4).topk(2).indices, hidden=64, dtype=torch.bfloat16)
    experts, (x_TD, expert_TK, weight_TK, _) = on_device(experts, inputs)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        triton_experts_forward(experts, x_TD, expert_TK, weight_TK)
    weights = {each.untyped_storage().data_ptr() for each in experts.parameters()}
    kept_bytes = sum(each.numel() * each.element_size() for at, each in kept.items() if at not in weights)
    needed_bytes = 2 * (128 * 64 + 2 * 128 * 2 * 32)
    assert needed_bytes <= kept_bytes <= 1.15 * needed_bytes


def test_without_gradients_nothing_is_kept_for_backward():
    experts, inputs = on_device(make_experts().requires_grad_(False), draw_inputs(ids(MIXED)))
    assert triton_experts_forward(experts, *inputs[:3]).grad_fn is None


def test_gradient_checkpointing_and_a_second_run_give_the_same_bits():
    experts, inputs = on_device(make_experts(has_bias=True), draw_inputs(ids(MIXED)))
    first = run(triton_experts_forward, experts, inputs)
    second = run(triton_experts_forward, experts, inputs)
    again = run(lambda *args: checkpoint(triton_experts_forward, *args, use_reentrant=False), experts, inputs)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("layout", ["plain", "with biases", "clamped"])
def test_with_deterministic_algorithms_no_result_changes_and_nothing_unwritten_is_read(layout, monkeypatch):
    experts, inputs = on_device(make_experts(**LAYOUTS[layout]), draw_inputs(torch.tensor([[0, 5], [1, 3], [7, 2]])))
    experts._is_expert_parallel = True
    expected = run(triton_experts_forward, experts, inputs)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # by NaN
    try:
        actual = run(triton_experts_forward, experts, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in actual.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(tensor, expected[name])


def test_gradients_of_a_second_backward_add_up_in_the_layout_of_the_parameter():
    experts, inputs = on_device(make_experts(is_transposed=True), draw_inputs(ids(MIXED)))
    once = run(triton_experts_forward, experts, inputs)["ddown_proj"].clone()
    triton_experts_forward(experts, *inputs[:3]).backward(inputs[3])
    torch.testing.assert_close(experts.down_proj.grad, 2 * once)
    assert experts.down_proj.grad.stride() == experts.down_proj.stride()


@pytest.mark.parametrize("layout", ["plain", "with biases", "clamped"])
def test_pairs_of_experts_of_another_process_are_left_out(layout):
    experts = make_experts(**LAYOUTS[layout])
    experts._is_expert_parallel = True
    check(experts, draw_inputs(torch.tensor([[0, 5], [5, 5], [7, 2]])))


@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion would end the use of the GPU in this process")
@pytest.mark.parametrize("expert_id", [-1, 5])
def test_an_expert_id_that_no_expert_has_is_an_error(expert_id):
    with pytest.raises(RuntimeError, match="none of the 5 experts"):
        triton_experts_forward(make_experts(), *draw_inputs(torch.tensor([[0, expert_id]]))[:3])


@pytest.mark.parametrize("model_type", ["hub_moe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_a_model_gives_the_logits_and_gradients_of_eager(model_type):
    ALL_EXPERTS_FUNCTIONS.register("hub_moe_triton", triton_experts_forward)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).train().to(DEVICE)
    tokens = torch.randint(0, 128, (2, 9), device=DEVICE)
    results = []
    for implementation in ("eager", "hub_moe_triton"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = model(tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        results.append([output.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_the_name_hub_moe_stands_for_these_kernels(monkeypatch):
    monkeypatch.setenv(stacks.GPU_VARIABLE, "triton")
    experts, inputs = on_device(make_experts(), draw_inputs(ids(MIXED)))
    expected = run(triton_experts_forward, experts, inputs)
    monkeypatch.setattr("hub_moe.experts.cpu_forward.grouped_mm_experts_forward", None)
    for name, tensor in run(hub_moe_experts_forward, experts, inputs).items():
        assert torch.equal(tensor, expected[name]), name
