"""Compiled decoding steps against the plain modules they stand for, in float64 where that is what both round."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hub_moe.experts import decoding
from hub_moe.experts.compiled_products import find_levels, load_level
from hub_moe.experts.decoding import DecodingSteps, FeedForward, Norm, Routed, find_steps
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM, layers
from hub_moe.modeling.absorbed_attention import LatentCache, attend_to_latents
from tests.modeling.stock_models import SHAPE

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(params=find_levels())
def steps(request):
    return DecodingSteps(load_level(request.param).library)


@pytest.fixture
def tiny_model():
    """Weights large enough for attention and router to choose."""
    torch.manual_seed(0)
    model = HubMoeForCausalLM(HubMoeConfig(**{**SHAPE, "num_mtp_layers": 0})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def draw(*shape, dtype, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_near(actual, expected, dtype):
    """By the norm of the difference, relative to that of what was expected."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
    assert error <= TOLERANCES[dtype], error


@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 64, 40), (3, 33, 7), (5, 1030, 130), (8, 31, 3)])
def test_products_with_one_weight(sizes, dtype, steps):
    rows, width_in, width_out = sizes
    x, weight = draw(rows, width_in, dtype=dtype), draw(width_out, width_in, dtype=dtype)
    expected = x.double() @ weight.double().T
    assert_near(steps.linear(x[None], weight), expected[None], dtype)
    wide = steps.linear(x, weight, torch.float32)
    assert wide.dtype == torch.float32
    assert_near(wide, expected, torch.float32)
    assert_near(
        steps.linear(draw(width_in, rows, dtype=dtype).T, weight).T,
        weight.double() @ draw(width_in, rows, dtype=dtype).double(),
        dtype,
    )


