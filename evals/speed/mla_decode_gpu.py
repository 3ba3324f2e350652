"""Latent attention of one decoded token on a GPU: ours against the stock class, and against copying the same bytes.

    python evals/speed/mla_decode_gpu.py [--rounds 9] [--batch 32] [--context 16384] [--out evals/results/speed]

The attention of DeepSeek-V2-Lite (16 heads, latent 512, rotary 64) in bfloat16, 32 sequences over 16 k cached tokens.
`stock` is what transformers' DeepseekV3Attention does between its projections: keys and values of the whole context,
and SDPA. `copy` copies half the latent cache, which reads and writes as many bytes as the cache has. `mask` is ours
with a mask of numbers, `drafts` with four new tokens of each sequence, both over ours. `layer` are whole attention
layers, with projections and growing caches, ours and the stock class.

In each round all take turns in random order, timed by the GPU's own events. Ratios are medians over rounds of seconds
of ours over seconds of the other, so one half is twice as fast. Before anything is timed, outputs are compared with the
expanded form in float64. `blocks` has the seconds of the kernels by how their programs work, for whoever tunes them.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

from gpu import measure, require_gpu
from rounds import Spread, add_options, report, spread

SHAPE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GOALS = {"stock": 1 / 25, "copy": 1 / 0.7}
LARGEST_ERROR = 1e-2  # norm of the difference from float64 over norm
DRAFTS = 4
DEVICE = "cuda"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="calls of a rival in a round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=16384, help="cached tokens of each sequence")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_layers(shape: dict[str, Any] = SHAPE) -> dict[str, Any]:
    """One attention layer of ours and of the stock class with the same random weights."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    from hub_moe.modeling import HubMoeConfig
    from hub_moe.modeling.configuration_hub_moe import translate_native_config
    from hub_moe.modeling.layers import HubMoeAttention

    config = DeepseekV3Config(**shape)
    ours_config = HubMoeConfig(**translate_native_config(config.to_dict()))
    for each in (config, ours_config):
        each._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        layers = {"ours": HubMoeAttention(ours_config, 0), "stock": DeepseekV3Attention(config, 0)}
    for layer in layers.values():
        layer.bfloat16().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in layers["stock"].parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    layers["ours"].load_state_dict(layers["stock"].state_dict())
    return layers


def make_cache(arguments: argparse.Namespace, shape: dict[str, Any] = SHAPE) -> Any:
    """Random latents and rotary keys (B, S, C + R), side by side as the cache has them."""
    import torch

    width = shape["kv_lora_rank"] + shape["qk_rope_head_dim"]
    draw = torch.Generator(DEVICE).manual_seed(arguments.seed)
    size = (arguments.batch, arguments.context, width)
    return torch.randn(size, generator=draw, device=DEVICE, dtype=torch.bfloat16)


def make_query(layer: Any, arguments: argparse.Namespace, new: int) -> Any:
    """Random queries (B, H, L, N + R)."""
    import torch

    draw = torch.Generator(DEVICE).manual_seed(arguments.seed + 1)
    size = (arguments.batch, layer.num_heads, new, layer.qk_head_dim)
    return torch.randn(size, generator=draw, device=DEVICE, dtype=torch.bfloat16)


def expand(layer: Any, query: Any, cached: Any, mask: Any = None) -> Any:
    """The stock class's attention between its projections, (B, L, H, V)."""
    import torch

    latent, rope = cached.unsqueeze(1).split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
    key, value = layer.expand_kv(latent, rope)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=mask, scale=layer.scaling).transpose(1, 2)


def absorb(layer: Any, query: Any, cached: Any, mask: Any = None) -> Any:
    """Ours, (B, L, H, V)."""
    from hub_moe.modeling.absorbed_attention import LatentCache, attend_to_latents

    parts = LatentCache(*cached.split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1))
    weight = layer.kv_b_proj.weight.unflatten(0, (layer.num_heads, -1))
    return attend_to_latents(query, parts, weight, mask=mask, scaling=layer.scaling)[0]


def causal_mask(new: int, context: int) -> Any:
    """True for what each of the last tokens sees, (1, 1, L, S)."""
    import torch

    return torch.ones(new, context, dtype=torch.bool, device=DEVICE).tril(context - new)[None, None]


def check(layers: dict[str, Any], arguments: argparse.Namespace, cached: Any) -> dict[str, float]:
    """Errors of the first and the last sequence against the expanded form in float64."""
    wide, errors = copy.deepcopy(layers["stock"]).double(), {}
    for name, new in {"one": 1, "drafts": DRAFTS}.items():
        query, mask = make_query(layers["ours"], arguments, new), causal_mask(new, arguments.context)
        mask = None if new == 1 else mask
        actual = {"ours": absorb(layers["ours"], query, cached, mask)}
        actual["stock"] = expand(layers["stock"], query, cached, mask)
        for row in {0, arguments.batch - 1}:
            expected = expand(wide, query[row : row + 1].double(), cached[row : row + 1].double(), mask)
            for rival, output in actual.items():
                error = float((output[row : row + 1].double() - expected).norm() / expected.norm())
                errors[f"{rival}_{name}"] = max(error, errors.get(f"{rival}_{name}", 0.0))
    worst = max(error for name, error in errors.items() if name.startswith("ours"))
    assert worst <= LARGEST_ERROR, f"attention is off by {errors}"
    return errors


