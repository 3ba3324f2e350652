"""Pictures of what experts do."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .drawing import ORANGE, Axes, Figure, PowerNorm, Rectangle

_CELL_INCHES = 0.17
_LETTERS_PER_INCH = 9  # of the title, axis labels and scale beside it


def plot_expert_heat_map(
    scores: Mapping[int, Sequence[float]],
    *,
    choice: Mapping[int, Sequence[int]] | None = None,
    title: str,
    label: str,
) -> Figure:
    """Layers down, experts across, one colour scale from 0 (nearly white) to dark blue; chosen experts are outlined.

    Colours follow the square root of the numbers: most experts lie close together, far below the busiest ones.

    Args:
        scores: Any number of each expert, by layer index; layers may differ in their experts.
        choice: Expert ids by layer index.
        title: Above the map.
        label: What the numbers are, at the scale.
    """
    indices = sorted(scores)
    width = max(map(len, scores.values()))
    rows = [[*scores[index], *[float("nan")] * (width - len(scores[index]))] for index in indices]
    size = (max(5.0, 2.4 + _CELL_INCHES * width), max(2.2, 1.5 + _CELL_INCHES * len(indices)))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    highest = max((value for row in rows for value in row if value == value), default=0.0)
    image = axes.pcolormesh(
        rows, cmap="Blues", norm=PowerNorm(0.5, vmin=0.0, vmax=highest or 1.0), edgecolors="white", linewidth=0.3
    )
    axes.set_facecolor("#d9d9d9")  # where a layer has no such expert
    _label_axes(axes, indices, width)
    for place, index in enumerate(indices):
        for expert in (choice or {}).get(index, ()):
            outline = Rectangle((expert, place), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6, zorder=3)
            axes.add_patch(outline).set_clip_on(False)
    axes.set_title(textwrap.fill(title, int(_LETTERS_PER_INCH * size[0])), loc="left", fontsize=11)
    scale = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=30)
    scale.set_label(label)
    scale.outline.set_visible(False)
    return figure


def _label_axes(axes: Axes, indices: Sequence[int], width: int) -> None:
    axes.invert_yaxis()
    axes.set_ylabel("layer")
    step = max(1, len(indices) // 26)
    axes.set_yticks([place + 0.5 for place in range(0, len(indices), step)], [str(i) for i in indices[::step]])
    axes.set_xlabel("expert")
    experts = range(0, width, max(1, width // 16))
    axes.set_xticks([expert + 0.5 for expert in experts], [str(expert) for expert in experts])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
