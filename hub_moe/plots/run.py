"""The picture of a run, from the rows of its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import BLUE, GREY, ORANGE, Axes, Figure, smooth

_MOST_LINES_IN_LEGEND = 8


def plot_run(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Loss, imbalance of each layer and learning rate over tokens seen, one below the other.

    Args:
        rows: As `hub_moe.training.read_metrics` returns them; rows with a held-out loss alone show at the tokens of the
            row before.
        title: Above the picture.
    """
    figure = Figure(figsize=(8, 8.5), dpi=150, layout="constrained")
    loss_axes, imbalance_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.4])
    scale, unit = _token_unit(rows)
    _plot_loss(loss_axes, rows, scale)
    _plot_imbalance(imbalance_axes, [row for row in rows if row.get("imbalance")], scale)
    rates = [row for row in rows if row.get("learning_rate") is not None]
    rate_axes.plot([row["tokens"] / scale for row in rates], [row["learning_rate"] for row in rates], color=GREY)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rate_axes.set_xlabel(f"tokens seen{unit}")
    for axes in (loss_axes, imbalance_axes, rate_axes):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _plot_loss(axes: Axes, rows: Sequence[Mapping[str, Any]], scale: float) -> None:
    trained = [row for row in rows if row.get("loss") is not None]
    tokens = [row["tokens"] / scale for row in trained]
    losses = [row["loss"] for row in trained]
    axes.plot(tokens, losses, color=BLUE, alpha=0.25, linewidth=0.7)
    axes.plot(tokens, smooth(losses), color=BLUE, linewidth=1.8, label="training (moving average)")
    held_out = _held_out(rows, scale)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=ORANGE, marker="o", markersize=4, label="held out")
        where, loss = held_out[-1]
        axes.annotate(
            f"{loss:.2f}", (where, loss), xytext=(0, 8), textcoords="offset points", ha="center", color=ORANGE
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def _plot_imbalance(axes: Axes, rows: Sequence[Mapping[str, Any]], scale: float) -> None:
    tokens = [row["tokens"] / scale for row in rows]
    layers = list(rows[0]["imbalance"]) if rows else []
    for place, layer in enumerate(layers):
        share = place / max(1, len(layers) - 1)
        axes.plot(
            tokens,
            smooth([row["imbalance"][layer] for row in rows]),
            color=(0.16 + 0.69 * share, 0.44 - 0.04 * share, 0.73 - 0.56 * share),  # from blue to orange
            linewidth=1.2,
            label=f"layer {layer}" if len(layers) <= _MOST_LINES_IN_LEGEND or place in (0, len(layers) - 1) else None,
        )
    axes.axhline(1.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_ylabel("imbalance (busiest / mean)")
    axes.set_ylim(bottom=0.9)
    if layers:
        axes.legend(frameon=False, ncols=4)


def _held_out(rows: Sequence[Mapping[str, Any]], scale: float) -> list[tuple[float, float]]:
    points, tokens = [], 0
    for row in rows:
        tokens = row.get("tokens", tokens)
        if row.get("eval_loss") is not None:
            points.append((tokens / scale, row["eval_loss"]))
    return points


def _token_unit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    most = max((row.get("tokens", 0) for row in rows), default=0)
    return next(
        (
            (scale, f" ({unit})")
            for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
            if most > scale
        ),
        (1.0, ""),
    )