@DTYPES
@pytest.mark.parametrize("width", [1, 15, 64, 530])
def test_norms(width, dtype, steps):
    x, weight = draw(2, 3, width, dtype=dtype), draw(width, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_near(steps.rms_norm(x, Norm(weight, 1e-6)), expected, dtype)


def test_what_is_not_a_number_stays_so(steps):
    weight = draw(8, 8, dtype=torch.float32)
    x = torch.full((1, 8), float("nan"))
    assert steps.linear(x, weight).isnan().all()
    assert steps.feed_forward(x, FeedForward(weight, weight, weight)).isnan().all()


def expected_block(x, gate, up, down):
    x, gate, up, down = (each.double() for each in (x, gate, up, down))
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


ROUTES = {
    "one token": [[4, 0]],
    "an empty expert": [[0, 1], [3, 0], [2, 1]],
    "all to one expert": [[3]] * 8,
    "one expert twice": [[2, 2]],
}


@DTYPES
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("sizes", [(24, 16), (70, 37), (130, 65)])
def test_feed_forward_blocks(sizes, route, dtype, steps):
    hidden, inner = sizes
    expert_TK = torch.tensor(route)
    x, weight_TK = draw(len(route), hidden, dtype=dtype), draw(*expert_TK.shape, dtype=torch.float32)
    shared = FeedForward(
        *(draw(inner + 3, hidden, dtype=dtype, scale=hidden**-0.5, seed=seed) for seed in (1, 2)),
        draw(hidden, inner + 3, dtype=dtype, scale=inner**-0.5),
    )
    gate_up = draw(5, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
    down = draw(5, hidden, inner, dtype=dtype, scale=inner**-0.5)
    expected = expected_block(x, *shared)
    assert_near(steps.feed_forward(x, shared), expected, dtype)
    for token, chosen in enumerate(route):
        for place, expert in enumerate(chosen):
            block = expected_block(x[token], *gate_up[expert].chunk(2), down[expert])
            expected[token] += weight_TK[token, place].double() * block
    routed = Routed(gate_up, down, expert_TK, weight_TK)
    assert_near(steps.feed_forward(x, shared, routed), expected, dtype)
    assert_near(steps.feed_forward(x, None, routed), expected - expected_block(x, *shared), dtype)
    for wrong in (-1, 5):
        assert steps.feed_forward(x, shared, routed._replace(expert_TK=torch.full_like(expert_TK, wrong))) is None


def make_mask(kind, batch, new, cached):
    """Each query sees up to itself; the first sequence has padding in front, its first query sees nothing at all."""
    sees = torch.ones(batch, 1, new, cached, dtype=torch.bool).tril(cached - new)
    sees[0, :, :, : cached // 2] = False
    sees[0, :, 0] = False
    return {
        "none": None,
        "bool": sees,
        "one for all": sees[-1:, :, :, :],
        "per head": sees.repeat(1, 3, 1, 1),
        **{str(dtype): torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
           for dtype in (torch.float32, torch.bfloat16, torch.float64)},
        "infinite": torch.zeros(sees.shape).masked_fill(~sees, float("-inf")),
    }[kind]  # fmt: skip


@DTYPES
@pytest.mark.parametrize(
    "kind", ["none", "bool", "one for all", "per head", "torch.float32", "torch.bfloat16", "torch.float64", "infinite"]
)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 64), (1, 1, 63, 32), (2, 3, 577, 40), (8, 1, 66, 19), (1, 2, 1100, 33)])
@pytest.mark.parametrize("is_joined", [True, False])
def test_attention_over_latents(is_joined, sizes, kind, dtype, steps):
    batch, new, cached, latent_size = sizes
    heads, key_rows, rope_size, value_size = 3, 21, 10, 9
    mask = make_mask(kind, batch, new, cached)
    query = draw(batch, heads, new, key_rows + rope_size, dtype=dtype)
    both = draw(batch, cached + 5, latent_size + rope_size, dtype=dtype)[:, :cached]
    cache = LatentCache(both[..., :latent_size], both[..., latent_size:])
    if not is_joined:
        cache = LatentCache(*(part.contiguous() for part in cache))
    weight = draw(heads, key_rows + value_size, latent_size, dtype=dtype, scale=latent_size**-0.5)
    given = {"mask": mask, "scaling": 0.3}
    wide = [query.double(), LatentCache(*(part.double() for part in cache)), weight.double()]
    expected, _ = attend_to_latents(*wide, **given)
    actual, weights = attend_to_latents(query, cache, weight, **given, steps=steps)
    assert weights is None
    assert actual.dtype == dtype
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF], ids=hex)
def test_attention_to_a_number_that_is_none_gives_none_whatever_its_bits(bits, steps):
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    query, weight = draw(1, 3, 1, 7 + 4, dtype=torch.float32), draw(3, 7 + 6, 8, dtype=torch.float32)
    cache = LatentCache(draw(1, 5, 8, dtype=torch.float32), draw(1, 5, 4, dtype=torch.float32))
    cache[1][0, 2, 3] = nan
    assert attend_to_latents(query, cache, weight, mask=None, scaling=1.0, steps=steps)[0].isnan().all()


@DTYPES
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("rope_in_float32", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_projections_in_front_of_attention(shape, rope_in_float32, q_lora_rank, interleave, dtype, steps, monkeypatch):
    config = HubMoeConfig(
        **{**SHAPE, "q_lora_rank": q_lora_rank, "rope_interleave": interleave, "rope_in_float32": rope_in_float32}
    )
    torch.manual_seed(0)
    attention = layers.HubMoeAttention(config, 0).to(dtype).eval()
    for norm in (attention.kv_a_layernorm, *([attention.q_a_layernorm] if q_lora_rank else [])):
        nn.init.uniform_(norm.weight)
    hidden = draw(*shape, config.hidden_size, dtype=dtype)
    positions = torch.arange(40, 40 + shape[1])[None]
    with torch.no_grad():
        rotation = layers.HubMoeRotaryEmbedding(config)(hidden, positions)
        monkeypatch.setattr(decoding, "find_steps", lambda *_: steps)
        actual = attention._project(hidden, rotation)
        monkeypatch.setattr(decoding, "find_steps", lambda *_: None)
        exact = [part.double() for part in rotation]
        expected = attention.double()._project(hidden.double(), exact)
    for ours, exactly in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, exactly, dtype)


