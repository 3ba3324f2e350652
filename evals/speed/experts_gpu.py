"""Experts on a GPU: ours against transformers' grouped_mm, liger-kernel, and the dense product of the same operations.

    python evals/speed/experts_gpu.py [--rounds 9] [--only qwen3_30b deepseek_v2_lite] [--out evals/results/speed]

32 k tokens in bfloat16 through 128 experts, 8 a token, hidden 2048, inner 768 (Qwen3-30B-A3B), and through 64 experts,
6 a token, hidden 2048, inner 1408 (DeepSeek-V2-Lite); forward as in training, and forward and backward.

In each round all rivals take turns in random order, timed by the GPU's own events. Ratios are medians over rounds of
seconds of ours over seconds of the other, so one half is twice as fast. `saved` is what ours keeps for backward over
T*D + 2*T*K*F elements, by which the goals are set. Before anything is timed, output and all gradients of ours are
compared with float64 on the same inputs, and those of the others beside them. `gpu.py` runs this with all others.

liger-kernel takes part where it is installed. It times many configurations at its first call, which takes minutes;
LIGER_FUSED_MOE_AUTOTUNE=0 holds it to one, which is not its best, and the results say which it was.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import measure, require_gpu
from rounds import Spread, add_options, report, spread

SHAPES = {  # experts, experts a token, hidden, inner
    "qwen3_30b": (128, 8, 2048, 768),
    "deepseek_v2_lite": (64, 6, 2048, 1408),
}
PASSES = ("forward", "both")
DENSE = {"forward": 0.68, "both": 0.60}  # of the dense product's rate
GROUPED_MM = {"forward": 2.0, "both": 1.7}  # times as fast
MOST_SAVED = 1.15
LARGEST_ERROR = 1e-2  # norm of the difference from float64 over norm
DEVICE = "cuda"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="calls of a rival in a round")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--without-liger", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def count_operations(tokens: int, shape: tuple[int, int, int, int], which: str) -> int:
    """Multiplications and additions of a pass; backward does each product twice more."""
    _, top_k, hidden, inner = shape
    forward = 2 * tokens * top_k * 3 * hidden * inner
    return forward if which == "forward" else 3 * forward


def count_needed(tokens: int, shape: tuple[int, int, int, int]) -> int:
    """Elements that backward needs: the input and the pre-activations."""
    _, top_k, hidden, inner = shape
    return tokens * hidden + 2 * tokens * top_k * inner


def goals_of(name: str, rivals: list[str]) -> dict[str, float]:
    """The most that each ratio may be."""
    goals = {f"{name}_saved": MOST_SAVED}
    for which in PASSES:
        goals |= {f"{name}_{which}_dense": 1 / DENSE[which], f"{name}_{which}_grouped_mm": 1 / GROUPED_MM[which]}
        if "liger" in rivals:
            goals[f"{name}_{which}_liger"] = 1.0
    return goals


def spread_of(prefix: str, seconds: dict[str, list[float]]) -> dict[str, Spread]:
    """Ours / other by round."""
    return {
        f"{prefix}_{other}": spread([a / b for a, b in zip(seconds["ours"], seconds[other], strict=True)])
        for other in sorted(seconds.keys() - {"ours"})
    }


def make_layer(shape: tuple[int, int, int, int]) -> Any:
    """A stock experts module with random weights."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    experts, top_k, hidden, inner = shape
    config = DeepseekV3Config(
        hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=experts, num_experts_per_tok=top_k
    )
    layer = DeepseekV3Experts(config).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        for stack in layer.parameters():
            stack.uniform_(-(stack.shape[-1] ** -0.5), stack.shape[-1] ** -0.5)
    return layer


def make_inputs(tokens: int, shape: tuple[int, int, int, int], seed: int) -> tuple[Any, ...]:
    """Tokens, expert ids, weights that add up to 1, and a gradient of the output."""
    import torch

    experts, top_k, hidden, _ = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    draw = {"generator": generator, "device": DEVICE}
    x, dout = torch.randn(2, tokens, hidden, **draw).bfloat16()
    weights, chosen = torch.rand(tokens, experts, **draw).topk(top_k)
    return x, chosen, weights / weights.sum(-1, keepdim=True), dout


def make_runner(layer: Any, forward: Callable[..., Any], inputs: tuple[Any, ...], which: str) -> Callable[[], Any]:
    """A pass of training; returns output and, with backward, all gradients."""
    import torch

    x, chosen, weights, dout = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    leaves = {"x": x, "weights": weights, **dict(layer.named_parameters())}

    def run() -> dict[str, Any]:
        out = forward(x, chosen, weights)
        if which == "forward":
            return {"out": out.detach()}
        return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), dout), strict=True))}

    return run


