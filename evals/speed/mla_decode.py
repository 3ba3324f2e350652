"""Decoding with a long context: HubMoe against transformers' deepseek_v3 with the same weights, at batch 1.

    python evals/speed/mla_decode.py [--rounds 9] [--contexts 2048 8192] [--dtypes float32 bfloat16] [--tokens 2]
        [--isa avx2]

A model of 679 M parameters (122 M active), as large as that of `loading.py`. Both classes share every weight and start
from the same latents, random ones of unit mean square as the norm before the cache makes them; the cost of a step does
not depend on their values. In each round the two decode the same tokens, so that both caches grow alike, and the bytes
a step has to read, active weights and latent cache, are read once by a plain sum or product with a vector, the faster
of the two; the order is random. Ratios are medians of ours over theirs (`_limit`: ours over reading the bytes), so 0.1
is ten times faster; `_processor` is the same in processor seconds, which a busy machine disturbs less.

Before that both decode four tokens, which in float32 must be the same, with logits equal within 1e-5 of the largest.
One attention layer of each is compared with itself in float64, and in bfloat16 the logits of 64 tokens with those of
the same weights in float32: ours may be 1.25 times as far off as the stock class. (Many tokens, as a router that rounds
the other way picks other experts in a quarter of the layers, in both classes.) On a machine with other busy processes
set OMP_NUM_THREADS=1: torch's threads wait for each other at every product.
"""

import argparse
import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from loading import shape_of
from rounds import add_isa_option, add_options, compare, hold_to_isa, report, require_quiet, take_turns, time_both
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
from hub_moe.modeling.configuration_hub_moe import translate_native_config
from hub_moe.modeling.half_products import has_fast_products

SHAPE = shape_of(num_experts=64)
# ours over the peer, and ours over the limit
GOALS = {
    "float32_2048": 1 / 10,
    "float32_8192": 1 / 30,
    "bfloat16_8192": 1 / 200,
    **{f"{dtype}_{context}_limit": 2.5 for dtype in ("float32", "bfloat16") for context in (2048, 8192)},
}
HEADLINE = [*(f"float32_{context}" for context in (2048, 8192)), "bfloat16_8192"]
CLOCKS = ("wall", "processor")
Times = dict[str, float]
LARGEST_DIFFERENCE = 1e-5
LARGEST_ERROR_RATIO = 1.25


def make_models(dtype: torch.dtype) -> dict[str, Any]:
    """The stock model and ours, sharing every weight."""
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE)).to(dtype).eval()
    config = HubMoeConfig(**translate_native_config(stock.config.to_dict()))
    with torch.device("meta"):
        ours = HubMoeForCausalLM(config).eval()
    ours.load_state_dict(stock.state_dict(), assign=True)
    models = {"ours": ours, "stock": stock}
    for model in models.values():
        # frequencies are in no state dict, and stay float32 when a model is loaded in 16 bits
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return models


def make_cache(context: int, dtype: torch.dtype) -> DynamicCache:
    """Random latents and rotated keys of `context` tokens, the same at every call."""
    draw = torch.Generator().manual_seed(1)
    cache = DynamicCache()
    for layer in range(SHAPE["num_hidden_layers"]):
        latent = torch.randn(1, 1, context, SHAPE["kv_lora_rank"], generator=draw)
        rope = torch.randn(1, 1, context, SHAPE["qk_rope_head_dim"], generator=draw)
        cache.update(latent.to(dtype), rope.to(dtype), layer)
    return cache


