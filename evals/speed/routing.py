"""What recording the routing costs: a forward and a training step inside `record_routing` against the same outside.

    python evals/speed/routing.py [--rounds 15] [--rows 2] [--length 256] [--dtype float32] [--device cpu]

One model takes turns with and without recording, step by step, so that what else the machine does hits both. Rows are
padded on the left, so that padding is told from tokens as it must be. With output norms the experts run twice, which
has no goal; its ratio is there to be known.
"""

import argparse
import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from rounds import add_options, report, require_quiet, spread
from step import SHAPE

from hub_moe.anatomy import record_routing
from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM
from hub_moe.modeling.configuration_hub_moe import translate_native_config

GOAL = 1.05
Step = Callable[[Any, torch.Tensor, torch.Tensor], None]


def make_model(dtype: torch.dtype, device: str) -> Any:
    """A model of four layers with 64 experts each, 6 per token."""
    torch.manual_seed(0)
    config = HubMoeConfig(**translate_native_config({**SHAPE, "model_type": "deepseek_v3"}))
    return HubMoeForCausalLM(config).to(device=device, dtype=dtype)


def forward(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Logits without gradients."""
    with torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)


def training_step(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Forward and backward; gradients start from None, as after an optimizer step."""
    model.zero_grad(set_to_none=True)
    model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()


def seconds(step: Step, model: Any, tokens: torch.Tensor, mask: torch.Tensor, *, recording: Any) -> float:
    """Wall time of one step inside the context `recording`; entering and leaving it is not timed."""
    with recording:
        _wait_for(tokens.device)
        start = time.perf_counter()
        step(model, tokens, mask)
        _wait_for(tokens.device)
        return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rounds=15)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    require_quiet(arguments)
    model = make_model(getattr(torch, arguments.dtype), arguments.device)
    tokens = torch.randint(0, SHAPE["vocab_size"], (arguments.rows, arguments.length), device=arguments.device)
    mask = torch.ones_like(tokens)
    mask[0, : arguments.length // 4] = 0
    ratios, draw = {}, random.Random(0)
    for name, step, training, norms in (
        ("forward", forward, False, False),
        ("training_step", training_step, True, False),
        ("forward_with_norms", forward, False, True),
    ):
        model.train(training)
        step(model, tokens, mask)
        pairs = []
        for _ in range(arguments.rounds):
            contexts = {True: record_routing(model, output_norms=norms), False: contextlib.nullcontext()}
            order = draw.sample((True, False), 2)
            times = {is_on: seconds(step, model, tokens, mask, recording=contexts[is_on]) for is_on in order}
            pairs.append(times[True] / times[False])
        ratios[name] = spread(pairs)
    report("routing", ratios, dict.fromkeys(("forward", "training_step"), GOAL), arguments)


if __name__ == "__main__":
    main()
