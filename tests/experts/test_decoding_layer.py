"""A decoder layer in two compiled calls against the modules it stands for, and whether it notices what they become."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from hub_moe.modeling import HubMoeConfig
from hub_moe.modeling.decoder_layer import HubMoeDecoderLayer, PreparedSteps
from hub_moe.modeling.layers import HubMoeRotaryEmbedding, find_steps
from tests.experts.test_decoding import decode, draw, steps  # noqa: F401  (a fixture)
from tests.modeling.stock_models import SHAPE

CACHED = 37
V2, V3 = {"scoring_func": "softmax"}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
ROUTINGS = {
    "a dense layer": {"first_k_dense_replace": 3},
    "without shared experts": {**V3, "n_shared_experts": None},
    "the best": {**V2, "topk_method": "greedy", "routed_scaling_factor": 2.0},
    "the best, normalised": {**V2, "topk_method": "greedy", "norm_topk_prob": True},
    "the best of the best groups": {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "with a bias": {**V3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "with a bias, by groups": {**V3, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "one expert": {**V3, "num_experts_per_tok": 1},
    "queries with a latent": {**V3, "q_lora_rank": 20, "rope_interleave": False},
}
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def make_layer(changes):
    """A layer whose router and attention have something to choose from."""
    config = HubMoeConfig(**{**SHAPE, **changes})
    config._attn_implementation, config._experts_implementation = "sdpa", "hub_moe"
    torch.manual_seed(0)
    layer = HubMoeDecoderLayer(config, 1).eval().requires_grad_(False)
    for name, tensor in layer.named_parameters():
        nn.init.uniform_(tensor) if "norm" in name else nn.init.normal_(tensor, std=0.3)
    for name, tensor in layer.named_buffers():
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.3)
    return layer


def run(layer, x, latents, mask, rotation, compiled=None):
    """What the layer gives, and the experts its router chose or None; with `compiled` by those steps."""
    cache, chosen = DynamicCache(), []
    for _ in range(2):
        cache.update(*[part.to(x.dtype) for part in latents], _)
    mask = mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask
    rotation = [part.to(x.dtype) for part in rotation]
    with torch.no_grad():
        if compiled is not None:
            return layer.decode(PreparedSteps(layer, compiled), x, rotation, mask, cache), None
        hook = None
        if hasattr(layer.mlp, "gate"):
            hook = layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2].sort().values))
        out = layer(x, attention_mask=mask, past_key_values=cache, position_embeddings=rotation)
        if hook is not None:
            hook.remove()
    return out, chosen[0] if chosen else None


def make_mask(kind, batch, new):
    if kind == "none":
        return None
    sees = torch.ones(batch, 1, new, CACHED + new, dtype=torch.bool).tril(CACHED)
    sees[0, :, :, :5] = False
    return sees if kind == "bool" else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("batch", "new", "kind"), [(1, 1, "none"), (2, 3, "bool"), (8, 1, "numbers")])
@pytest.mark.parametrize("changes", ROUTINGS.values(), ids=ROUTINGS)
def test_the_layer_in_float64(changes, batch, new, kind, dtype, steps, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "torch")
    layer = make_layer(changes).to(dtype)
    exact_layer = copy.deepcopy(layer).double()
    mask = make_mask(kind, batch, new)
    latents = draw(batch, 1, CACHED, 16, dtype=torch.float32), draw(batch, 1, CACHED, 8, dtype=torch.float32)
    latents = [part.bfloat16() for part in latents]
    for seed in range(200):  # to rows whose experts are no matter of rounding
        x = draw(batch, new, 32, dtype=dtype, seed=seed)
        rotation = HubMoeRotaryEmbedding(layer.self_attn.config)(x.float(), torch.arange(CACHED, CACHED + new)[None])
        rotation = [part.to(dtype) for part in rotation]
        expected, chosen = run(exact_layer, x.double(), latents, mask, rotation)
        _, by_rounded = run(layer, x, latents, mask, rotation)
        if chosen is None or torch.equal(chosen, by_rounded):
            break
    else:
        raise AssertionError("rounding always changes the experts")
    actual, _ = run(layer, x, latents, mask, rotation, compiled=steps)
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / (expected - x).norm()
    assert error <= TOLERANCES[dtype], error


def test_what_is_not_a_number_stays_so(steps):  # noqa: F811
    layer = make_layer(V3)
    x = draw(3, 1, 32, dtype=torch.float32)
    x[1] = torch.nan
    latents = draw(3, 1, CACHED, 16, dtype=torch.float32), draw(3, 1, CACHED, 8, dtype=torch.float32)
    rotation = HubMoeRotaryEmbedding(layer.self_attn.config)(x, torch.tensor([[CACHED]]))
    out, _ = run(layer, x, latents, None, rotation, compiled=steps)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_a_layer_called_by_itself_takes_the_same_steps(monkeypatch):
    monkeypatch.setenv("HUB_MOE_CPU_EXPERTS", "compiled")
    layer, x = make_layer(V3), draw(1, 1, 32, dtype=torch.float32)
    latents = draw(1, 1, CACHED, 16, dtype=torch.float32), draw(1, 1, CACHED, 8, dtype=torch.float32)
    rotation = HubMoeRotaryEmbedding(layer.self_attn.config)(x, torch.tensor([[CACHED]]))
    with torch.no_grad():
        by_steps, _ = run(layer, x, latents, None, rotation, compiled=find_steps(x))
    calls = []
    monkeypatch.setattr(layer, "decode", lambda *a, **k: calls.append(1) or HubMoeDecoderLayer.decode(layer, *a, **k))
    cache = DynamicCache()
    for index in range(2):
        cache.update(*latents, index)
    with torch.no_grad():
        assert torch.equal(layer(x, None, None, cache, True, rotation), by_steps)
    assert calls