def make_forwards(layer: Any, arguments: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """The rivals that compute the layer."""

    def by(implementation: str) -> Callable[..., Any]:
        def forward(*inputs: Any) -> Any:
            layer.config._experts_implementation = implementation
            return layer(*inputs)

        return forward

    forwards = {"ours": by("hub_moe"), "grouped_mm": by("grouped_mm")}
    if not arguments.without_liger and importlib.util.find_spec("liger_kernel"):
        forwards["liger"] = by("hub_moe_liger")
    return forwards


def make_dense(tokens: int, shape: tuple[int, int, int, int], which: str) -> Callable[[], None]:
    """The products of a pass as if all pairs had one expert."""
    import torch

    _, top_k, hidden, inner = shape
    rows, kind = tokens * top_k, {"dtype": torch.bfloat16, "device": DEVICE}
    x, h, a, y = (torch.randn(rows, width, **kind) for width in (hidden, 2 * inner, inner, hidden))
    up, down = torch.randn(2 * inner, hidden, **kind), torch.randn(hidden, inner, **kind)
    backward = ((y, down), (h, up), (h.T, x), (y.T, a))

    def run() -> None:
        torch.mm(x, up.T)
        torch.mm(a, down.T)
        for left, right in backward if which == "both" else ():
            torch.mm(left, right)

    return run


def saved_bytes(layer: Any, forward: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """What a forward pass keeps for backward, weights aside."""
    import torch

    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, chosen, weights, _ = inputs
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(x.detach().requires_grad_(), chosen, weights.detach().requires_grad_())
    del out
    own = {stack.untyped_storage().data_ptr() for stack in layer.parameters()}
    return sum(size for at, size in kept.items() if at not in own)


def chosen_blocks(tokens: int, shape: tuple[int, int, int, int]) -> dict[str, dict[str, str]]:
    """What triton timed best, by kernel and widths."""
    import torch

    from hub_moe.experts import triton_kernels

    properties: Any = torch.cuda.get_device_properties(0)
    bucket = triton_kernels.bucket_of(tokens * shape[1] / shape[0])
    found = {}
    for name in triton_kernels.KERNELS:
        tuned = triton_kernels.tuned_kernel(name, bucket, 2, properties.shared_memory_per_block_optin)
        found[name] = {str(key): str(config) for key, config in tuned.cache.items()}
    return found


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64, then the seconds of all rivals, and what ours saves."""
    import torch
    from experts_cpu import largest_error, run_float64

    shape, tokens = SHAPES[name], arguments.tokens
    layer, inputs = make_layer(shape), make_inputs(tokens, shape, arguments.seed)
    forwards = make_forwards(layer, arguments)
    expected = run_float64(layer, inputs, backward=True)
    errors = {}
    for rival in forwards:
        errors[rival] = largest_error(make_runner(layer, forwards[rival], inputs, "both")(), expected)
    assert errors["ours"] <= LARGEST_ERROR, f"{name} is off by {errors}"
    del expected
    torch.cuda.empty_cache()
    results: dict[str, Any] = {"errors": errors, "seconds": {}, "tflops": {}}
    for which in PASSES:
        rivals = {rival: make_runner(layer, forward, inputs, which) for rival, forward in forwards.items()}
        seconds = measure({**rivals, "dense": make_dense(tokens, shape, which)}, arguments)
        work = count_operations(tokens, shape, which) / 1e12
        results["seconds"][which] = seconds
        results["tflops"][which] = {rival: work / statistics.median(each) for rival, each in seconds.items()}
    results["saved_bytes"] = {rival: saved_bytes(layer, forward, inputs) for rival, forward in forwards.items()}
    results["blocks"] = chosen_blocks(tokens, shape)
    return results


def plot(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of TFLOP/s by shape, pass and rival."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(name, which) for name in figures for which in PASSES]
    rivals = list(next(iter(figures.values()))["tflops"]["forward"])
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for index, rival in enumerate(rivals):
        heights = [figures[name]["tflops"][which][rival] for name, which in groups]
        axes.bar([place + index / (len(rivals) + 1) for place in range(len(groups))], heights, 0.19, label=rival)
    labels = [f"{name}\n{'forward' if which == 'forward' else 'forward + backward'}" for name, which in groups]
    axes.set_xticks([place + 0.3 for place in range(len(groups))], labels)
    axes.set_ylabel("TFLOP/s")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = parse()
    require_gpu("experts_gpu.py", arguments)
    os.environ["HUB_MOE_GPU_EXPERTS"] = "triton"  # whatever speaks against it is an error then, and no fallback
    import torch

    import hub_moe.experts  # noqa: F401  (registers hub_moe)

    ratios: dict[str, Spread | float] = {}
    goals, figures = {}, {}
    for name in arguments.only:
        figures[name] = compare(name, arguments)
        print(json.dumps({name: figures[name]["tflops"]}), file=sys.stderr, flush=True)
        for which in PASSES:
            ratios |= spread_of(f"{name}_{which}", figures[name]["seconds"][which])
        needed_bytes = 2 * count_needed(arguments.tokens, SHAPES[name])
        ratios[f"{name}_saved"] = figures[name]["saved_bytes"]["ours"] / needed_bytes
        goals |= goals_of(name, list(figures[name]["saved_bytes"]))
    if arguments.out is not None and importlib.util.find_spec("matplotlib"):
        arguments.out.mkdir(parents=True, exist_ok=True)
        plot(figures, arguments.out / "experts_gpu_tflops.png")
    report(
        "experts_gpu" if len(figures) == len(SHAPES) else f"experts_gpu_{'_'.join(figures)}",
        ratios,
        goals,
        arguments,
        headline=[ratio for ratio in goals if ratio.endswith(("_forward_grouped_mm", "_both_grouped_mm"))],
        figures=figures,
        gpu=torch.cuda.get_device_name(),
        liger_autotunes=os.environ.get("LIGER_FUSED_MOE_AUTOTUNE", "1"),
    )


if __name__ == "__main__":
    main()