def decode(model, tokens, mask, *, prompt=20):
    """Logits of single steps, and of three tokens at once, after a prompt."""
    cache, logits, start = DynamicCache(), [], 0
    with torch.no_grad():
        for step in (prompt, 1, 1, 2, 1):
            given = {"past_key_values": cache, "attention_mask": mask[:, : start + step]}
            logits.append(model(tokens[:, start : start + step], **given).logits)
            start += step
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_models_logits_and_tokens_are_those_of_torch_alone(batch, tiny_model, monkeypatch):
    tokens = torch.randint(2, 128, (batch, 25))
    mask = torch.ones_like(tokens)
    mask[-1, : 7 * (batch > 1)] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    expected, expected_tokens = decode(tiny_model, tokens, mask), tiny_model.generate(tokens, **given)
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    torch.testing.assert_close(decode(tiny_model, tokens, mask), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert torch.equal(tiny_model.generate(tokens, **given), expected_tokens)


def test_bfloat16_logits_are_no_further_off_than_those_of_torch_alone(tiny_model, monkeypatch):
    tokens = torch.randint(2, 128, (8, 25), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    exact = decode(tiny_model.bfloat16().double(), tokens, mask)
    model, errors = tiny_model.bfloat16(), {}
    for asked in ("compiled", "torch"):
        monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", asked)
        errors[asked] = (decode(model, tokens, mask).double() - exact).abs().mean()
    assert errors["compiled"] <= 1.1 * errors["torch"]


def test_steps_are_for_few_plain_rows_without_gradients(monkeypatch):
    x = torch.ones(2, 4, 16)

    newest = max(decoding.INTERFACES)

    def has_steps(x=x, interface=newest):
        return find_steps(x, interface) is not None

    assert not has_steps()  # gradients
    with torch.no_grad():
        assert has_steps()
        assert has_steps(x.bfloat16())
        assert all(has_steps(interface=known) for known in decoding.INTERFACES)
        assert not has_steps(interface=newest + 1)
        for other in (x.double(), x.half(), x.to("meta"), nn.Parameter(x), x[:, :0], torch.ones(9, 16)):
            assert not has_steps(other)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not has_steps()
        with FlopCounterMode(display=False):
            assert not has_steps()
        monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
        assert not has_steps()


def _hook(model):
    model.model.layers[1].mlp.shared_experts.register_forward_hook(lambda *_: None)


def _other_implementation(model):
    model.set_experts_implementation("eager")


def _own_forward(model):
    experts = model.model.layers[1].mlp.experts
    experts.forward = type(experts).forward.__get__(experts)


def _other_activation(model):
    model.model.layers[1].mlp.experts.act_fn = nn.GELU()


def _strides(model):
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().mT.contiguous().mT)


def _hook_of_activation(model):
    model.model.layers[1].mlp.shared_experts.act_fn.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change", [_hook, _hook_of_activation, _other_implementation, _own_forward, _other_activation, _strides]
)
def test_a_module_that_is_more_than_its_weights_is_called(change, tiny_model, monkeypatch):
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    moe, x = tiny_model.model.layers[1].mlp, torch.ones(1, 1, tiny_model.config.hidden_size)
    with torch.no_grad():
        assert layers.find_steps(x, moe.experts, moe.shared_experts) is not None
        change(tiny_model)
        assert layers.find_steps(x, moe.experts, moe.shared_experts) is None
        moe(x)


def test_where_there_is_no_compiler_a_model_decodes_by_torch(tmp_path):
    code = (
        "import torch; from hub_moe.modeling import HubMoeForCausalLM, HubMoeConfig, layers\n"
        f"model = HubMoeForCausalLM(HubMoeConfig(**{SHAPE!r})).eval()\n"
        "model.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=3)\n"
        "with torch.no_grad(): assert layers.find_steps(torch.ones(1, 8)) is None\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("HUB_MOE_CPU_EXPERTS", None)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
