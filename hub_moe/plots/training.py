"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import BLUE, GREY, ORANGE, Axes, Figure, Normalize, smooth


def plot_loss_curve(
    losses: Sequence[float], held_out: Sequence[tuple[int, float]], *, tokens_per_step: int, title: str
) -> Figure:
    """Training loss of each step, its moving average, and the held-out loss, over tokens seen.

    Args:
        losses: Of steps 1, 2, ..., nats per token.
        held_out: `(step, loss)` pairs.
        tokens_per_step: Turns steps into tokens.
        title: Above the axes.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    millions = [(step + 1) * tokens_per_step / 1e6 for step in range(len(losses))]
    axes.plot(millions, losses, color=BLUE, alpha=0.2, linewidth=0.6)
    axes.plot(millions, smooth(losses), color=BLUE, linewidth=1.8, label="training (moving average)")
    axes.plot(
        [step * tokens_per_step / 1e6 for step, _ in held_out],
        [loss for _, loss in held_out],
        color=ORANGE,
        marker="o",
        linestyle="none",
        label="held out",
    )
    if held_out:
        step, loss = held_out[-1]
        axes.annotate(
            f"{loss:.2f}",
            (step * tokens_per_step / 1e6, loss),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=ORANGE,
        )
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def plot_expert_load(
    load_maps: Sequence[tuple[str, Sequence[Sequence[float]]]], *, layer_indices: Sequence[int], title: str
) -> Figure:
    """Heat maps, layers down and experts across, one below the other on one colour scale.

    Args:
        load_maps: `(heading, load)` pairs; a load is (layers, experts), relative to even load: 1 is the mean.
        layer_indices: Number of each layer in the model.
        title: Above the first map.
    """
    num_layers, num_experts = len(layer_indices), len(load_maps[0][1][0])
    height = 1.1 + len(load_maps) * (0.75 + 0.42 * num_layers)
    figure = Figure(figsize=(max(7.0, 2.2 + 0.5 * num_experts), height), dpi=150, layout="constrained")
    all_axes = figure.subplots(len(load_maps), 1, squeeze=False, sharex=True)[:, 0]
    scale = Normalize(vmin=0.0, vmax=2.0)  # the same colours in every run; what is above 2 is dark red
    for axes, (heading, load) in zip(all_axes, load_maps, strict=True):
        image = axes.imshow(load, cmap="RdBu_r", norm=scale, aspect="auto")
        axes.set_title(heading, loc="left", fontsize=10, color=GREY)
        axes.set_ylabel("layer")
        axes.set_yticks(range(num_layers), [str(index) for index in layer_indices])
        axes.tick_params(length=0)
        if num_experts <= 32:
            _write_values(axes, load)
    all_axes[-1].set_xlabel("expert")
    all_axes[-1].set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    figure.suptitle(title)
    colour_bar = figure.colorbar(image, ax=all_axes.tolist(), pad=0.015, extend="max")
    colour_bar.set_label("load relative to even load")
    colour_bar.outline.set_visible(False)
    return figure


def _write_values(axes: Axes, load: Sequence[Sequence[float]]) -> None:
    for layer, row in enumerate(load):
        for expert, value in enumerate(row):
            is_dark = abs(value - 1) > 0.7
            axes.text(
                expert,
                layer,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if is_dark else "black",
            )


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
