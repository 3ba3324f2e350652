"""All benchmarks on a GPU, one after the other, within eight minutes; and what they share.

    python evals/speed/gpu.py [--rounds 9] [--minutes 8] [--out FOLDER]

Needs torch, triton, transformers and this checkout; liger-kernel takes part where it is installed, and pictures are
drawn where matplotlib is. It times some 200 configurations for each shape of experts at its first call, for which eight
minutes do not last; so here it is held to one, which is not its best, unless --autotune-liger is given, and the results
say which it was. Each benchmark is a process of its own that writes its JSON into `--out`; one that the time
does not last for is ended and said so. Exit code 1 if a goal was missed or a benchmark ended early; without a GPU, one
sentence and exit code 0.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rounds import FEWEST_ROUNDS, add_options

FOLDER = Path(__file__).parent
PROGRAMS = {
    "mla_decode_gpu": ["mla_decode_gpu.py"],
    "experts_gpu_qwen3_30b": ["experts_gpu.py", "--only", "qwen3_30b"],
    "experts_gpu_deepseek_v2_lite": ["experts_gpu.py", "--only", "deepseek_v2_lite"],
}
MOST_BUSY = 12  # percent
LEAST_CAPABILITY = (8, 0)
HEAD_START_CYCLES = 2_000_000  # of the GPU, in which the processor queues what is timed


def why_no_gpu(program: str) -> str | None:
    """One sentence on what speaks against measuring here; None if nothing does."""
    import torch

    least = ".".join(map(str, LEAST_CAPABILITY))
    if not torch.cuda.is_available():
        return f"{program} needs a CUDA GPU of compute capability {least} or newer; torch finds none."
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"{program} needs compute capability {least}; {torch.cuda.get_device_name()} has less."
    return None


def require_gpu(program: str, arguments: argparse.Namespace) -> None:
    """One sentence and exit code 1 where this cannot run, or another program keeps the GPU busy."""
    why_not = why_no_gpu(program)
    if why_not:
        sys.exit(why_not)
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    busy = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])
    if busy > MOST_BUSY and not arguments.even_if_busy:
        sys.exit(f"Another program keeps this GPU {busy} % busy; stop it, or pass --even-if-busy.")


def measure(rivals: Mapping[str, Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of one call of every rival in every round, in random order within a round, by the GPU's own events."""
    import torch

    draw, seconds = random.Random(arguments.seed), {name: [] for name in rivals}
    for run in rivals.values():
        run()
    for _ in range(arguments.rounds):
        for name in draw.sample(list(rivals), len(rivals)):
            rivals[name]()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            for _ in range(arguments.repeats):
                rivals[name]()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / arguments.repeats)
    return seconds


def run_all(
    programs: Mapping[str, list[str]], options: list[str], *, minutes: float, autotunes_liger: bool = False
) -> dict[str, str]:
    """How each benchmark ended: `goals met`, `goals missed`, `failed` or `no time left`."""
    ended, deadline = {}, time.monotonic() + 60 * minutes
    for name, (script, *rest) in programs.items():
        left = deadline - time.monotonic()
        if left <= 0:
            ended[name] = "no time left"
            continue
        command = [sys.executable, str(FOLDER / script), *rest, *options]
        path = os.pathsep.join([str(FOLDER.parents[1]), *sys.path[1:]])
        liger = {"LIGER_FUSED_MOE_AUTOTUNE": str(int(autotunes_liger))}
        environment = {**os.environ, **liger, "PYTHONPATH": path}
        try:
            done = subprocess.run(command, timeout=left, env=environment, stdout=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            ended[name] = "no time left"
            continue
        reported = done.stdout.rstrip().endswith("}")  # what report() prints; a program that fails prints none
        ended[name] = "failed" if not reported else "goals missed" if done.returncode else "goals met"
        print(f"{name}: {ended[name]}", file=sys.stderr, flush=True)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of them together")
    parser.add_argument("--autotune-liger", action="store_true", help="takes some minutes more for each shape")
    parser.add_argument("--only", nargs="*", default=list(PROGRAMS), choices=PROGRAMS)
    arguments = parser.parse_args()
    why_not = why_no_gpu("gpu.py")
    if why_not:
        print(why_not, file=sys.stderr)
        return
    if arguments.rounds < FEWEST_ROUNDS:
        print(f"Fewer than {FEWEST_ROUNDS} rounds are for a first look.", file=sys.stderr)
    options = ["--rounds", str(arguments.rounds), *(["--even-if-busy"] if arguments.even_if_busy else [])]
    if arguments.out is not None:
        options += ["--out", str(arguments.out)]
    programs = {name: PROGRAMS[name] for name in arguments.only}
    ended = run_all(programs, options, minutes=arguments.minutes, autotunes_liger=arguments.autotune_liger)
    for name, how in ended.items():
        print(f"{name}: {how}")
    sys.exit(any(how != "goals met" for how in ended.values()))


if __name__ == "__main__":
    main()