def make_step(layer: Any, cached: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    """One token of every sequence through a whole layer, whose cache grows."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    latent, rope = cached.unsqueeze(1).split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
    cache.update(latent, rope, 0)
    hidden = torch.randn(arguments.batch, 1, layer.hidden_size, device=DEVICE, dtype=torch.bfloat16)
    angles = torch.rand(arguments.batch, 1, layer.qk_rope_head_dim, device=DEVICE)
    rotation = (angles.cos().bfloat16(), angles.sin().bfloat16())
    return lambda: layer(hidden, rotation, None, past_key_values=cache)[0]


def make_rivals(layers: dict[str, Any], cached: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What takes turns."""
    import torch

    one, drafts = (make_query(layers["ours"], arguments, new) for new in (1, DRAFTS))
    half = cached.view(-1)[: cached.numel() // 2]
    target, mask = torch.empty_like(half), causal_mask(DRAFTS, arguments.context)
    numbers = torch.zeros(arguments.batch, 1, 1, arguments.context, device=DEVICE, dtype=torch.bfloat16)
    return {
        "ours": lambda: absorb(layers["ours"], one, cached),
        "stock": lambda: expand(layers["stock"], one, cached),
        "copy": lambda: target.copy_(half),
        "mask": lambda: absorb(layers["ours"], one, cached, numbers),
        "drafts": lambda: absorb(layers["ours"], drafts, cached, mask),
        "layer_ours": make_step(layers["ours"], cached, arguments),
        "layer_stock": make_step(layers["stock"], cached, arguments),
    }


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, Spread]:
    """Ours over the other, round by round; of `mask` and `drafts`, those over ours."""

    def over(top: str, bottom: str) -> Spread:
        return spread([a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)])

    found = {"stock": over("ours", "stock"), "copy": over("ours", "copy")}
    found |= {name: over(name, "ours") for name in ("mask", "drafts")}
    return {**found, "layer": over("layer_ours", "layer_stock")}


def time_blocks(layers: dict[str, Any], cached: Any, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Median seconds of the kernels alone, by rows and how programs work; None for what has no room on this GPU."""
    from triton.runtime.errors import OutOfResources

    from hub_moe.modeling.latent_kernels import BLOCKS, attend_in_splits

    layer = layers["ours"]
    parts = cached.split([layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1)
    found: dict[str, float | None] = {}
    for new, rows in ((1, layer.num_heads), (2, 2 * layer.num_heads), (DRAFTS, DRAFTS * layer.num_heads)):
        queries = [each.repeat_interleave(new, 2) for each in make_pair(layer, arguments)]
        for blocks in BLOCKS.get(rows, ()):

            def run(blocks: Any = blocks, queries: Any = queries) -> Any:
                return attend_in_splits(*queries, parts, mask=None, scaling=layer.scaling, blocks=blocks)

            try:
                times = measure({"it": run}, argparse.Namespace(rounds=3, repeats=3, seed=0))["it"]
            except OutOfResources:
                times = []
            found[f"{rows} rows {blocks}"] = statistics.median(times) if times else None
    return found


def make_pair(layer: Any, arguments: argparse.Namespace) -> list[Any]:
    """Queries of latents and of rotary keys, one a sequence."""
    import torch

    sizes = (layer.kv_lora_rank, layer.qk_rope_head_dim)
    kind = {"device": DEVICE, "dtype": torch.bfloat16}
    return [torch.randn(arguments.batch, layer.num_heads, 1, size, **kind) for size in sizes]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors, seconds of all rounds, bytes a second, and seconds by blocks."""
    import torch

    layers, cached = make_layers(), make_cache(arguments)
    with torch.inference_mode():
        errors = check(layers, arguments, cached)
        torch.cuda.empty_cache()
        seconds = measure(make_rivals(layers, cached, arguments), arguments)
        blocks = time_blocks(layers, cached, arguments)
    latent_bytes = cached.numel() * cached.element_size()
    rates = {name: latent_bytes / statistics.median(seconds[name]) / 1e12 for name in ("ours", "copy")}
    return {"errors": errors, "seconds": seconds, "terabytes_per_second": rates, "blocks": blocks}


def main() -> None:
    arguments = parse()
    require_gpu("mla_decode_gpu.py", arguments)
    import torch

    figures = compare(arguments)
    report(
        "mla_decode_gpu",
        ratios_of(figures["seconds"]),
        GOALS,
        arguments,
        headline=list(GOALS),
        gpu=torch.cuda.get_device_name(),
        **figures,
    )


if __name__ == "__main__":
    main()
