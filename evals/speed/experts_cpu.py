"""Experts on the CPU: ours against the best of transformers' own, and against what the machine allows.

    python evals/speed/experts_cpu.py [--rounds 9] [--threads 2] [--only forward_512] [--isa avx2]

`forward_1`, `forward_16` and `forward_512`: 1, 16 or 512 tokens through 64 experts, 6 a token, hidden 2048, inner 1408.
`backward_512`: forward and backward of 512 tokens, hidden 512, inner 256. `step`: whole training steps, with SGD, of a
small HubMoe against the stock class with the same weights. Each in float32 and bfloat16.

In each round ours, the peer (the fastest of eager, grouped_mm and batched_mm) and the limit take turns in random order.
The limit is the dense float32 product of the same operations, or, for 1 and 16 tokens, reading the weights of the
experts that were hit. Ratios are medians over rounds of seconds of ours over seconds of the other; `_processor` is the
same in processor seconds, which a busy machine disturbs less. What ours gives is compared with float64 first.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

from rounds import (
    Figures,
    Spread,
    add_isa_option,
    add_options,
    compare,
    hold_to_isa,
    report,
    require_quiet,
    take_turns,
    time_both,
)

GOALS = {
    "forward_512_float32_limit": 1.3,
    "forward_512_bfloat16_limit": 1.35,
    "forward_512_bfloat16_peer": 1 / 5,
    **{f"forward_1_{dtype}_limit": 1.35 for dtype in ("float32", "bfloat16")},
    **{f"forward_1_{dtype}_peer": 1 / 1.4 for dtype in ("float32", "bfloat16")},
    **{f"forward_16_{dtype}_limit": 1.5 for dtype in ("float32", "bfloat16")},
    **{f"forward_16_{dtype}_peer": 1 / 2.3 for dtype in ("float32", "bfloat16")},
    **{f"backward_512_{dtype}_limit": 1.8 for dtype in ("float32", "bfloat16")},
    "backward_512_float32_peer": 1 / 1.7,
    "backward_512_bfloat16_peer": 1 / 20,
    "step_float32_peer": 1 / 1.5,
    "step_bfloat16_peer": 1 / 8,
}
HEADLINE = [
    "forward_1_float32_peer",
    "forward_512_bfloat16_peer",
    "backward_512_float32_peer",
    "backward_512_bfloat16_peer",
]
HEADLINE += ["step_float32_peer", "step_bfloat16_peer"]
LAYERS = {"forward_1": (2048, 1408, 1), "forward_16": (2048, 1408, 16), "forward_512": (2048, 1408, 512)}
LAYERS |= {"backward_512": (512, 256, 512)}
EXPERTS, TOP_K = 64, 6
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # norm of the difference from float64 over norm
LARGEST_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", default=[*LAYERS, "step"], choices=[*LAYERS, "step"])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add_isa_option(parser)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_layer(hidden: int, inner: int, dtype: Any) -> Any:
    """A stock DeepSeek-V3 experts module with random weights."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    layer = DeepseekV3Experts(config).to(dtype)
    with torch.no_grad():
        for stack in layer.parameters():
            stack.uniform_(-(stack.shape[-1] ** -0.5), stack.shape[-1] ** -0.5)
    return layer


def run_layer(layer: Any, implementation: str, inputs: Any, *, backward: bool) -> dict[str, Any]:
    """The output and, with `backward`, all gradients."""
    import torch

    layer.config._experts_implementation = implementation
    x, chosen, weights, dout = inputs
    if not backward:
        with torch.no_grad():
            return {"out": layer(x, chosen, weights)}
    layer.zero_grad(set_to_none=True)
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = layer(x, chosen, weights)
    out.backward(dout)
    named = {name: stack.grad for name, stack in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **named}


def run_float64(layer: Any, inputs: Any, *, backward: bool) -> dict[str, Any]:
    """The same by one expert after the other in float64."""
    import torch

    x, chosen, weights, dout = inputs
    x, weights = x.double().requires_grad_(backward), weights.double().requires_grad_(backward)
    stacks = [stack.detach() for stack in (layer.gate_up_proj, layer.down_proj)]
    if backward:
        stacks = [stack.double().requires_grad_() for stack in stacks]
    out = torch.zeros_like(x)
    for expert, (up, down) in enumerate(zip(*(stack.unbind() for stack in stacks), strict=True)):
        token, place = torch.where(chosen == expert)
        if token.numel():
            gate, linear = (x[token] @ up.double().T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * linear) @ down.double().T
            out = out.index_add(0, token, y * weights[token, place, None])
    if not backward:
        return {"out": out}
    out.backward(dout.double())
    return {
        "out": out.detach(),
        **{"x": x.grad, "weights": weights.grad, "gate_up_proj": stacks[0].grad, "down_proj": stacks[1].grad},
    }


