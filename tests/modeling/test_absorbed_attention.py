"""Decoding with absorbed weights: the same numbers as the expanded form and the stock class, wherever it is used."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from hub_moe.experts.decoding import PreparedLayer
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM, absorbed_attention, decoder_layer, half_products, layers
from hub_moe.modeling.absorbed_attention import LatentCache, attend_to_latents
from tests.modeling.stock_models import SHAPE, VARIANTS, save_stock

ATTENTION = HubMoeConfig(**{**SHAPE, "kv_lora_rank": 24, "num_attention_heads": 4, "num_key_value_heads": 4})


@pytest.fixture
def absorbed_calls(monkeypatch):
    """Shapes of the queries that were answered from the latents."""
    calls = []

    def attend(query_BHLX, *args, **kwargs):
        calls.append(tuple(query_BHLX.shape))
        return attend_to_latents(query_BHLX, *args, **kwargs)

    def finish(layer, x_BLD, query_BHLX, *args, **kwargs):
        calls.append(tuple(query_BHLX.shape))
        return in_one_call(layer, x_BLD, query_BHLX, *args, **kwargs)

    in_one_call = PreparedLayer.__call__
    monkeypatch.setattr(layers, "attend_to_latents", attend)
    monkeypatch.setattr(PreparedLayer, "__call__", finish)
    return calls


@pytest.fixture(params=["one kernel", "products", "compiled"])
def _way(request, monkeypatch):
    """All ways of attending to latents; which one of torch's a machine takes depends on its threads."""
    if request.param == "compiled":
        monkeypatch.delenv("HUB_MOE_CPU_EXPERTS", raising=False)  # asked for, they refuse float16
        return
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if request.param == "one kernel" else 99)


@pytest.fixture
def expands(monkeypatch):
    """Call to have every later step expanded."""

    def expand():
        for module, name in ((layers, "should_absorb"), (decoder_layer, "costs_less")):
            monkeypatch.setattr(module, name, lambda *_: False)

    return expand


def _models(variant, folder, *, dtype=torch.float32, implementation="sdpa"):
    """The stock model and ours with weights large enough for attention to choose."""
    stock = save_stock(variant, folder, dtype=dtype).from_pretrained(folder).eval()
    ours = HubMoeForCausalLM.from_pretrained(folder).eval()
    for model in (stock, ours):
        model.config._attn_implementation = implementation
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "self_attn" in name and name.endswith("proj.weight"):
                    parameter.mul_(6)
    return stock, ours


def _step_by_step(model, tokens, mask, *, prompt, steps, cache=None):
    """Logits of the tokens after the prompt, fed in pieces of `steps` tokens."""
    logits, cache = [], DynamicCache() if cache is None else cache
    with torch.no_grad():
        start = prompt
        model(tokens[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
        for step in steps:
            end = start + step
            output = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(output.logits)
            start = end
    return torch.cat(logits, dim=1)


def _padded_batch(side):
    tokens = torch.randint(2, 128, (3, 60))
    mask = torch.ones_like(tokens)
    for row, count in enumerate((0, 5, 11)):
        if count:
            mask[row, slice(0, count) if side == "left" else slice(30 - count, 30)] = 0
    return tokens, mask


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["v2_lite", "v3", "v3_half_rotation", "v2_biases"])
def test_float32_logits_of_cached_steps_equal_the_stock_class(variant, implementation, side, tmp_path, absorbed_calls):
    stock, ours = _models(variant, tmp_path, implementation=implementation)
    tokens, mask = _padded_batch(side)
    given = {"prompt": 30, "steps": (1, 1, 3, 1, 5, 2)}
    actual = _step_by_step(ours, tokens, mask, **given)
    assert len(absorbed_calls) == 3 * 6
    torch.testing.assert_close(actual, _step_by_step(stock, tokens, mask, **given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_the_stock_class(variant, tmp_path, absorbed_calls):
    stock, ours = _models(variant, tmp_path)
    tokens, mask = _padded_batch("left")
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **given), stock.generate(tokens, **given))
    assert {shape[2] for shape in absorbed_calls} == {1}


@pytest.mark.parametrize(
    "given", [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}]
)
def test_generation_that_reorders_or_crops_the_cache_equals_the_stock_class(given, tmp_path, absorbed_calls):
    stock, ours = _models("v3", tmp_path)
    tokens = torch.randint(2, 128, (1, 7)).repeat(1, 6)
    given = {**given, "max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    assert torch.equal(ours.generate(tokens, **given), stock.generate(tokens, **given))
    assert absorbed_calls


def test_verified_mtp_drafts_are_answered_from_the_latents(tiny_config, absorbed_calls):
    tiny_config.num_mtp_layers = 2
    model = HubMoeForCausalLM(tiny_config).eval()
    prompt = torch.randint(2, 128, (1, 30))
    greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)
    absorbed_calls.clear()
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False, use_mtp=True), greedy)
    assert 3 in {shape[2] for shape in absorbed_calls}


