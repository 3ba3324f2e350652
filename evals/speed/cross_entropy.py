"""The loss of the next token and its gradient, on the CPU: ours against transformers' `ForCausalLMLoss`.

    python evals/speed/cross_entropy.py [--rounds 9] [--tokens 512] [--vocabulary 129280] [--isa avx2]

In each round ours, the peer and the limit take turns in random order, in float32 and bfloat16. The limit is the
memory's: reading the logits twice and writing their gradient once. Two exponentials of each logit take longer than
that, above all in bfloat16, so it is told without a goal. `_peak` is memory beyond the logits, of which each way uses
the most in a process of its own. What ours gives is compared with float64 first.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rounds import (
    Spread,
    add_isa_option,
    add_options,
    compare,
    hold_to_isa,
    report,
    require_quiet,
    spread,
    take_turns,
    time_both,
)
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from hub_moe.modeling.losses import token_loss

GOALS = {"peer": 0.25, "peak": 0.5}
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # norm of the difference from float64 over norm
CHECKED_TOKENS = 32


def make_inputs(tokens: int, vocabulary: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Logits (1, L, V), a leaf that wants a gradient, and labels (1, L)."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(1, tokens, vocabulary)).to(getattr(torch, dtype)).requires_grad_()
    return logits, torch.randint(0, vocabulary, (1, tokens))


def peer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As the stock classes compute it."""
    return ForCausalLMLoss(logits, labels, logits.shape[-1])


def our_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """As HubMoe computes it."""
    return token_loss(ForCausalLMLoss, logits, labels=labels, vocab_size=logits.shape[-1])


LOSSES = {"ours": our_loss, "peer": peer_loss}


def make_step(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Loss and backward; the gradient starts from None, and is what the product before it would get."""

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
        return gradient

    return step


def make_limit(logits: Tensor) -> Callable[[], Any]:
    """Reads the bytes of the logits, and reads them again to write as many."""
    source = logits.detach().view(torch.float32)
    target = torch.ones_like(source)

    def move() -> None:
        source.sum()
        torch.mul(source, 0.5, out=target)

    return move


def largest_error(vocabulary: int, dtype: str) -> float:
    """Of the loss and of its gradient, each by norm, from float64."""
    logits, labels = make_inputs(CHECKED_TOKENS, vocabulary, dtype)
    wide = logits.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide[0, :-1], labels[0, 1:])
    (expected,) = torch.autograd.grad(exact, wide)
    loss, gradient = our_loss(logits, labels), make_step(our_loss, logits, labels)()
    return max(
        float((loss.double() - exact).abs() / exact), float((gradient.double() - expected).norm() / expected.norm())
    )


def peak_bytes(which: str, arguments: argparse.Namespace, dtype: str) -> int:
    """The most memory of a process beyond what it has with the logits, in one step."""
    sizes = [str(arguments.tokens), str(arguments.vocabulary)]
    program = [sys.executable, __file__, "--peak", which, dtype, *sizes]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["peak_bytes"])


def print_peak(which: str, dtype: str, tokens: str, vocabulary: str) -> None:
    """What `peak_bytes` asks a process of its own for."""
    small = make_step(LOSSES[which], *make_inputs(2, 64, dtype))
    small()  # which loads code and starts threads
    step = make_step(LOSSES[which], *make_inputs(int(tokens), int(vocabulary), dtype))
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before = _status_bytes("VmRSS")
    step()
    print(json.dumps({"peak_bytes": _status_bytes("VmHWM") - before}))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def compare_losses(dtype: str, arguments: argparse.Namespace) -> tuple[dict[str, Spread], dict[str, Any]]:
    """The ratios, and the figures behind them."""
    error = largest_error(arguments.vocabulary, dtype)
    assert error <= LARGEST_ERROR[dtype], f"the loss in {dtype} is off by {error}"
    logits, labels = make_inputs(arguments.tokens, arguments.vocabulary, dtype)
    calls: dict[str, Callable[[], Any]] = {name: make_step(loss, logits, labels) for name, loss in LOSSES.items()}
    calls["limit"] = make_limit(logits)
    for call in calls.values():
        call()
    rivals = {name: lambda call=call: time_both(call) for name, call in calls.items()}
    seconds = take_turns(rivals, rounds=arguments.rounds, label=dtype)
    ratios = {
        f"{dtype}_{other}{ending}": compare(seconds["ours"], seconds[other], clock)
        for other in ("peer", "limit")
        for ending, clock in (("", "wall"), ("_processor", "processor"))
    }
    peaks = {which: peak_bytes(which, arguments, dtype) for which in LOSSES}
    ratios[f"{dtype}_peak"] = spread([peaks["ours"] / peaks["peer"]])
    return ratios, {"error": error, "seconds": seconds, "peak_bytes": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=129280)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    add_isa_option(parser)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(*arguments.peak)
    hold_to_isa(arguments)
    busy = require_quiet(arguments)
    ratios: dict[str, Spread] = {}
    figures: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        found, figures[dtype] = compare_losses(dtype, arguments)
        ratios |= found
    report(
        f"cross_entropy_{arguments.isa}" if arguments.isa else "cross_entropy",
        ratios,
        {f"{dtype}_{other}": goal for dtype in figures for other, goal in GOALS.items()},
        arguments,
        headline=["float32_peer", "bfloat16_peer", "bfloat16_peak"],
        busy=busy,
        figures=figures,
    )


if __name__ == "__main__":
    main()
