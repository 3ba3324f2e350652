"""The comparison of fine-tuning methods in `evals/fine_tuning`: what it makes of records, and what is committed."""

import importlib.util
import json
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"
RESULTS = EVALS / "results" / "fine_tuning"


@pytest.fixture(scope="module")
def summary():
    """The module, which is a file of a program and not of a package."""
    spec = importlib.util.spec_from_file_location("fine_tuning_summary", EVALS / "fine_tuning" / "summary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _record(method, rate, seed, loss, bits=2.0):
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "rank": 6 if method == "lora" else None,
        "trained": 1000,
        "task_loss": {"before": 5.0, "after": loss},
        "base_text_bits_per_byte": {"before": 1.5, "after": bits},
        "versions": {},
    }


RECORDS = [
    _record("experts", 1e-3, 0, 4.0),
    _record("experts", 3e-3, 0, 3.0, bits=1.6),
    _record("experts", 1e-2, 0, 3.5),
    _record("experts", 3e-3, 1, 3.2, bits=1.8),
    _record("lora", 1e-3, 0, 4.5),
    _record("lora", 3e-3, 0, 4.4),
]


def test_each_method_is_summed_up_over_seeds_at_the_rate_that_is_best_for_the_task(summary):
    found = summary.summarise(RECORDS, name="sums", settings={})
    experts = found["methods"]["experts"]
    assert (experts["learning_rate"], experts["seeds"]) == (3e-3, 2)
    assert experts["task_loss"]["after"] == pytest.approx(3.1)
    assert experts["task_loss"]["after_sd"] == pytest.approx(0.2 / 2**0.5)
    assert experts["base_text_bits_per_byte"]["after"] == pytest.approx(1.7)
    assert len(found["rates_tried"]) == 5


def test_the_table_says_for_which_methods_a_better_rate_may_lie_outside(summary):
    table = summary.render_table(summary.summarise(RECORDS, name="sums", settings={}))
    assert "For lora the best rate is the largest or smallest one tried" in table
    assert "| experts | 1,000 | 0.003 | 2 | 3.100 ± 0.141 | 1.700 ± 0.141 (+0.200) |" in table


def test_the_committed_figures_are_those_of_the_committed_records(summary):
    committed = json.loads((RESULTS / "gsm8k.json").read_text("utf-8"))
    records = [json.loads(path.read_text("utf-8")) for path in (RESULTS / "runs").glob("gsm8k-*.json")]
    assert len(records) == len({(r["method"], r["learning_rate"], r["seed"]) for r in records})
    assert {json.dumps(record["settings"], sort_keys=True) for record in records} == {
        json.dumps(committed["settings"], sort_keys=True)
    }
    again = summary.summarise(records, name="gsm8k", settings=committed["settings"])
    for method, figures in committed["methods"].items():
        for key in ("task_loss", "base_text_bits_per_byte"):
            assert again["methods"][method][key] == pytest.approx(figures[key])
    assert (RESULTS / "gsm8k.md").read_text("utf-8") == summary.render_table(committed)
