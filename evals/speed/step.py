"""Forward and training step on the CPU: HubMoe against transformers' deepseek_v3 with its best experts implementation.

    python evals/speed/step.py [--rounds 15] [--tokens 512] [--dtype float32]

Both models hold the same weights in one process and take turns, step by step, so that what else the machine does hits
both. The stock class is given each experts implementation first, and the fastest stays. The goal leaves 2 % for noise:
the two run the same matrix products.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from rounds import add_options, report, require_quiet, spread
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
from hub_moe.modeling.configuration_hub_moe import translate_native_config

LARGEST_ERROR_RATIO = 1.25
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "qk_nope_head_dim": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
}


def make_models(dtype: torch.dtype) -> tuple[Any, Any]:
    """The stock model and ours, equal in every weight."""
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE))
    ours = HubMoeForCausalLM(HubMoeConfig(**translate_native_config(stock.config.to_dict())))
    ours.load_state_dict(stock.state_dict())
    return stock.to(dtype), ours.to(dtype)


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def training_step(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Forward and backward; gradients start from None, as after an optimizer step."""
    model.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def seconds(step: Callable[[Any, torch.Tensor], torch.Tensor], model: Any, tokens: torch.Tensor) -> float:
    """Wall time of one step."""
    start = time.perf_counter()
    step(model, tokens)
    return time.perf_counter() - start


def check(step: Callable[..., torch.Tensor], ours: Any, stock: Any, tokens: torch.Tensor) -> None:
    """Both give the same in float32; in 16 bits ours is as near to the same weights in float32 as the stock class."""
    if stock.dtype == torch.float32:
        return torch.testing.assert_close(step(ours, tokens), step(stock, tokens), rtol=1e-4, atol=1e-4)
    exact = step(copy.deepcopy(stock).float(), tokens)
    off, peer_off = ((step(model, tokens).float() - exact).abs().mean().item() for model in (ours, stock))
    most = max(LARGEST_ERROR_RATIO * peer_off, torch.finfo(stock.dtype).eps * exact.abs().mean().item())
    assert off <= most, f"the mean error of {step.__name__} is {off:.3g}, that of the stock class {peer_off:.3g}"


def fastest_implementation(step: Callable[..., torch.Tensor], stock: Any, tokens: torch.Tensor) -> str:
    """The stock class's best experts implementation for this step; leaves it set."""
    times = {}
    for name in ("grouped_mm", "eager", "batched_mm") if tokens.numel() <= 16 else ("grouped_mm", "eager"):
        stock.set_experts_implementation(name)
        times[name] = min(seconds(step, stock, tokens) for _ in range(2))
    best = min(times, key=times.__getitem__)
    stock.set_experts_implementation(best)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=15)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    require_quiet(arguments)
    stock, ours = make_models(getattr(torch, arguments.dtype))
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, arguments.tokens))
    ratios, best, draw = {}, {}, random.Random(0)
    for name, step, training in (("forward", forward, False), ("training_step", training_step, True)):
        stock.train(training), ours.train(training)
        check(step, ours, stock, tokens)
        best[name] = fastest_implementation(step, stock, tokens)
        pairs = []
        for _ in range(arguments.rounds):
            first, second = draw.sample((ours, stock), 2)
            times = {id(model): seconds(step, model, tokens) for model in (first, second)}
            pairs.append(times[id(ours)] / times[id(stock)])
        ratios[name] = spread(pairs)
    report("step", ratios, dict.fromkeys(ratios, 1.02), arguments, stock_implementation=best)


if __name__ == "__main__":
    main()