def decode(model: Any, cache: DynamicCache, first: int, count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits (count, V) they were picked from; the cache grows by `count` tokens."""
    tokens, logits = [first], []
    with torch.inference_mode():
        for _ in range(count):
            output = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tokens[1:], torch.stack(logits)


def choose_experts(model: Any) -> str:
    """The fastest experts implementation for one token; leaves it set."""
    times, cache = {}, make_cache(64, model.dtype)
    for name in ("grouped_mm", "eager", "batched_mm", *(["hub_moe"] if "hub_moe" in ALL_EXPERTS_FUNCTIONS else [])):
        if name == "hub_moe" and not isinstance(model, HubMoeForCausalLM):
            continue
        model.set_experts_implementation(name)
        times[name] = min(seconds(lambda: decode(model, cache, 5, 1))["processor"] for _ in range(3))
    best = min(times, key=lambda name: times[name])
    model.set_experts_implementation(best)
    return best


def seconds(step: Callable[[], Any], *, parts: int = 1) -> Times:
    """Wall and processor time of one call, for each of its parts."""
    return {clock: each / parts for clock, each in time_both(step).items()}


def count_bytes(model: Any, context: int) -> dict[str, int]:
    """Bytes that one step has to read: the weights it uses, and the cache."""
    size = model.dtype.itemsize
    experts = [p.numel() for name, p in model.named_parameters() if ".experts." in name]
    others = sum(p.numel() for p in model.parameters()) - sum(experts) - model.model.embed_tokens.weight.numel()
    active = others + sum(experts) * SHAPE["num_experts_per_tok"] // SHAPE["n_routed_experts"]
    latent = context * (SHAPE["kv_lora_rank"] + SHAPE["qk_rope_head_dim"]) * SHAPE["num_hidden_layers"]
    return {"active_weights": active * size, "latent_cache": latent * size}


def read_bytes(memory: torch.Tensor, vector: torch.Tensor) -> Times:
    """Time to read `memory` once, by the faster of two plain ways."""
    rows = memory.view(-1, vector.numel())
    ways = (seconds(memory.sum), seconds(lambda: torch.mv(rows, vector)))
    return {clock: min(way[clock] for way in ways) for clock in CLOCKS}


def check(models: dict[str, Any], dtype: torch.dtype, context: int) -> dict[str, Any]:
    """Compare tokens, logits and errors of attention; an assertion fails where ours are not as good."""
    results = {name: decode(model, make_cache(context, dtype), 5, 4) for name, model in models.items()}
    (our_tokens, our_logits), (tokens, logits) = results["ours"], results["stock"]
    difference = ((our_logits - logits).abs().max() / logits.abs().max()).item()
    if dtype == torch.float32:
        assert our_tokens == tokens, f"other greedy tokens at {context}: {our_tokens} instead of {tokens}"
        assert difference <= LARGEST_DIFFERENCE, f"logits differ by {difference:.1e} of the largest"
    errors = {name: attention_error(model, context) for name, model in models.items()}
    ratio = errors["ours"] / errors["stock"]
    assert ratio <= LARGEST_ERROR_RATIO, f"error of attention is {ratio:.2f} times the stock class's"
    found = {"difference_of_logits": difference, "same_tokens": our_tokens == tokens, "error_of_attention": errors}
    if dtype == torch.float32:
        return found
    exact_model = copy.deepcopy(models["stock"]).float()
    exact = continue_cache(exact_model, context, dtype)
    off = {name: (continue_cache(model, context, dtype) - exact).abs().mean().item() for name, model in models.items()}
    ratio = off["ours"] / off["stock"]
    assert ratio <= LARGEST_ERROR_RATIO, f"error of logits is {ratio:.2f} times the stock class's"
    return {**found, "error_of_logits": off}


def continue_cache(model: Any, context: int, dtype: torch.dtype) -> torch.Tensor:
    """Float32 logits of 64 tokens given at once, over a cache of `dtype` cast to the model's."""
    cache = make_cache(context, dtype)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(model.dtype), layer.values.to(model.dtype)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model(tokens, past_key_values=cache, use_cache=True).logits.float()


def attention_error(model: Any, context: int) -> float:
    """Mean error of one attention layer against itself in float64, relative to the mean result."""
    hidden = torch.randn(1, 8, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(2)).to(model.dtype)
    positions = torch.arange(context, context + hidden.shape[1])[None]
    results = []
    with torch.inference_mode():
        rotation = model.model.rotary_emb(hidden, positions)
        for kind in (model.dtype, torch.float64):
            attention = copy.deepcopy(model.model.layers[0].self_attn).to(kind)
            cache = make_cache(context, model.dtype)
            cache.layers[0].keys, cache.layers[0].values = (x.to(kind) for x in next(iter(cache))[:2])
            mask = torch.ones(1, 1, hidden.shape[1], context + hidden.shape[1], dtype=torch.bool).tril(context)
            given = {"attention_mask": mask, "past_key_values": cache}
            results.append(attention(hidden.to(kind), tuple(part.to(kind) for part in rotation), **given)[0].double())
    return ((results[0] - results[1]).abs().mean() / results[1].abs().mean()).item()


def measure(models: dict[str, Any], dtype: torch.dtype, context: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of all rounds, by rival, with what was checked."""
    checked = check(models, dtype, context)
    caches = {name: make_cache(context, dtype) for name in models}
    for name, model in models.items():
        decode(model, caches[name], 5, 1)
    needed = count_bytes(models["stock"], context)
    memory, vector = torch.zeros(sum(needed.values()) // 4096 * 1024), torch.ones(1024)
    count = arguments.tokens
    rivals: dict[str, Callable[[], Times]] = {
        "ours": lambda: seconds(lambda: decode(models["ours"], caches["ours"], 5, count), parts=count),
        "stock": lambda: seconds(lambda: decode(models["stock"], caches["stock"], 5, count), parts=count),
        "limit": lambda: read_bytes(memory, vector),
    }
    times = take_turns(rivals, rounds=arguments.rounds, seed=context, label=f"{dtype} {context}")
    return {"times_s": times, "needed_bytes": needed, **checked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2, help="tokens decoded in each round")
    add_isa_option(parser)
    arguments = parser.parse_args()
    hold_to_isa(arguments)
    busy = require_quiet(arguments)
    ratios, details, implementations = {}, {}, {}
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        models = make_models(dtype)
        implementations[name] = {rival: choose_experts(model) for rival, model in models.items()}
        for context in arguments.contexts:
            key = f"{name}_{context}"
            details[key] = measure(models, dtype, context, arguments)
            for suffix, rival in {"": "stock", "_limit": "limit"}.items():
                for ending, clock in zip(("", "_processor"), CLOCKS, strict=True):
                    times = details[key]["times_s"]
                    ratios[key + suffix + ending] = compare(times["ours"], times[rival], clock)
        del models
        gc.collect()
    report(
        f"mla_decode_{arguments.isa}" if arguments.isa else "mla_decode",
        ratios,
        {key: goal for key, goal in GOALS.items() if key in ratios},
        arguments,
        headline=[key for key in HEADLINE if key in ratios],
        busy_share_before=busy,
        threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        fast_bfloat16_products=has_fast_products(torch.bfloat16, "cpu"),
        experts=implementations,
        measurements=details,
    )


if __name__ == "__main__":
    main()
