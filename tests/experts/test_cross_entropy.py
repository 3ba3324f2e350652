"""The compiled cross-entropy against torch's, its slow twin, values and gradients."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from hub_moe.experts.compiled_products import SpareMemory, find_levels
from hub_moe.experts.cross_entropy import token_losses

pytestmark = pytest.mark.skipif(not find_levels(), reason="no compiled products for this processor")
IGNORED = -100
INFINITY = float("inf")


def twin(logits_TV, label_T, ignore_index=IGNORED):
    return nn.functional.cross_entropy(logits_TV, label_T, ignore_index=ignore_index, reduction="none")


def in_float64(logits_TV, label_T, dloss_T):
    """Losses and gradient of exactly these logits."""
    wide_TV = logits_TV.detach().double().requires_grad_()
    losses_T = twin(wide_TV, label_T)
    losses_T.backward(dloss_T.double())
    return losses_T.detach(), wide_TV.grad


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 2, 7, 15, 16, 17, 31, 33, 1000, 1024, 1040, 2051]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 99),
)
def test_losses_and_gradient_are_those_of_float64(tokens, vocabulary, dtype, seed):
    torch.manual_seed(seed)
    logits_TV = (4 * torch.randn(tokens, vocabulary) - 90 * torch.rand(1)).to(dtype).requires_grad_()
    label_T = torch.where(torch.rand(tokens) < 0.2, IGNORED, torch.randint(0, vocabulary, (tokens,)))
    dloss_T = torch.randn(tokens)
    losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
    losses_T.backward(dloss_T)
    expected_T, gradient_TV = in_float64(logits_TV, label_T, dloss_T)
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=1e-6, atol=1e-6)
    assert logits_TV.grad.dtype is dtype
    rounding = {"rtol": 2**-8, "atol": 2e-6} if dtype is torch.bfloat16 else {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(logits_TV.grad.double(), gradient_TV, **rounding)
    assert not losses_T[label_T == IGNORED].any()
    assert not logits_TV.grad[label_T == IGNORED].any()


def test_a_large_vocabulary_costs_no_precision():
    torch.manual_seed(0)
    logits_TV, label_T = torch.randn(4, 129280, requires_grad=True), torch.tensor([0, 129279, 5, 7])
    losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
    losses_T.sum().backward()
    expected_T, gradient_TV = in_float64(logits_TV, label_T, torch.ones(4))
    torch.testing.assert_close(losses_T.double(), expected_T, rtol=1e-7, atol=0)
    torch.testing.assert_close(logits_TV.grad.double(), gradient_TV, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -INFINITY, 1.0],  # a token that is not allowed
        [-INFINITY, 0.0, 1.0],  # the label is not
        [-INFINITY, -INFINITY, -INFINITY],
        [INFINITY, 0.0, 1.0],
        [0.0, INFINITY, 1.0],
        [0.0, float("nan"), 1.0],
        [3e38, -3e38, 0.0],
        [-3e38, -3.1e38, -3.2e38],
    ],
)
@pytest.mark.parametrize("width", [3, 40])
def test_numbers_without_an_end_come_out_as_in_torch(row, width):
    logits_TV = torch.tensor([row + [-5.0] * (width - 3), [0.0] * width], requires_grad=True)
    label_T = torch.tensor([0, 1])
    found = []
    for losses_T in (token_losses(logits_TV, label_T, ignore_index=IGNORED), twin(logits_TV, label_T)):
        found.append((losses_T.detach(), *torch.autograd.grad(losses_T.sum(), logits_TV)))
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_rows_may_lie_anywhere_and_another_label_be_ignored():
    torch.manual_seed(0)
    logits_VT, label_T2 = torch.randn(30, 4), torch.tensor([[1, 0], [7, 0], [29, 0], [7, 0]])
    label_T = label_T2[:, 0]
    actual_T = token_losses(logits_VT.mT, label_T, ignore_index=7)
    torch.testing.assert_close(actual_T, twin(logits_VT.mT, label_T, ignore_index=7))
    assert actual_T[1] == actual_T[3] == 0


def test_bits_depend_on_no_number_of_threads():
    torch.manual_seed(0)
    logits_TV, label_T = torch.randn(64, 5000, requires_grad=True), torch.randint(0, 5000, (64,))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
            found.append((losses_T, *torch.autograd.grad(losses_T.sum(), logits_TV)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_only_the_gradient_is_as_large_as_the_logits():
    kept = []
    logits_TV = torch.randn(8, 1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_losses(logits_TV, torch.arange(8), ignore_index=IGNORED)
    assert [each.shape for each in kept if each.data_ptr() != logits_TV.data_ptr()] == [(8,)]  # the labels


@pytest.mark.parametrize(
    ("logits_TV", "label_T"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])),
        (torch.zeros(2, 3, dtype=torch.float16), torch.tensor([0, 1])),
        (torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32)),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0, -1])),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2])),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1])),
        (torch.zeros(2, 3, device="meta"), torch.tensor([0, 1])),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64, device="meta")),
    ],
)
def test_what_does_not_fit_is_left_to_torch(logits_TV, label_T):
    assert token_losses(logits_TV, label_T, ignore_index=IGNORED) is None


def test_no_tokens_have_no_losses():
    logits_TV = torch.zeros(0, 5, requires_grad=True)
    losses_T = token_losses(logits_TV, torch.zeros(0, dtype=torch.int64), ignore_index=IGNORED)
    losses_T.sum().backward()
    assert losses_T.shape == (0,)
    assert logits_TV.grad.shape == (0, 5)


def test_torch_computes_where_it_was_asked_to(monkeypatch):
    given = torch.zeros(2, 3), torch.tensor([0, 1])
    assert token_losses(*given, ignore_index=IGNORED) is not None
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    assert token_losses(*given, ignore_index=IGNORED) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
def test_transforms_and_autocast_see_the_operations():
    label_T = torch.tensor([0, 1])

    def found(logits_TV):
        assert token_losses(logits_TV, label_T, ignore_index=IGNORED) is None
        return twin(logits_TV, label_T).sum()

    logits_TV = torch.randn(2, 3)
    torch.func.grad(found)(logits_TV)
    with forward_ad.dual_level():
        dual_TV = forward_ad.make_dual(logits_TV, torch.ones(2, 3))
        assert token_losses(dual_TV, label_T, ignore_index=IGNORED) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found(logits_TV)


def test_it_is_differentiable_twice():
    torch.manual_seed(0)
    logits_TV, label_T, dloss_T = torch.randn(3, 5, requires_grad=True), torch.tensor([4, IGNORED, 0]), torch.rand(3)
    found = []
    for losses_T in (token_losses(logits_TV, label_T, ignore_index=IGNORED), twin(logits_TV, label_T)):
        (gradient_TV,) = torch.autograd.grad(losses_T @ dloss_T, logits_TV, create_graph=True)
        found.append((gradient_TV.detach(), *torch.autograd.grad(gradient_TV.square().sum(), logits_TV)))
    torch.testing.assert_close(*found)


def as_in_torch(logits_TV, label_T):
    losses_T = twin(logits_TV, label_T)
    return losses_T.detach(), *torch.autograd.grad(losses_T.sum(), logits_TV)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_torch_makes_by_default_does_not_matter(dtype):
    torch.manual_seed(0)
    logits_TV, label_T = torch.randn(64, 50, requires_grad=True), torch.randint(0, 50, (64,))
    expected = as_in_torch(logits_TV, label_T)
    torch.set_default_dtype(dtype)
    try:
        losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
        found = losses_T.detach(), *torch.autograd.grad(losses_T.sum(), logits_TV)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert token_losses(logits_TV, label_T, ignore_index=IGNORED).device.type == "cpu"
    torch.testing.assert_close(found, expected)


def unpack_strided(x):
    return torch.stack([x, x], -1)[..., 0]


def unpack_others(x):
    return x.double() if x.is_floating_point() else x.int()


def unpack_halves(x):
    return x.half() if x.is_floating_point() else x


@pytest.mark.parametrize("unpack", [unpack_strided, unpack_others, unpack_halves])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_may_give_back_another_kind_of_what_was_saved(unpack, dtype):
    torch.manual_seed(0)
    logits_TV, label_T = torch.randn(8, 50).to(dtype).requires_grad_(), torch.randint(0, 50, (8,))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
    (actual,) = torch.autograd.grad(losses_T.sum(), logits_TV)
    _, expected = as_in_torch(logits_TV.detach().float().requires_grad_(), label_T)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps if unpack is unpack_halves else 0)
    torch.testing.assert_close(actual.float(), expected, rtol=3 * rounding, atol=1e-6)


def test_a_hook_that_gives_back_another_shape_is_an_error():
    logits_TV, label_T = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x[:1]):
        losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
    with pytest.raises(RuntimeError, match="shape"):
        losses_T.sum().backward()


def test_a_label_changed_behind_autograds_back_writes_nowhere_else():
    logits_TV, label_T = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
    label_T.data[1] = 1 << 40
    with pytest.raises(RuntimeError, match="out of bounds"):
        losses_T.sum().backward()


def test_memory_that_holds_other_numbers_is_not_read():
    logits_TV, label_T = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for other_TV in (torch._neg_view(logits_TV), torch._efficientzerotensor((4, 5))):
        assert token_losses(other_TV, label_T, ignore_index=IGNORED) is None
    for no_label in (None, -100.0, True):
        assert token_losses(logits_TV, label_T, ignore_index=no_label) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use of it
def test_transforms_of_the_gradient_see_its_operations():
    torch.manual_seed(0)
    logits_TV, label_T, many_NT = torch.randn(3, 5, requires_grad=True), torch.tensor([4, IGNORED, 0]), torch.rand(2, 3)
    found = []
    for losses_T in (token_losses(logits_TV, label_T, ignore_index=IGNORED), twin(logits_TV, label_T)):
        (batched,) = torch.autograd.grad(losses_T, logits_TV, many_NT, is_grads_batched=True, retain_graph=True)
        with forward_ad.dual_level():
            dual_T = forward_ad.make_dual(torch.ones(3), torch.full((3,), 2.0))
            (gradient_TV,) = torch.autograd.grad(losses_T, logits_TV, dual_T)
            found.append((batched, forward_ad.unpack_dual(gradient_TV).tangent))
    torch.testing.assert_close(*found)


def test_gradients_of_changing_sizes_leave_one_block_behind():
    memory, sizes = SpareMemory(), [3 << 20, 2 << 20, 5 << 20, 4 << 20]
    for size in sizes:
        borrowed = memory.borrow(torch.Size((size,)), torch.float32).fill_(1.0)
        other = memory.borrow(torch.Size((size,)), torch.float32)
        assert other.data_ptr() != borrowed.data_ptr()
        del borrowed, other
    assert [len(block) for block in memory._spare] == [4 * max(sizes)]
    assert memory.borrow(torch.Size((2 << 20,)), torch.bfloat16).dtype is torch.bfloat16


def test_threads_that_train_at_once_do_not_share_a_gradient():
    torch.manual_seed(0)
    label_T = torch.arange(2000) % 700
    inputs = [torch.randn(2000, 700, requires_grad=True) for _ in range(4)]  # 5 MiB, which are borrowed
    expected = [as_in_torch(each, label_T)[1] for each in inputs]

    def train(logits_TV):
        found = []
        for _ in range(12):
            losses_T = token_losses(logits_TV, label_T, ignore_index=IGNORED)
            found = [*found[-1:], *torch.autograd.grad(losses_T.sum(), logits_TV)]
        return found[-1]

    with ThreadPoolExecutor(4) as pool:
        for actual, exact in zip(pool.map(train, inputs), expected, strict=True):
            torch.testing.assert_close(actual, exact)
