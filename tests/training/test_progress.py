import re

import pytest

from hub_moe.training import RunMetrics
from hub_moe.training.progress import MovingAverage, TrainingProgress, describe_figures

from .test_metrics import _trainer


def test_a_row_is_one_short_line():
    row = {"tokens_per_s": 12345.6, "imbalance_worst": 1.234, "dead_experts": {"1": 0, "2": 0}}
    assert describe_figures(row, mean_loss=2.5) == "mean loss 2.500  12,346 tokens/s  imbalance 1.23"
    dead = row | {"dead_experts": {"1": 1, "2": 0}}
    assert describe_figures(dead, mean_loss=2.5).endswith("imbalance 1.23  1 dead expert")


def test_the_mean_loss_is_of_all_steps_and_not_that_of_the_first():
    mean = MovingAverage()
    assert mean.add(4.0) == pytest.approx(4.0)
    assert mean.add(2.0) == pytest.approx((0.95 * 4 + 2) / 1.95)
    for _ in range(200):
        last = mean.add(1.0)
    assert last == pytest.approx(1.0, abs=1e-3)


def test_off_a_terminal_about_ten_lines_are_printed(tiny_model, tmp_path, capsys):
    metrics = RunMetrics(tmp_path / "metrics.jsonl")
    trainer = _trainer(tiny_model, tmp_path, TrainingProgress(metrics), steps=12)
    metrics.add_to(trainer)
    trainer.train()
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if re.fullmatch(r"step \d+/12  mean loss .* tokens/s  imbalance .*", line)]
    assert len(shown) == 12


def test_a_logging_step_that_is_no_divisor_still_shows(tiny_model, tmp_path, capsys):
    metrics = RunMetrics(tmp_path / "metrics.jsonl")
    trainer = _trainer(tiny_model, tmp_path, TrainingProgress(metrics), steps=12, logging_steps=5)
    metrics.add_to(trainer)
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["5/12", "10/12"]
