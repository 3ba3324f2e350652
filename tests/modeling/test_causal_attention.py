"""Whole sequences attend to their past in blocks: the same numbers as torch's own attention."""

import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3ForCausalLM

from hub_moe.modeling import HubMoeForCausalLM, layers
from hub_moe.modeling.causal_attention import attend_to_past
from tests.modeling.stock_models import VARIANTS, save_stock

SCALING = 0.3


@pytest.fixture
def block_calls(monkeypatch):
    """Shapes of the queries that were answered in blocks."""
    calls = []

    def attend(query_BHLX, *args, **kwargs):
        calls.append(tuple(query_BHLX.shape))
        return attend_to_past(query_BHLX, *args, **kwargs)

    monkeypatch.setattr(layers, "attend_to_past", attend)
    return calls


def _inputs(length, *, batch=2, heads=3, dtype=torch.float64, is_strided=False):
    torch.manual_seed(0)
    tensors = []
    for width in (12, 12, 8, 8):
        if is_strided:  # as projections give them
            tensor = torch.randn(batch, length, heads, width + 4).to(dtype).transpose(1, 2)[..., 4:]
        else:
            tensor = torch.randn(batch, heads, length, width).to(dtype)
        tensors.append(tensor)
    return tensors


def _run(attend, query, key, value, doutput):
    inputs = [each.detach().requires_grad_() for each in (query, key, value)]
    output = attend(*inputs)
    return [output, *torch.autograd.grad(output, inputs, doutput)]


def _ours(query, key, value):
    return attend_to_past(query, key, value, scaling=SCALING)


def _torchs(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALING)


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("is_strided", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_torchs_attention(length, is_strided, dtype):
    inputs = _inputs(length, dtype=dtype, is_strided=is_strided)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for actual, expected in zip(_run(_ours, *inputs), _run(_torchs, *inputs), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float64_as_torchs_attention(dtype):
    inputs = _inputs(200, dtype=dtype, is_strided=True)
    exact = _run(_torchs, *(each.double() for each in inputs))
    ours, torchs = _run(_ours, *inputs), _run(_torchs, *inputs)
    for actual, theirs, expected in zip(ours, torchs, exact, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= 1.02 * (theirs.double() - expected).norm()


def test_attention_weights_are_kept_for_gradients_alone():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._softmax.default:
                held.append(weakref.ref(output.untyped_storage()))
                alive.append(sum(each() is not None for each in held))
            return output

    for is_trained, most in ((True, 5), (False, 2)):
        held, alive = [], []
        inputs = [each.requires_grad_(is_trained) for each in _inputs(600)[:3]]
        with Watch():
            attend_to_past(*inputs, scaling=SCALING)
        assert max(alive) == most


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_and_prompts_of_more_than_one_block_equal_the_stock_class(variant, tmp_path, block_calls):
    stock = save_stock(variant, tmp_path).from_pretrained(tmp_path).train()
    ours = HubMoeForCausalLM.from_pretrained(tmp_path).train()
    tokens = torch.randint(2, 128, (2, 150))
    expected, actual = (model(tokens, labels=tokens) for model in (stock, ours))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    expected.loss.backward(), actual.loss.backward()
    for (name, parameter), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-5, msg=name)
    assert len(block_calls) == len(ours.model.layers)
    with torch.no_grad():
        prompts = [model.eval()(tokens, use_cache=True).logits for model in (stock, ours)]
    torch.testing.assert_close(*prompts, rtol=0, atol=1e-5)
    assert len(block_calls) == 2 * len(ours.model.layers)


def test_masks_dropout_short_sequences_autocast_and_other_implementations_are_left_to_transformers(
    tmp_path, block_calls
):
    save_stock("v3", tmp_path)
    ours = HubMoeForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(2, 128, (2, 150))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    ours(tokens, attention_mask=mask)
    ours(tokens[:, :128])
    with torch.autocast("cpu", torch.bfloat16):
        ours(tokens)
    stock = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    both_ways = [model(tokens, is_causal=False).logits for model in (ours, stock)]
    torch.testing.assert_close(*both_ways, rtol=0, atol=1e-5)
    assert not torch.allclose(both_ways[0], stock(tokens).logits, atol=1e-3)
    for layer in ours.model.layers:
        layer.self_attn.is_causal = False
    ours(tokens)
    for layer in ours.model.layers:
        layer.self_attn.is_causal = True
    ours.config.attention_dropout = 0.5
    ours.train()(tokens)
    ours.config.attention_dropout = 0.0
    ours.set_attn_implementation("eager")
    ours(tokens)
    assert not block_calls
    ours.set_attn_implementation("sdpa")
    ours(tokens)
    assert block_calls
