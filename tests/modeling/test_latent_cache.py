"""The cache layer with room behind its last token holds what transformers' own holds, whatever is done to it."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from hub_moe.modeling.latent_cache import LatentLayer, are_side_by_side, give_room, join

BATCH, LATENT, ROPE = 2, 6, 2


def _new(tokens, *, batch=BATCH, dtype=torch.float32):
    return torch.randn(batch, 1, tokens, LATENT).to(dtype), torch.randn(batch, 1, tokens, ROPE).to(dtype)


def _pair():
    """transformers' cache and one with our layers."""
    plain, ours = DynamicCache(), DynamicCache()
    give_room(ours, 0)
    return plain, ours


def _add(caches, tokens, **kind):
    keys, values = _new(tokens, **kind)
    results = [cache.update(keys, values, 0) for cache in caches]
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
    return results[1]


@pytest.mark.parametrize("change", [
    lambda cache: None,
    lambda cache: cache.crop(-3),
    lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    lambda cache: cache.batch_repeat_interleave(1),
    lambda cache: cache.reset(),
])  # fmt: skip
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_operation_on_a_cache_gives_what_transformers_gives(change, mode):
    with mode():
        caches = _pair()
        for tokens in (9, 1, 3, 1):
            _add(caches, tokens)
        for cache in caches:
            change(cache)
        for tokens in (1, 1, 70, 2, 1):
            _add(caches, tokens)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


@torch.no_grad()
def test_steps_write_behind_the_last_token_and_copy_nothing():
    _, ours = _pair()
    ours.update(*_new(40), 0)
    first, _ = ours.update(*_new(1), 0)
    later = [ours.update(*_new(1), 0) for _ in range(20)]
    assert {keys.data_ptr() for keys, _ in later} == {first.data_ptr()}
    assert are_side_by_side(*later[-1])
    joined = join(*later[-1])
    assert joined.data_ptr() == first.data_ptr()
    assert torch.equal(joined, torch.cat(later[-1], dim=-1))


@torch.no_grad()
def test_what_was_handed_out_never_changes():
    _, ours = _pair()
    ours.update(*_new(8), 0)
    held = ours.update(*_new(5), 0)
    before = [tensor.clone() for tensor in held]
    ours.crop(-4)
    ours.update(*_new(2), 0)
    ours.crop(-1)
    ours.update(*_new(6), 0)
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))


@torch.no_grad()
def test_copies_and_saved_caches_go_their_own_ways():
    plain, ours = _pair()
    for tokens in (9, 1):
        _add((plain, ours), tokens)
    file = io.BytesIO()
    torch.save(ours.layers[0], file)
    file.seek(0)
    loaded = DynamicCache()
    loaded.layers = [torch.load(file, weights_only=False)]
    for other in (copy.deepcopy(ours), loaded):
        twin = copy.deepcopy(plain)
        for tokens in (1, 2):
            _add((twin, other), tokens)
        _add((copy.deepcopy(plain), copy.deepcopy(ours)), 1)
        assert torch.equal(ours.layers[0].keys, plain.layers[0].keys)


def test_caches_of_inference_mode_go_on_outside_of_it():
    plain, ours = _pair()
    with torch.inference_mode():
        for tokens in (9, 1):
            _add((plain, ours), tokens)
    with torch.no_grad():
        _add((plain, ours), 1)
    with torch.inference_mode():
        _add((plain, ours), 1)


def test_gradients_flow_through_tokens_of_the_cache():
    _, ours = _pair()
    with torch.no_grad():
        ours.update(*_new(5), 0)
        ours.update(*_new(1), 0)
    keys, values = (tensor.requires_grad_() for tensor in _new(2))
    all_keys, _ = ours.update(keys, values, 0)
    with torch.no_grad():
        ours.update(*_new(1), 0)
    all_keys.square().sum().backward()
    torch.testing.assert_close(keys.grad, 2 * keys)


def test_only_plain_dynamic_layers_are_replaced(tiny_model):
    static = StaticCache(tiny_model.config, max_cache_len=8)
    give_room(static, 0)
    assert not any(isinstance(layer, LatentLayer) for layer in static.layers)
    assert not issubclass(QuantizedCache, DynamicCache)
    dynamic = DynamicCache(config=tiny_model.config)
    give_room(dynamic, 1)
    assert [type(layer) is LatentLayer for layer in dynamic.layers] == [False, True, False]


def test_model_keeps_its_latents_in_such_layers(tiny_model):
    tokens = torch.randint(2, 128, (1, 6))
    result = tiny_model.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    layers = result.past_key_values.layers
    assert all(type(layer) is LatentLayer and are_side_by_side(layer.keys, layer.values) for layer in layers)
