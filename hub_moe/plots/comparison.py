"""The picture of a paired comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import BLUE, GREY, ORANGE, Axes, Figure

_COLOURS = {"better": BLUE, "worse": ORANGE, "tied": GREY}


def plot_comparison(tasks: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """A dot and its interval for each task, better to the right; the grey band is what the test could not see.

    Tasks have scales of their own, such as accuracy and bits per byte, and a strip for each.

    Args:
        tasks: Each with `task`, `difference`, `low`, `high`, `verdict` ("better", "worse", "tied"), `lower_is_better`
            and `minimum_detectable_effect`, which may be None.
        title: Above the picture.
    """
    figure = Figure(figsize=(8, 1.1 + 0.85 * len(tasks)), dpi=150, layout="constrained")
    strips = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, task in zip(strips, tasks, strict=True):
        _draw_task(axes, task)
    strips[-1].set_xlabel("difference to the base, better to the right (95 % interval; grey: smaller than can be seen)")
    figure.suptitle(title)
    return figure


def _draw_task(axes: Axes, task: Mapping[str, Any]) -> None:
    difference, colour = task["difference"], _COLOURS[task["verdict"]]
    smallest = task.get("minimum_detectable_effect")
    if smallest is not None:
        axes.axvspan(-smallest, smallest, color=GREY, alpha=0.13, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.plot([task["low"], task["high"]], [0, 0], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([difference], [0], color=colour, marker="o", markersize=7, linestyle="none")
    label = f"{difference:+.4g} {task['verdict']}"
    axes.annotate(
        label, (difference, 0), xytext=(0, 8), textcoords="offset points", ha="center", color=colour, fontsize=8
    )
    reach = 1.15 * max(abs(value) for value in (task["low"], task["high"], difference, smallest or 0.0)) or 1.0
    axes.set_xlim((reach, -reach) if task.get("lower_is_better") else (-reach, reach))
    axes.set_ylim(-1, 1.6)
    axes.set_yticks([0], [_shorten(str(task["task"]))])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["left", "top", "right"]].set_visible(False)


def _shorten(name: str) -> str:
    plain = name.replace("$", r"\$")  # no mathematics in names
    return plain if len(plain) <= 32 else f"{plain[:31]}…"
