"""What of the benchmark of the experts on a GPU needs no GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hub_moe.experts  # noqa: F401  (registers hub_moe)

FOLDER = Path(__file__).parents[2] / "evals" / "speed"
SHAPE = (5, 2, 24, 8)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("experts_gpu", FOLDER / "experts_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    done = subprocess.run([sys.executable, FOLDER / "experts_gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1
    needs = "experts_gpu.py needs a CUDA GPU of compute capability 8.0 or newer; torch finds none."
    assert done.stderr.strip() == needs


def test_operations_are_those_of_the_dense_products(benchmark, monkeypatch):
    counted = []
    multiply = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b: counted.append(2 * a.shape[0] * a.shape[1] * b.shape[1]) or multiply(a, b)
    )
    for which in benchmark.PASSES:
        counted.clear()
        benchmark.make_dense(7, SHAPE, which)()
        assert sum(counted) == benchmark.count_operations(7, SHAPE, which)


def test_goals_are_ratios_of_seconds_and_spread_is_taken_round_by_round(benchmark):
    goals = benchmark.goals_of("a", ["ours", "grouped_mm", "liger"])
    assert goals["a_forward_grouped_mm"] == 0.5
    assert goals["a_both_dense"] == pytest.approx(1 / 0.6)
    assert "a_both_liger" not in benchmark.goals_of("a", ["ours", "grouped_mm"])
    spread = benchmark.spread_of("a", {"ours": [1, 2, 3], "dense": [2, 2, 2]})
    assert spread == {"a_dense": {"median": 1, "lowest": 0.5, "highest": 1.5}}


def test_rivals_agree_with_float64_and_what_they_save_is_counted(benchmark):
    from experts_cpu import largest_error, run_float64

    layer, inputs = benchmark.make_layer(SHAPE), benchmark.make_inputs(64, SHAPE, 0)
    expected = run_float64(layer, inputs, backward=True)
    arguments = type("Arguments", (), {"without_liger": True})
    forwards = benchmark.make_forwards(layer, arguments)
    assert forwards.keys() == {"ours", "grouped_mm"}
    for forward in forwards.values():
        results = benchmark.make_runner(layer, forward, inputs, "both")()
        assert largest_error(results, expected) <= 2 * benchmark.LARGEST_ERROR
        assert results.keys() == expected.keys()
    saved = {name: benchmark.saved_bytes(layer, forward, inputs) for name, forward in forwards.items()}
    assert 2 * benchmark.count_needed(64, SHAPE) <= saved["ours"] < saved["grouped_mm"]
