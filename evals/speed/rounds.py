"""Runs rival programs in turns and compares them as ratios: on a shared machine single times mean nothing."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# torch's threads fight with any other busy process; one setting for all rivals keeps the ratio fair
THREADS = str(os.cpu_count() or 1)


def measure_in_turns(programs: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run each program once per round, in alternating order; each prints one JSON object of figures last."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for index in range(rounds):
        names = list(programs) if index % 2 == 0 else list(reversed(programs))
        for name in names:
            output = subprocess.run(
                [sys.executable, *programs[name]],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": THREADS},
            ).stdout
            figures[name].append(json.loads(output.strip().splitlines()[-1]))
            print(f"round {index + 1}/{rounds} {name}: {figures[name][-1]}", file=sys.stderr)
    return figures


def median_ratio(ours: Sequence[Mapping[str, float]], peer: Sequence[Mapping[str, float]], key: str) -> float:
    """Median over rounds of ours / peer; below 1 is better than the peer."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, peer, strict=True))


def report(name: str, ratios: Mapping[str, float], goals: Mapping[str, float], **details: Any) -> None:
    """Print ratios beside their goals, and everything as JSON on stdout; exit 1 if a goal is missed."""
    missed = [key for key, goal in goals.items() if ratios[key] > goal]
    for key, ratio in ratios.items():
        goal = f"goal <= {goals[key]}" if key in goals else ""
        print(f"{name}: {key} = {ratio:.3f} {goal} {'MISSED' if key in missed else ''}", file=sys.stderr)
    print(json.dumps({"benchmark": name, "ratios": dict(ratios), "goals": dict(goals), **details}, indent=2))
    sys.exit(1 if missed else 0)
