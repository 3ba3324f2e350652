import pytest

pytest.importorskip("matplotlib")

from hub_moe.plots import plot_comparison

TASK = {
    "task": "a$b$_c" * 10,
    "difference": 0.02,
    "low": -0.01,
    "high": 0.05,
    "verdict": "tied",
    "lower_is_better": False,
    "minimum_detectable_effect": 0.04,
}


def test_a_strip_for_each_task_with_better_to_the_right(tmp_path):
    cost = {
        **TASK,
        "task": "bits",
        "difference": -0.5,
        "low": -0.7,
        "high": -0.3,
        "verdict": "better",
        "lower_is_better": True,
    }
    nothing = {**TASK, "difference": 0.0, "low": 0.0, "high": 0.0, "minimum_detectable_effect": None}
    figure = plot_comparison([TASK, cost, nothing], title="a against its base")
    figure.savefig(tmp_path / "comparison.png")
    first, second, third = figure.axes
    assert first.get_xlim()[0] < -0.04 < 0.05 < first.get_xlim()[1]
    assert second.get_xlim()[0] > 0 > second.get_xlim()[1]  # lower is better: the axis is turned
    assert third.get_xlim() == (-1.0, 1.0)
    assert [text.get_text() for text in second.texts] == ["-0.5 better"]
