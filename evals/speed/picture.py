"""The picture of a benchmark: every ratio as a point with its spread, its goal as a mark, on a logarithmic axis."""

from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_MET, _MISSED, _NO_GOAL = "#2a7f3f", "#c0392b", "#4a6fa5"


def draw(result: Mapping[str, Any]) -> Figure:
    """One row a ratio, the first on top; green met its goal, red missed it, blue has none."""
    ratios, goals = result["ratios"], result["goals"]
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(ratios)), layout="constrained")
    axes = figure.add_subplot()
    for row, (name, each) in enumerate(ratios.items()):
        goal = goals.get(name)
        color = _NO_GOAL if goal is None else _MET if each["median"] <= goal else _MISSED
        axes.plot([each["lowest"], each["highest"]], [row, row], color=color, alpha=0.5, linewidth=3)
        axes.plot(each["median"], row, "o", color=color)
        if goal is not None:
            axes.plot(goal, row, "|", color="black", markersize=14, markeredgewidth=2)
    axes.axvline(1, color="grey", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=8)
    axes.set_ylim(len(ratios) - 0.3, -0.7)
    if all(each["lowest"] > 0 for each in ratios.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
    axes.set_xlabel("ours / other: less is better; | is the goal")
    axes.set_title(f"{result['benchmark']} on {result['environment']['processor']}", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    return figure
