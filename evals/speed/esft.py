"""Training a tenth of the experts against full fine-tuning: memory above the weights, time of a step, size on disk.

    python evals/speed/esft.py [--rounds 9] [--steps 4] [--sequences 4]

A HubMoe of about 165 M parameters in float32 on the CPU, AdamW, all layers with experts, and in each the experts that
the data uses most: those cost the most to train. `_and_rest` is the same with shared experts and all that is no expert
trained beside them. All methods start from the same weights in a fresh process and see the same tokens; their first
loss must be the same. Memory is the peak resident size while training, less that with the weights loaded. All compute
with the products of hub_moe, the fastest there are for full fine-tuning.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import Spread, add_options, compare, measure_in_turns, report, require_quiet
from step import SHAPE as STEP_SHAPE

SHAPE = {**STEP_SHAPE, "num_hidden_layers": 7}
SHARE = 0.1
LENGTH = 256
METHODS = ("full", "experts", "experts_and_rest")
GOALS = {"peak_bytes": 0.35, "step_s": 0.75, "patch_bytes": 0.15}


def make_model() -> Any:
    """The same random weights in every process."""
    import torch

    from hub_moe.modeling import HubMoeConfig, HubMoeForCausalLM

    torch.manual_seed(0)
    return HubMoeForCausalLM(HubMoeConfig(**SHAPE)).train()


def make_tokens(sequences: int) -> Any:
    """The same tokens in every process; low ids are frequent, as in text."""
    import torch

    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand((sequences, LENGTH), generator=generator)
    return (SHAPE["vocab_size"] ** uniform - 1).long()  # type: ignore[operator]


def choose_experts(model: Any, tokens: Any) -> dict[int, list[int]]:
    """A tenth of all experts, in each layer those with the most tokens."""
    import torch

    from hub_moe.anatomy import find_moe_layers

    layers = find_moe_layers(model)
    loads: dict[int, Any] = {}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, out, index=layer.index: loads.update({index: torch.bincount(out[2].flatten(), minlength=64)})
        )
        for layer in layers
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    wanted = round(SHARE * sum(layer.num_experts for layer in layers))
    numbers = [wanted // len(layers) + (place < wanted % len(layers)) for place in range(len(layers))]
    return {
        layer.index: loads[layer.index].argsort(descending=True)[:number].tolist()
        for layer, number in zip(layers, numbers, strict=True)
    }


def resident_bytes(field: str) -> int:
    """`VmRSS` or its high-water mark `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train_once(method: str, steps: int, sequences: int) -> None:
    """Train and print the first loss, the median time of a step behind the first, and the peak above the weights."""
    import torch

    from hub_moe.experts import freeze_all_but

    model, tokens = make_model(), make_tokens(sequences)
    chosen = choose_experts(model, tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident_bytes("VmRSS")
    if method != "full":
        with_rest = method == "experts_and_rest"
        freeze_all_but(model, chosen, shared_experts=with_rest, non_expert_modules=with_rest)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = resident_bytes("VmHWM") - before
    figures = {"first_loss": losses[0], "last_loss": losses[-1], "peak_bytes": peak}
    print(json.dumps({**figures, "step_s": statistics.median(times[1:]), "weight_bytes": before}))


def compare_files(sequences: int) -> dict[str, float]:
    """Bytes on disk of the trained experts, of these and the rest, and of the whole model."""
    from safetensors.torch import save_file

    from hub_moe.experts import freeze_all_but, trained_tensors

    model = make_model()
    trained = freeze_all_but(
        model, choose_experts(model, make_tokens(sequences)), shared_experts=True, non_expert_modules=True
    )
    experts = {name: tensor.contiguous() for name, tensor in trained_tensors(model).items()}
    rest = {name: model.get_parameter(name).detach() for name in set(trained) - experts.keys()}
    with tempfile.TemporaryDirectory() as scratch:
        patches = {"patch": experts, "patch_and_rest": experts | rest}
        sizes = {}
        for name, tensors in patches.items():
            save_file(tensors, Path(scratch) / f"{name}.safetensors")
            sizes[f"{name}_bytes"] = (Path(scratch) / f"{name}.safetensors").stat().st_size
        model.save_pretrained(Path(scratch) / "model")
        weights = sum(file.stat().st_size for file in (Path(scratch) / "model").glob("*.safetensors"))
        return {**sizes, "checkpoint_bytes": weights, "parameters": model.num_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=4, help=f"of {LENGTH} tokens in a step")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is not timed")
    if arguments.train:
        train_once(arguments.train, arguments.steps, arguments.sequences)
        return
    busy = require_quiet(arguments)
    options = ["--steps", str(arguments.steps), "--sequences", str(arguments.sequences)]
    programs = {name: [os.path.abspath(__file__), "--train", name, *options] for name in METHODS}
    figures = measure_in_turns(programs, rounds=arguments.rounds)
    files = compare_files(arguments.sequences)
    first_losses = [each["first_loss"] for method in METHODS for each in figures[method]]
    assert all(math.isclose(loss, first_losses[0], rel_tol=1e-6) for loss in first_losses), "not the same first loss"
    ratios: dict[str, Spread | float] = {}
    for ending, method in (("", "experts"), ("_and_rest", "experts_and_rest")):
        ratios |= {f"{key}{ending}": compare(figures[method], figures["full"], key) for key in ("peak_bytes", "step_s")}
        ratios[f"patch_bytes{ending}"] = files[f"patch{ending}_bytes"] / files["checkpoint_bytes"]
    report(
        "esft",
        ratios,
        GOALS,
        arguments,
        headline=["step_s", "patch_bytes"],
        busy_share_before=busy,
        files=files,
        figures=figures,
    )


if __name__ == "__main__":
    main()
