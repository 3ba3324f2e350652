import time
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from hub_moe.anatomy import measure_footprint
from hub_moe.errors import UnsupportedModelError
from hub_moe.modeling import HubMoeConfig

from .families import FAMILIES, tiny_config

_QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
_OLMOE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
_DEEPSEEK_MOE_16B = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}


def preset(name):
    return lambda: HubMoeConfig.from_preset(name)


def stock(model_type, **fields):
    return lambda: AutoConfig.for_model(model_type, **fields)


# Published figures in billions: all, active, and whether the publisher counts the input embedding as active.
# Sources: arXiv:2405.04434 (V2, V2-Lite), 2412.19437 (V3), 2502.16982 (Moonlight),
# 2401.06066 (16B), 2505.09388 (Qwen3), 2409.02060 (OLMoE), 2401.04088 (Mixtral), 2508.10925 (gpt-oss).
PUBLISHED = {
    "V2-Lite": (preset("deepseek-v2-lite"), 15.7, 2.4, False),
    "V2": (preset("deepseek-v2"), 236, 21, False),
    "V3": (preset("deepseek-v3"), 671, 37, False),
    "Moonlight": (preset("moonlight-16b-a3b"), 16, 3, False),
    "DeepSeekMoE-16B": (stock("deepseek", **_DEEPSEEK_MOE_16B), 16.4, 2.8, True),
    "Qwen3-30B-A3B": (stock("qwen3_moe", **_QWEN3_30B), 30.5, 3.3, True),
    "OLMoE": (stock("olmoe", **_OLMOE), 6.9, 1.3, True),
    "Mixtral-8x7B": (stock("mixtral"), 46.7, 12.9, True),
    "gpt-oss-120b": (stock("gpt_oss"), 116.8, 5.1, False),
    "gpt-oss-20b": (stock("gpt_oss", num_hidden_layers=24, num_local_experts=32), 20.9, 3.6, False),
}


@cache
def measure_published(name):
    build_config, *_ = PUBLISHED[name]
    return measure_footprint(build_config())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    _, published, published_active, counts_embedding = PUBLISHED[name]
    footprint = measure_published(name)
    active = footprint.num_active_with_embeddings if counts_embedding else footprint.num_active

    assert footprint.num_parameters / 1e9 == pytest.approx(published, abs=_last_digit(published))
    assert active / 1e9 == pytest.approx(published_active, abs=_last_digit(published_active))


def _last_digit(published):
    """Half a unit of the last digit, and a little: 2.45 was published as 2.4, and 3.35 as 3.3."""
    return 0.06 if isinstance(published, float) else 0.5


def test_fp8_weights_of_v3_are_as_large_as_its_files():
    footprint = measure_published("V3")
    copies_in_mtp_layer = 2 * 2 * 129280 * 7168  # embedding and head, which HubMoe does not hold twice
    files_bytes = 688_586_727_753  # of deepseek-ai/DeepSeek-V3, headers included

    assert footprint.weight_bytes()["fp8"] + copies_in_mtp_layer == pytest.approx(files_bytes, rel=1e-4)


def test_weight_formats_count_whole_blocks_and_groups_and_leave_the_rest_in_bf16():
    config = tiny_config("mixtral", hidden_size=160, num_hidden_layers=1, intermediate_size=96)
    footprint = measure_footprint(config)
    head_dim = 160 // 4
    projections = [(160, 160), (2 * head_dim, 160), (2 * head_dim, 160), (160, 160)]
    matrices = projections + 8 * [(2 * 96, 160), (160, 96)]
    covered = sum(rows * columns for rows, columns in matrices)
    rest_bytes = 2 * (footprint.num_parameters - covered)
    blocks = sum(-(-rows // 128) * -(-columns // 128) for rows, columns in matrices)
    groups = sum(rows * -(-columns // 128) for rows, columns in matrices)

    assert footprint.weight_bytes() == {
        "bf16": 2 * footprint.num_parameters,
        "fp8": rest_bytes + covered + 4 * blocks,
        "int4": rest_bytes + covered // 2 + 2 * groups,
    }


def test_weights_include_mtp_layers_and_the_model_does_not():
    plain, with_mtp = (measure_footprint(tiny_config("hub_moe", num_mtp_layers=n)) for n in (0, 1))

    assert with_mtp.num_parameters == plain.num_parameters
    assert with_mtp.num_active == plain.num_active
    assert with_mtp.forward_flops(64) == plain.forward_flops(64)
    mtp_size = with_mtp.by_kind()["mtp"][0]
    assert with_mtp.weight_bytes()["bf16"] - plain.weight_bytes()["bf16"] == 2 * mtp_size


@pytest.mark.parametrize("model_type", sorted(set(FAMILIES) - {"gpt_oss", "qwen3_next"}))
def test_operations_are_those_that_a_real_forward_runs(model_type):
    tokens = 24
    footprint = measure_footprint(tiny_config(model_type))
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None], use_cache=False)

    # the real forward also multiplies positions and frequencies, which is not counted
    assert footprint.forward_flops(tokens) == pytest.approx(counter.get_total_flops() / tokens, rel=2e-3)
    assert footprint.training_flops(tokens) == 3 * footprint.forward_flops(tokens)


def test_attention_operations_stop_growing_at_the_window():
    footprint = measure_footprint(tiny_config("gpt_oss", layer_types=["sliding_attention"] * 3))

    assert footprint.attention_flops(6) * 2 == footprint.attention_flops(12) == footprint.attention_flops(200)


def test_one_expert_is_the_share_of_one_in_its_layer():
    assert measure_footprint(tiny_config("gpt_oss")).num_per_expert == 3 * 32 * 48 + 2 * 48 + 32
    assert measure_footprint(tiny_config("olmoe")).num_per_expert == 3 * 32 * 48


def test_context_that_fits_is_the_most_that_does():
    footprint = measure_footprint(tiny_config("gpt_oss", max_position_embeddings=10_000))
    weights = footprint.weight_bytes()["bf16"]
    tokens = footprint.context_that_fits(weights + 100_000, weights)

    assert footprint.cache_bytes(tokens) <= 100_000 < footprint.cache_bytes(tokens + 1)
    assert footprint.context_that_fits(weights - 1, weights) is None
    assert footprint.context_that_fits(weights, weights) == 0
    assert footprint.context_that_fits(10**12, weights) == 10_000


def test_measuring_leaves_the_config_as_it_was():
    config = tiny_config("hub_moe")
    before = config.to_dict()
    measure_footprint(config)

    assert config.to_dict() == before
    assert config._attn_implementation is None


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "llama4"])
def test_a_composite_config_is_measured_by_its_language_model(model_type):
    tiny = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, text_config=tiny)
    footprint = measure_footprint(config)

    text_config = config.get_text_config()
    assert footprint.model_type == text_config.model_type
    assert {layer.num_experts for layer in footprint.moe_layers} == {text_config.num_local_experts}
    assert footprint.cache_bytes_per_token(10) == 2 * (2 * 2 * 2 * 8)
    assert all(not active for kind, (_, active) in footprint.by_kind().items() if kind == "other_modalities")


def test_an_encoder_decoder_is_an_error_that_names_its_type():
    with pytest.raises(UnsupportedModelError, match="no causal language model of type 'nllb-moe'"):
        measure_footprint(AutoConfig.for_model("nllb-moe"))


def test_v3_is_measured_in_seconds():
    started_s = time.process_time()
    measure_footprint(HubMoeConfig.from_preset("deepseek-v3"))

    assert time.process_time() - started_s < 6