def test_static_cache_equals_the_dynamic_one(tmp_path, absorbed_calls):
    _, ours = _models("v3", tmp_path)
    tokens, mask = _padded_batch("left")
    given = {"prompt": 30, "steps": (1, 3, 1)}
    expected = _step_by_step(ours, tokens, mask, **given)
    absorbed_calls.clear()
    cache = StaticCache(ours.config, max_cache_len=64)
    torch.testing.assert_close(_step_by_step(ours, tokens, mask, cache=cache, **given), expected, rtol=0, atol=1e-5)
    assert [shape[2] for shape in absorbed_calls[-9:]] == [1] * 3 + [3] * 3 + [1] * 3


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_compiled_steps_are_one_graph_without_the_expansion_and_equal_eager_ones(cache_class, tmp_path):
    _, ours = _models("v3", tmp_path)
    tokens, mask = _padded_batch("left")
    given = {"prompt": 30, "steps": (1, 1, 3, 1, 3)}

    def cache():
        return StaticCache(ours.config, max_cache_len=64) if cache_class is StaticCache else DynamicCache()

    expected = _step_by_step(ours, tokens, mask, cache=cache(), **given)
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    attention = ours.model.layers[1].self_attn
    attention.forward = torch.compile(attention.forward, backend=record, fullgraph=True)
    torch.testing.assert_close(_step_by_step(ours, tokens, mask, cache=cache(), **given), expected, rtol=0, atol=1e-5)
    assert sum("bmm" in code for code in graphs) >= 2
    assert all("scaled_dot_product_attention" not in code for code in graphs if "bmm" in code)
    torch.compiler.reset()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_fast", [True, False])
def test_half_precision_is_as_close_to_float32_as_the_expanded_form(dtype, is_fast, tmp_path, monkeypatch, expands):
    """Errors against the same 16-bit weights in float32, with both ways of running 16-bit products."""
    _, ours = _models("v3", tmp_path, dtype=dtype)
    monkeypatch.setattr(absorbed_attention, "has_fast_products", lambda *_: is_fast)
    tokens, mask = _padded_batch("left")
    given = {"prompt": 30, "steps": (1, 3, 1, 1)}
    absorbed = _step_by_step(ours, tokens, mask, **given)
    assert absorbed.dtype == dtype
    expands()
    expanded = _step_by_step(ours, tokens, mask, **given)
    exact = _step_by_step(copy.deepcopy(ours).float(), tokens, mask, **given)
    error, usual = ((logits.float() - exact).abs().mean() for logits in (absorbed, expanded))
    assert error <= 1.25 * usual


def _inputs(batch, new, cached, *, dtype=torch.float64):
    width = ATTENTION.qk_nope_head_dim + ATTENTION.qk_rope_head_dim
    rows = ATTENTION.qk_nope_head_dim + ATTENTION.v_head_dim
    shapes = ((batch, 4, new, width), (batch, cached, 24), (batch, cached, 8), (4, rows, 24))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _expanded(query_BHLX, latent_BSC, rope_BSR, weight_HXC, *, mask, scaling):
    """The definition: keys and values of every head."""
    both_BHSX = torch.einsum("bsc,hxc->bhsx", latent_BSC, weight_HXC)
    keys, value = both_BHSX.split([ATTENTION.qk_nope_head_dim, ATTENTION.v_head_dim], dim=-1)
    key = torch.cat((keys, rope_BSR[:, None].expand(-1, 4, -1, -1)), dim=-1)
    output = nn.functional.scaled_dot_product_attention(query_BHLX, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2)


