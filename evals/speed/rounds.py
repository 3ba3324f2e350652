"""Rivals take turns on one machine, and what is told are ratios: on a shared machine single times mean nothing.

Every benchmark here runs its rivals in random order within each round, gives the median of the ratios with the lowest
and the highest, refuses a busy machine, and with `--out FOLDER` leaves `NAME.json` and its picture `NAME.png`.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FEWEST_ROUNDS = 9
MOST_BUSY = 0.12
ISA = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
# torch's threads fight with any other busy process; one setting for all rivals keeps the ratio fair
THREADS = str(os.cpu_count() or 1)

Spread = dict[str, float]
Figures = Mapping[str, float]


def add_options(parser: argparse.ArgumentParser, *, rounds: int | None = FEWEST_ROUNDS) -> None:
    """`--rounds`, unless `rounds` is None, `--out` and `--even-if-busy`."""
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"below {FEWEST_ROUNDS} is for a first look")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where NAME.json and NAME.png go")
    parser.add_argument("--even-if-busy", action="store_true", help="measure beside other programs, and say so")


def add_isa_option(parser: argparse.ArgumentParser) -> None:
    """`--isa`, for `hold_to_isa`."""
    parser.add_argument("--isa", choices=sorted(ISA), help="hold all rivals to these instructions")


def hold_to_isa(arguments: argparse.Namespace) -> None:
    """Start the program anew with torch and its libraries held to the instructions of `--isa`, unless they are."""
    if arguments.isa and any(os.environ.get(name) != value for name, value in ISA[arguments.isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA[arguments.isa]})


def require_quiet(arguments: argparse.Namespace) -> float:
    """The share of the machine that other programs take; ends the program if that is too much to measure beside."""
    busy = busy_share()
    if busy > MOST_BUSY and not arguments.even_if_busy:
        sys.exit(f"Other programs take {busy:.0%} of this machine; stop them, or pass --even-if-busy.")
    return busy


def busy_share(seconds: float = 2.0) -> float:
    """Share of the processors' time that is not idle now; 0 where the system does not tell."""
    before = _read_processor_times()
    time.sleep(seconds)
    after = _read_processor_times()
    if before is None or after is None:
        return 0.0
    return 1 - (after[0] - before[0]) / (after[1] - before[1])


def _read_processor_times() -> tuple[int, int] | None:
    """Idle and all ticks since the machine started."""
    try:
        line = Path("/proc/stat").read_text("utf-8").split("\n")[0]
    except OSError:
        return None
    numbers = [int(word) for word in line.split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)


def take_turns(
    rivals: Mapping[str, Callable[[], Figures]], *, rounds: int, seed: int = 0, label: str = ""
) -> dict[str, list[Figures]]:
    """What each rival returns, once a round, in an order drawn anew for every round."""
    figures: dict[str, list[Figures]] = {name: [] for name in rivals}
    draw = random.Random(seed)
    for index in range(rounds):
        for name in draw.sample(sorted(rivals), len(rivals)):
            figures[name].append(rivals[name]())
        newest = {name: each[-1] for name, each in figures.items()}
        print(f"round {index + 1}/{rounds} {label} {newest}", file=sys.stderr, flush=True)
    return figures


def measure_in_turns(programs: Mapping[str, Sequence[str]], *, rounds: int, seed: int = 0) -> dict[str, list[Figures]]:
    """`take_turns` with a fresh process for every figure; each program prints one JSON object of figures last."""

    def runner(program: Sequence[str]) -> Callable[[], Figures]:
        return lambda: _run_program(program)

    return take_turns({name: runner(program) for name, program in programs.items()}, rounds=rounds, seed=seed)


def _run_program(program: Sequence[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
    done = subprocess.run([sys.executable, *program], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def time_both(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call: `wall`, and `processor`, which a busy machine disturbs less."""
    start, processor_start = time.perf_counter(), time.process_time()
    call()
    return {"wall": time.perf_counter() - start, "processor": time.process_time() - processor_start}


def compare(ours: Sequence[Figures], other: Sequence[Figures], key: str) -> Spread:
    """Ours over the other, round by round: the median, the lowest and the highest; below 1 is better."""
    return spread([a[key] / b[key] for a, b in zip(ours, other, strict=True)])


def spread(ratios: Sequence[float]) -> Spread:
    """The median, the lowest and the highest of the rounds' ratios."""
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def report(
    name: str,
    ratios: Mapping[str, Spread | float],
    goals: Mapping[str, float],
    arguments: argparse.Namespace,
    **details: Any,
) -> None:
    """Print ratios beside their goals, and everything as JSON, also into `--out`; exit 1 if a goal is missed."""
    spreads = {key: ratio if isinstance(ratio, dict) else spread([ratio]) for key, ratio in ratios.items()}
    missed = [key for key, goal in goals.items() if spreads[key]["median"] > goal]
    for key, each in spreads.items():
        goal = f"goal <= {goals[key]:.3g}" if key in goals else ""
        line = f"{name}: {key} = {each['median']:.3f} ({each['lowest']:.3f} to {each['highest']:.3f}) {goal}"
        print(line, "MISSED" if key in missed else "", file=sys.stderr)
    options = {
        key: value for key, value in vars(arguments).items() if key != "out"
    }  # where it lies is nobody's business
    result = {
        "benchmark": name,
        "ratios": spreads,
        "goals": dict(goals),
        "environment": describe_machine(),
        "options": options,
        **details,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.json").write_text(text, "utf-8")
        if importlib.util.find_spec("matplotlib"):  # a machine with a GPU may lack it; table.py draws later
            from picture import draw

            draw(result).savefig(arguments.out / f"{name}.png", dpi=120)
    sys.exit(1 if missed else 0)


def describe_machine() -> dict[str, Any]:
    """Versions, processor and cores."""
    from hub_moe.environment import describe_versions

    return {"versions": describe_versions(), "processor": _processor_name(), "cores": os.cpu_count()}


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
