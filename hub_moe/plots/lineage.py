"""The picture of a lineage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .drawing import BLUE, GREY, ORANGE, Axes, Figure

_COLOURS = {"model": BLUE, "patch": ORANGE, "merge": "#5b3a9c", "pull request": "#2e7d4f", "absent": "#b5b5b5"}
_MARKS = {"model": "o", "patch": "s", "merge": "D", "pull request": "^", "absent": "x"}
_ROW_INCHES, _STEP_INCHES, _LETTER_INCHES = 0.24, 0.28, 0.066
_MOST_LETTERS, _MOST_ROWS = 110, 400


def plot_lineage(rows: Sequence[tuple[int, str, str, str]], *, title: str) -> Figure:
    """A tree from the top left, one line each; a legend says which mark is what.

    Args:
        rows: Depth, kind (`model`, `patch`, `merge`, `pull request`, `absent`, `group`), name and what is beside it.
            After 400 a last row says how many are left out.
        title: Above the tree.
    """
    shown = list(rows[:_MOST_ROWS])
    if len(rows) > len(shown):
        shown.append((0, "group", f"and {len(rows) - len(shown)} more", ""))
    texts = [_shorten(f"{name}  {about}") for _, _, name, about in shown]
    widths = [depth * _STEP_INCHES + len(text) * _LETTER_INCHES for (depth, *_), text in zip(shown, texts, strict=True)]
    width, height = max(4.5, max(widths) + 0.6), len(shown) * _ROW_INCHES
    figure = Figure(figsize=(width, height + 0.9), dpi=150)
    axes = figure.add_axes((0.2 / width, 0.45 / (height + 0.9), 1 - 0.3 / width, height / (height + 0.9)))
    axes.set(xlim=(-0.12, width - 0.42), ylim=(len(shown) - 0.5, -0.5))
    axes.axis("off")
    _draw_lines(axes, [depth for depth, *_ in shown])
    for row, ((depth, kind, name, _), text) in enumerate(zip(shown, texts, strict=True)):
        _draw_row(axes, (depth * _STEP_INCHES, row), kind, text, len(name))
    figure.text(0.15 / width, 1 - 0.12 / (height + 0.9), title, va="top", fontsize=11, parse_math=False)
    _draw_legend(axes, {kind for _, kind, _, _ in shown})
    return figure


def _draw_lines(axes: Axes, depths: Sequence[int]) -> None:
    """From each row an elbow to the row it hangs on."""
    for row, depth in enumerate(depths):
        above = next((one for one in range(row - 1, -1, -1) if depths[one] < depth), None)
        if above is not None:
            left = depths[above] * _STEP_INCHES
            points = ([left, left, depth * _STEP_INCHES], [above, row, row])
            axes.plot(*points, color="#c8c8c8", linewidth=0.9, zorder=1)


def _draw_row(axes: Axes, place: tuple[float, int], kind: str, text: str, num_letters_of_name: int) -> None:
    x, row = place
    if kind in _MARKS:
        axes.plot([x], [row], _MARKS[kind], color=_COLOURS[kind], markersize=5.5, zorder=2)
    beside = x + 0.12
    name, about = text[:num_letters_of_name], text[num_letters_of_name:]
    weight = "bold" if kind == "group" else "normal"
    options: dict[str, Any] = {"va": "center", "fontsize": 8.5, "parse_math": False}
    drawn = axes.text(
        beside, row, name, fontweight=weight, color="#1c1b19", **options, bbox=_BACK if kind == "group" else None
    )
    axes.annotate(
        about.strip(), (1, 0.5), xycoords=drawn, xytext=(6, 0), textcoords="offset points", color=GREY, **options
    )


_BACK = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


def _draw_legend(axes: Axes, kinds: set[str]) -> None:
    names = {"absent": "not here, or unreadable"}
    for kind, mark in _MARKS.items():
        if kind in kinds:
            axes.plot([], [], mark, color=_COLOURS[kind], markersize=5.5, label=names.get(kind, kind))
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, -0.005), ncols=5, fontsize=7.5, frameon=False, handletextpad=0.1
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"