def largest_error(results: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest of all relative differences, each by norm."""
    return max(float((results[name].double() - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


def make_limit(hidden: int, inner: int, inputs: Any, layer: Any, *, backward: bool) -> Callable[[], Any]:
    """What no experts layer can beat: dense products in float32, or reading the experts that were hit."""
    import torch

    tokens, chosen = inputs[0].shape[0], inputs[1]
    if tokens <= 16:
        count = chosen.unique().numel() * 3 * hidden * inner * layer.down_proj.element_size() // 4
        weights = torch.ones(count)
        return lambda: weights.sum()
    rows = tokens * TOP_K
    x, h, y = torch.randn(rows, hidden), torch.randn(rows, 2 * inner), torch.randn(rows, hidden)
    up, down, a = torch.randn(2 * inner, hidden), torch.randn(hidden, inner), torch.randn(rows, inner)

    def forward() -> None:
        torch.mm(x, up.T, out=h)
        torch.mm(a, down.T, out=y)

    def both() -> None:
        forward()
        for left, right in ((y, down), (h, up), (h.T, x), (y.T, a)):
            left @ right

    return both if backward else forward


def measure(rivals: dict[str, Callable[[], Any]], rounds: int, seed: int, label: str) -> dict[str, list[Figures]]:
    """Wall and processor seconds of every rival in every round, in random order within a round."""

    def timer(call: Callable[[], Any]) -> Callable[[], Figures]:
        return lambda: time_both(call)

    return take_turns({name: timer(call) for name, call in rivals.items()}, rounds=rounds, seed=seed, label=label)


def fastest(rivals: dict[str, Callable[[], Any]], seed: int) -> str:
    """By the better of two runs."""
    times = measure(rivals, 2, seed, "peers")
    return min(rivals, key=lambda name: min(each["wall"] for each in times[name]))


def compare_layer(name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64, and the seconds of ours, the peer and the limit."""
    import torch

    hidden, inner, tokens = LAYERS[name]
    torch.manual_seed(arguments.seed)
    backward, layer = name.startswith("backward"), make_layer(hidden, inner, getattr(torch, dtype))
    x, dout = torch.randn(2, tokens, hidden).to(layer.down_proj.dtype)
    inputs = (x, torch.rand(tokens, EXPERTS).topk(TOP_K).indices, torch.rand(tokens, TOP_K), dout)

    def runner(implementation: str) -> Callable[[], dict[str, Any]]:
        return lambda: run_layer(layer, implementation, inputs, backward=backward)

    peers = ("grouped_mm", "eager", "batched_mm") if tokens <= 16 else ("grouped_mm", "eager")
    peer = fastest({each: runner(each) for each in peers}, arguments.seed)
    expected = run_float64(layer, inputs, backward=backward)
    errors = {each: largest_error(runner(each)(), expected) for each in ("hub_moe", peer)}
    assert errors["hub_moe"] <= LARGEST_ERROR[dtype], f"{name} in {dtype} is off by {errors}"
    del expected
    rivals = {"ours": runner("hub_moe"), "peer": runner(peer)}
    rivals["limit"] = make_limit(hidden, inner, inputs, layer, backward=backward)
    rivals["limit"]()
    return {
        "peer": peer,
        "errors": errors,
        "seconds": measure(rivals, arguments.rounds, arguments.seed, f"{name} {dtype}"),
    }


def compare_step(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss curves, which must be the same, and the seconds of both models' steps."""
    import torch
    from step import SHAPE, fastest_implementation, make_models, training_step

    stock, ours = (model.train() for model in make_models(getattr(torch, dtype)))
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, 512), generator=torch.Generator().manual_seed(arguments.seed))
    peer = fastest_implementation(training_step, stock, tokens)
    training_step(ours, tokens)
    losses: dict[str, list[float]] = {"ours": [], "peer": []}

    def stepper(name: str, model: Any) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)  # more, and rounding alone drives bfloat16 apart

        def step() -> None:
            losses[name].append(float(training_step(model, tokens)))
            optimizer.step()

        return step

    rivals = {"ours": stepper("ours", ours), "peer": stepper("peer", stock)}
    seconds = measure(rivals, arguments.rounds, arguments.seed, f"step {dtype}")
    difference = max(abs(a - b) / b for a, b in zip(losses["ours"], losses["peer"], strict=True))
    assert difference <= LARGEST_LOSS_DIFFERENCE[dtype], f"the losses differ in {dtype}: {losses}"
    return {"peer": peer, "losses": losses, "seconds": seconds}


def ratios_of(key: str, seconds: dict[str, list[Figures]]) -> dict[str, Spread]:
    """Ours / other by round, in wall and in processor seconds."""
    return {
        f"{key}_{other}{ending}": compare(seconds["ours"], seconds[other], clock)
        for other in sorted(seconds.keys() - {"ours"})
        for ending, clock in (("", "wall"), ("_processor", "processor"))
    }


def main() -> None:
    arguments = parse()
    hold_to_isa(arguments)
    busy = require_quiet(arguments)
    import torch

    import hub_moe.modeling  # noqa: F401  (registers hub_moe)
    from hub_moe.experts.bfloat16_speed import bfloat16_record
    from hub_moe.experts.products import describe_choice
    from hub_moe.modeling.half_products import has_fast_products

    torch.set_num_threads(arguments.threads)
    ratios: dict[str, Spread] = {}
    figures: dict[str, Any] = {}
    for name in arguments.only:
        for dtype in arguments.dtypes:
            key = f"{name}_{dtype}"
            figures[key] = compare_step(dtype, arguments) if name == "step" else compare_layer(name, dtype, arguments)
            ratios |= ratios_of(key, figures[key]["seconds"])
    report(
        f"experts_cpu_{arguments.isa}" if arguments.isa else "experts_cpu",
        ratios,
        {ratio: goal for ratio, goal in GOALS.items() if ratio in ratios},
        arguments,
        headline=[key for key in HEADLINE if key in ratios],
        figures=figures,
        busy_share_before=busy,
        experts=describe_choice(),
        torch_bfloat16=bfloat16_record(),
        fast_bfloat16_products=has_fast_products(torch.bfloat16, "cpu"),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
    )


if __name__ == "__main__":
    main()
