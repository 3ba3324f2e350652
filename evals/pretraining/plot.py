"""The comparison as one picture: a row for each text."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from arms import MAIN_ARMS, Arm
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "dense": "#444444",
    "coarse-aux": "#d9662b",
    "fine-lossfree": "#2a6fbb",
    "fine-aux": "#3a9a5b",
    "fine-none": "#b04a9c",
}
_FIRST_SHOWN = 0.4  # of training; before, all curves fall together

Record = Mapping[str, Any]


def plot_comparison(records: Sequence[Record]) -> Figure:
    """Held-out loss over tokens, last loss of each seed, and load imbalance over training, for the main arms."""
    texts = sorted({record["text"] for record in records}, reverse=True)
    figure = Figure(figsize=(15, 4.4 * len(texts)), dpi=110, layout="constrained")
    for row, text in zip(figure.subplots(len(texts), 3, squeeze=False), texts, strict=True):
        runs = {arm: [r for r in records if (r["text"], r["arm"]) == (text, arm.name)] for arm in MAIN_ARMS}
        runs = {arm: found for arm, found in runs.items() if found}
        _plot_curves(row[0], runs, text)
        _plot_last_losses(row[1], runs)
        _plot_imbalance(row[2], {arm: found for arm, found in runs.items() if arm.has_experts})
        for axes in row:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plot_curves(axes: Axes, runs: Mapping[Arm, Sequence[Record]], text: str) -> None:
    for arm, found in runs.items():
        curves = [[point["loss"] for point in run["held_out_losses"]] for run in found]
        tokens = [point["tokens"] / 1e6 for point in found[0]["held_out_losses"]]
        shown = [place for place, value in enumerate(tokens) if value >= _FIRST_SHOWN * tokens[-1]]
        axes.plot(
            [tokens[place] for place in shown],
            [statistics.fmean(curve[place] for curve in curves) for place in shown],
            color=COLOURS[arm.name],
            marker="o",
            markersize=3,
            label=arm.title,
        )
    axes.set_title(f"{text}: held-out loss, mean over seeds", loc="left")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)


def _plot_last_losses(axes: Axes, runs: Mapping[Arm, Sequence[Record]]) -> None:
    """A dot for each seed and a bar at the mean; thin lines join the runs of one seed, which are compared."""
    arms = list(runs)
    last = {arm: {run["seed"]: run["held_out_losses"][-1]["loss"] for run in runs[arm]} for arm in arms}
    for seed in sorted({seed for losses in last.values() for seed in losses}):
        places = [place for place, arm in enumerate(arms) if seed in last[arm]]
        axes.plot(places, [last[arms[place]][seed] for place in places], color="#bbbbbb", linewidth=0.8, zorder=1)
    for place, arm in enumerate(arms):
        losses = list(last[arm].values())
        axes.scatter([place] * len(losses), losses, color=COLOURS[arm.name], zorder=3)
        axes.hlines(statistics.fmean(losses), place - 0.25, place + 0.25, color=COLOURS[arm.name], zorder=2)
    axes.set_title("after the last step, by seed", loc="left")
    axes.set_xticks(
        range(len(arms)), [arm.title.replace(", ", ",\n").replace(" top-2", "") for arm in arms], fontsize=8
    )
    axes.set_ylabel("nats per token")


def _plot_imbalance(axes: Axes, runs: Mapping[Arm, Sequence[Record]]) -> None:
    if not runs:
        axes.set_axis_off()
        return
    for arm, found in runs.items():
        curves = [[max(window["layers"]) for window in run["imbalance_over_time"]] for run in found]
        share = [100 * window["share_of_training"] for window in found[0]["imbalance_over_time"]]
        columns = list(zip(*curves, strict=True))
        colour = COLOURS[arm.name]
        axes.plot(share, [statistics.fmean(column) for column in columns], color=colour, label=arm.title)
        axes.fill_between(share, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
    axes.set_title("load imbalance of the worst layer, range of seeds", loc="left")
    axes.set_xlabel("% of training")
    axes.set_ylabel("busiest expert / mean (1 is even)")
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False)
