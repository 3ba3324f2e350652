import math

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.patches import Rectangle

from hub_moe.plots import plot_expert_heat_map


def draw(scores, choice=None):
    figure = plot_expert_heat_map(scores, choice=choice, title="Experts of law", label="share of tokens")
    axes = figure.axes[0]
    [mesh] = [artist for artist in axes.get_children() if isinstance(artist, QuadMesh)]
    outlines = [artist.get_xy() for artist in axes.patches if isinstance(artist, Rectangle) and artist.get_width() == 1]
    return figure, axes, mesh, outlines


def test_the_map_shows_every_score_on_one_scale_from_zero():
    _, axes, mesh, outlines = draw({3: [0.1, 0.4, 0.5], 1: [0.2, 0.8, 0.0]})

    assert np.asarray(mesh.get_array()).reshape(2, 3).tolist() == [[0.2, 0.8, 0.0], [0.1, 0.4, 0.5]]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 0.8)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["1", "3"]
    assert axes.yaxis_inverted()
    assert outlines == []


def test_chosen_experts_are_outlined_where_they_are():
    scores = {layer: [1 / 64] * 64 for layer in range(1, 27)}
    figure, _, _, outlines = draw(scores, {1: [0, 63], 26: [5], 30: [1]})

    assert sorted(outlines) == [(0, 0), (5, 25), (63, 0)]
    assert all(8 < size < 16 for size in [figure.get_size_inches()[0]])


def test_layers_with_fewer_experts_leave_their_places_empty():
    _, _, mesh, _ = draw({0: [0.5, 0.5], 1: [0.25] * 4})
    rows = np.ma.filled(np.ma.asarray(mesh.get_array()), math.nan).reshape(2, 4)

    assert np.isnan(rows).tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("scores", [{0: [0.0, 0.0]}, {layer: [0.1] * 256 for layer in range(61)}])
def test_idle_and_large_models_can_be_saved(tmp_path, scores):
    figure, axes, _, _ = draw(scores)
    figure.savefig(tmp_path / "map.png")

    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert len(axes.get_xticks()) <= 17


def test_a_long_title_stays_inside_the_picture():
    title = "Experts that Python's language reference uses; the outlined ones are trained"
    figure = plot_expert_heat_map({1: [0.5, 0.5]}, title=title, label="share of tokens")
    figure.draw_without_rendering()
    box = figure.axes[0]._left_title.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
