"""What the compiled products do beside products, against torch, and whose memory gradients get."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from hub_moe.experts import cpu_forward
from hub_moe.experts.compiled_products import GradientMemory, find_levels, load_level
from hub_moe.experts.pairs import sort_pairs_by_expert
from hub_moe.experts.products import TorchProducts

SHAPE = torch.Size((4, 512, 1024))  # 8 MiB of float32


def _find_included(source):
    """The names of the files that a C++ file includes from its own folder, and those that these include."""
    names = re.findall(r'^#include "(.+)"$', source.read_text("utf-8"), re.MULTILINE)
    return set(names).union(*(_find_included(source.with_name(name)) for name in names))


def test_all_files_of_the_kernels_are_built_as_one():
    folder = Path(cpu_forward.__file__).with_name("kernels")
    here = {path.name for path in folder.iterdir()}
    assert _find_included(folder / "decoding.cpp") == here - {"decoding.cpp"}


@pytest.fixture(params=find_levels())
def compiled(request):
    return load_level(request.param)


def _gate(h_SH):
    gate, linear = h_SH.chunk(2, dim=-1)
    return silu(gate) * linear


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (1, 1), (3, 16), (7, 67), (40, 256)])
@pytest.mark.parametrize("has_scale", [True, False])
def test_swiglu_and_its_gradient_equal_torchs(rows, width, has_scale, compiled):
    torch.manual_seed(0)
    h_SH, da_SF = torch.randn(rows, 2 * width) * 5, torch.randn(rows, width)
    scale_S = torch.rand(rows) if has_scale else None
    a_SF = compiled.swiglu(h_SH, torch.empty(1, width, 1))
    torch.testing.assert_close(a_SF, _gate(h_SH), rtol=1e-6, atol=1e-6)
    expected = cpu_forward._differentiate(_gate, h_SH.double(), da_SF.double(), scale_S)
    for actual, exact in zip(compiled.swiglu_gradient(h_SH, da_SF, scale_S), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-5, atol=1e-5)


def test_swiglu_of_numbers_at_the_ends_of_float32_is_torchs(compiled):
    gate = torch.tensor([0.0, -0.0, 1e-30, 1e30, -80.0, 80.0, -1e3, float("inf"), float("nan")])
    h_SH = torch.cat((gate, torch.ones_like(gate)))[None]
    a_SF = compiled.swiglu(h_SH, torch.empty(1, gate.numel(), 1))
    torch.testing.assert_close(a_SF, silu(gate)[None], rtol=1e-6, atol=1e-30, equal_nan=True)


def test_bfloat16_rows_are_the_float32_ones_rounded(compiled):
    h_SH = torch.randn(5, 2 * 37)
    stack = torch.empty(1, 4, 37, dtype=torch.bfloat16).mT
    a_SF = compiled.swiglu(h_SH, stack)
    exact = compiled.swiglu(h_SH, stack.float())
    assert torch.equal(a_SF.float(), exact.to(a_SF.dtype).float())
    assert compiled.swiglu(h_SH, stack.contiguous()).dtype == torch.float32  # those are multiplied by columns


@pytest.mark.parametrize("width", [1, 19, 64])
@pytest.mark.parametrize("num_here", [5, 3])
@pytest.mark.parametrize("has_weights", [True, False])
def test_sum_over_experts_equals_torchs_also_where_some_live_elsewhere(width, num_here, has_weights, compiled):
    torch.manual_seed(0)
    expert_TK = torch.rand(23, 5).topk(2).indices
    pairs = sort_pairs_by_expert(expert_TK, num_here, may_be_elsewhere=True)
    y_SD = torch.randn(pairs.order_S.shape[0], width)
    weight_TK = torch.rand(23, 2) if has_weights else None
    actual = compiled.sum_over_experts(y_SD, weight_TK, pairs)
    torch.testing.assert_close(actual, TorchProducts().sum_over_experts(y_SD, weight_TK, pairs))


def test_memory_comes_back_when_the_last_tensor_on_it_is_gone():
    memory = GradientMemory(1 << 30)
    tensor = memory.borrow(SHAPE, torch.float32).fill_(3)
    address, view = tensor.data_ptr(), tensor[1].mT
    del tensor
    assert memory.borrow(SHAPE, torch.float32).data_ptr() != address
    assert bool((view == 3).all())
    del view
    again = [memory.borrow(SHAPE, torch.float32) for _ in range(2)]
    assert address in [each.data_ptr() for each in again]
    assert memory.borrow(SHAPE, torch.bfloat16).data_ptr() not in [each.data_ptr() for each in again]


def test_what_waits_is_bounded_and_small_tensors_are_torchs_own():
    memory = GradientMemory(SHAPE.numel() * 4)
    tensors = [memory.borrow(SHAPE, torch.float32) for _ in range(3)]
    del tensors
    assert memory._waiting_bytes == SHAPE.numel() * 4
    memory.borrow(torch.Size((3, 5)), torch.float32)
    assert memory._waiting_bytes == SHAPE.numel() * 4


@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_on_used_memory_are_right_and_older_ones_stay_as_they_are(is_turned, dtype, compiled):
    torch.manual_seed(0)
    left, right = torch.randn(9, SHAPE[1]), torch.randn(9, SHAPE[2])
    if dtype == torch.bfloat16:  # numbers that stay as they are where rows are rounded to it
        left, right = left.bfloat16().float(), right.bfloat16().float()
    like = torch.empty(SHAPE, dtype=dtype)
    like = like.mT.contiguous().mT if is_turned else like
    ends = (4, 4, 7, 9)  # one expert without rows, whose gradient must be zero on any memory
    gradient = partial(compiled.stack_gradient, ends=ends, like_EAB=like)
    expected = TorchProducts().stack_gradient((left, None), (right, None), ends, like)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    first = gradient((left, None), (right, None))
    assert first.stride() == like.stride()
    assert first.dtype == dtype
    torch.testing.assert_close(first, expected, **tolerance)
    gradient((left * 2, None), (right, None))  # gone at once
    other = gradient((left * 4, None), (right, None))
    torch.testing.assert_close(
        other, expected * 4, **{**tolerance, "rtol": 2e-2 if tolerance else 1e-5, "atol": 2e-2 if tolerance else 1e-5}
    )
    torch.testing.assert_close(first, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_float32_whatever_torch_makes_by_default(dtype, compiled):
    torch.manual_seed(0)
    expert_TK = torch.tensor([[1, 0], [1, 2], [2, 0]])
    pairs = sort_pairs_by_expert(expert_TK, 3)
    x_TA, stack_EAB = torch.randn(3, 64), torch.randn(3, 96, 64).mT

    def compute():
        h_SH = compiled.multiply(x_TA, stack_EAB, pairs.ends, pairs.token_S)
        gradients = compiled.swiglu_gradient(h_SH, torch.ones(6, 48, dtype=torch.float32), None)
        return h_SH, compiled.swiglu(h_SH, stack_EAB), *gradients, compiled.sum_over_experts(h_SH, None, pairs)

    expected = compute()
    torch.set_default_dtype(dtype)
    try:
        found = compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype is other.dtype for one, other in zip(found, expected, strict=True))