def _mask(kind, batch, new, cached):
    seen = torch.ones(batch, 1, new, cached, dtype=torch.bool).tril(cached - new)
    seen[0, :, :, : cached // 2] = False
    if kind == "a row sees nothing":
        seen[0, :, 0] = False
    if kind == "one per head":
        seen = seen.repeat(1, 4, 1, 1)
        seen[:, 1, :, 0] = True
    if kind == "numbers":
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    return None if kind == "none" else seen


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("kind", ["none", "seen", "one per head", "numbers", "a row sees nothing"])
@pytest.mark.parametrize(("batch", "new", "cached"), [(1, 1, 1), (1, 1, 37), (3, 5, 13), (2, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_expanded_form(kind, batch, new, cached, dtype):
    mask = _mask(kind, batch, new, cached)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    inputs = _inputs(batch, new, cached, dtype=dtype)
    query, latent, rope, weight = inputs
    actual, _ = attend_to_latents(query, LatentCache(latent, rope), weight, mask=mask, scaling=0.3)
    expected = _expanded(*inputs, mask=mask, scaling=0.3)
    tolerance = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-4}
    torch.testing.assert_close(actual, expected, **tolerance)
    with torch.no_grad():
        actual_alone, _ = attend_to_latents(query, LatentCache(latent, rope), weight, mask=mask, scaling=0.3)
    torch.testing.assert_close(actual_alone, expected, **tolerance)
    probe = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, inputs, probe)
    for gradient, twin in zip(gradients, torch.autograd.grad(expected, inputs, probe), strict=True):
        torch.testing.assert_close(gradient, twin, **tolerance)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("is_fast", [True, False])
def test_half_precision_gradients_equal_those_of_the_expanded_form_in_float32(is_fast, monkeypatch):
    """Over more cached tokens than one block of casts holds."""
    monkeypatch.setattr(absorbed_attention, "has_fast_products", lambda *_: is_fast)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in _inputs(2, 3, 1100)]
    query, latent, rope, weight = inputs
    mask = _mask("seen", 2, 3, 1100)
    actual, _ = attend_to_latents(query, LatentCache(latent, rope), weight, mask=mask, scaling=0.3)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = _expanded(*wide, mask=mask, scaling=0.3)
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    probe = torch.randn_like(expected)
    twins = torch.autograd.grad(expected, wide, probe)
    for gradient, twin in zip(torch.autograd.grad(actual, inputs, probe.bfloat16()), twins, strict=True):
        torch.testing.assert_close(gradient.float(), twin, rtol=0.02, atol=0.02 * twin.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wants_gradients", [True, False])
def test_gpu_gives_what_the_cpu_gives_in_float64(dtype, wants_gradients):
    inputs = [(tensor.detach() * 0.5).to("cuda", dtype) for tensor in _inputs(2, 3, 1100)]
    query, latent, rope, weight = inputs
    mask = _mask("seen", 2, 3, 1100)
    with torch.set_grad_enabled(wants_gradients):
        actual, _ = attend_to_latents(query, LatentCache(latent, rope), weight, mask=mask.cuda(), scaling=0.3)
    expected = _expanded(*(tensor.double().cpu() for tensor in inputs), mask=mask, scaling=0.3)
    share = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=share, atol=share * expected.abs().max().item())


def test_gradients_of_a_model_that_continues_a_cache_equal_the_expanded_forms(tmp_path, absorbed_calls, expands):
    _, ours = _models("v3", tmp_path)
    tokens = torch.randint(2, 128, (2, 40))

    def gradients():
        cache = DynamicCache()
        ours.train()
        ours(tokens[:, :35], past_key_values=cache)
        ours.zero_grad()
        ours(tokens[:, 35:], labels=tokens[:, 35:], past_key_values=cache).loss.backward()
        return {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}

    actual = gradients()
    assert absorbed_calls
    expands()
    expected = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5, msg=name)


