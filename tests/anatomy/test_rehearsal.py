import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hub_moe.anatomy import measure_footprint

from .families import FAMILIES, tiny_config


def allocate_cache(config, tokens):
    """The cache that a real bf16 model fills with `tokens` tokens: first all but three at once, then one by one."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    ids = torch.arange(tokens)[None] % config.vocab_size
    with torch.no_grad():
        for chunk in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
            model(chunk, past_key_values=cache, use_cache=True)
    return cache


def bytes_in(cache):
    states = [state for layer in cache.layers for state in _tensors(layer)]
    return sum(state.numel() * state.element_size() for state in states)


def _tensors(layer):
    for name in ("keys", "values"):
        if getattr(layer, name, None) is not None:
            yield getattr(layer, name)
    for name in ("conv_states", "recurrent_states"):
        yield from (state for state in getattr(layer, name, {}).values() if state is not None)


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_cache_is_as_large_as_one_that_is_really_allocated(model_type, tokens):
    config = tiny_config(model_type)

    assert measure_footprint(config).cache_bytes(tokens) == bytes_in(allocate_cache(config, tokens))


def test_latent_attention_keeps_one_latent_and_one_rotated_key_per_token_and_layer():
    config = tiny_config("deepseek_v3")
    values = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)

    assert measure_footprint(config).cache_bytes_per_token(100) == 2 * values


def test_other_attention_keeps_all_keys_and_values():
    config = tiny_config("qwen3_moe")
    values = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim

    assert measure_footprint(config).cache_bytes_per_token(100) == 2 * values


def test_sliding_layers_keep_one_token_less_than_their_window():
    config = tiny_config("gpt_oss")
    footprint = measure_footprint(config)

    assert [layer.window for layer in footprint.rehearsal.cache] == [11, None, 11]
    assert footprint.cache_bytes_per_token(5) == 3 * footprint.cache_bytes_per_token(100)


def test_linear_attention_keeps_a_state_that_does_not_grow():
    footprint = measure_footprint(tiny_config("qwen3_next"))
    first, _, last = footprint.rehearsal.cache

    assert (first.bytes_per_token, last.fixed_bytes) == (0, 0)
    assert first.size_bytes(1) == first.size_bytes(10_000) == first.fixed_bytes > 0
    assert len(footprint.rehearsal.attention) == 1


def test_compressed_history_of_a_familys_own_cache_grows_as_it_really_does():
    config = AutoConfig.for_model(
        "deepseek_v4",
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        partial_rotary_factor=0.5,
        num_experts_per_tok=2,
        n_routed_experts=4,
        layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["moe"] * 3,
        sliding_window=16,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        max_position_embeddings=1024,
    )
    footprint = measure_footprint(config)

    for tokens in (128, 512):  # between multiples of its compression ratio it also holds tokens not yet compressed
        cache = allocate_cache(config, tokens)
        tensors = {id(t): t for layer in cache.layers for value in vars(layer).values() for t in _tensors_in(value)}
        assert footprint.cache_bytes(tokens) == sum(tensor.nbytes for tensor in tensors.values())


def _tensors_in(value):
    values = value.values() if isinstance(value, dict) else [value]
    return [one for one in values if isinstance(one, torch.Tensor) and one.is_floating_point()]