def test_attention_weights_of_eager_steps_equal_the_stock_class(tmp_path, absorbed_calls):
    stock, ours = _models("v3", tmp_path, implementation="eager")
    tokens, _ = _padded_batch("left")
    weights = []
    for model in (stock, ours):
        cache = DynamicCache()
        with torch.no_grad():
            model(tokens[:, :50], past_key_values=cache)
            weights.append(model(tokens[:, 50:53], past_key_values=cache, output_attentions=True).attentions)
    assert absorbed_calls
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_way")
def test_weights_that_are_not_contiguous_and_caches_that_are_slices_are_read_right():
    query, latent, rope, weight = (tensor.detach() for tensor in _inputs(2, 2, 9))
    whole = torch.cat((latent, rope), dim=-1)
    sliced = LatentCache(whole[..., :24], whole[..., 24:])
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expected = _expanded(query, latent, rope, weight, mask=None, scaling=0.3)
    actual, _ = attend_to_latents(
        query.transpose(0, 1).contiguous().transpose(0, 1), sliced, turned, mask=None, scaling=0.3
    )
    torch.testing.assert_close(actual, expected)


def _adapt(attention):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            return self.base(x) * 2

    attention.kv_b_proj = Adapter(attention.kv_b_proj)


def _hook(attention):
    attention.kv_b_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def _replace_forward(attention):
    plain = attention.kv_b_proj.forward
    attention.kv_b_proj.forward = lambda x: plain(x) * 2


@pytest.mark.parametrize("change", [_adapt, _hook, _replace_forward])
def test_projection_that_is_more_than_its_weight_is_called_and_not_absorbed(change, tmp_path, absorbed_calls):
    _, ours = _models("v3", tmp_path)
    for layer in ours.model.layers:
        change(layer.self_attn)
    tokens, mask = _padded_batch("left")
    stepwise = _step_by_step(ours, tokens, mask, prompt=30, steps=(1, 2))
    with torch.no_grad():
        whole = ours(tokens[:, :33], attention_mask=mask[:, :33]).logits[:, 30:]
    assert not absorbed_calls
    torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-5)


def test_prompts_training_and_long_continuations_are_expanded(tmp_path, absorbed_calls):
    _, ours = _models("v3", tmp_path)
    tokens = torch.randint(2, 128, (1, 200))
    ours(tokens)
    ours.train()(tokens, labels=tokens)
    cache = DynamicCache()
    ours.eval()(tokens[:, :50], past_key_values=cache)
    ours(tokens[:, 50:], past_key_values=cache)
    assert not absorbed_calls
    ours(tokens[:, :3], past_key_values=cache)
    assert len(absorbed_calls) == 3


@pytest.mark.parametrize(("new", "expected"), [(1, True), (64, True), (120, True), (130, False), (512, False)])
def test_crossover_of_deepseeks_sizes_is_at_125_new_tokens(new, expected):
    config = HubMoeConfig(
        hidden_size=16, num_attention_heads=1, num_key_value_heads=1, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, attn_implementation="sdpa",
    )  # fmt: skip
    attention = layers.HubMoeAttention(config, 0)
    cached = 16384
    query, latent, mask = torch.empty(1, 1, new, 192), torch.empty(1, 1, cached, 512), torch.empty(1, 1, new, cached)
    assert absorbed_attention.should_absorb(attention, query, latent, mask) is expected


def test_what_the_processor_does_with_half_precision_is_measured_once(monkeypatch):
    half_products._is_fast_on_cpu.cache_clear()
    timed = []
    seconds = half_products._seconds
    monkeypatch.setattr(half_products, "_seconds", lambda dtype: timed.append(dtype) or seconds(dtype))
    answers = {half_products.has_fast_products(torch.bfloat16, "cpu") for _ in range(3)}
    assert len(answers) == 1
    assert timed == [torch.bfloat16, torch.float32]
    assert half_products.has_fast_products(torch.float32, "cpu")
    assert half_products.has_fast_products(torch.bfloat16, "cuda")
