"""The comparison of fine-tuning methods in `evals/fine_tuning`: what it makes of records, and what is committed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EVALS = Path(__file__).parents[2] / "evals"
RESULTS = EVALS / "results" / "fine_tuning"


def _load(name):
    """A module which is a file of a program and not of a package."""
    spec = importlib.util.spec_from_file_location(f"fine_tuning_{name}", EVALS / "fine_tuning" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def summary():
    return _load("summary")


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


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_the_committed_figures_are_those_of_the_committed_records(summary, name):
    committed = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    files = [
        path for method in ("full", "experts", "lora") for path in (RESULTS / "runs").glob(f"{name}-{method}-*.json")
    ]
    records = [json.loads(path.read_text("utf-8")) for path in files]
    assert len(records) == len({(r["method"], r["learning_rate"], r["seed"]) for r in records})
    assert {json.dumps(record["settings"], sort_keys=True) for record in records} == {
        json.dumps(committed["settings"], sort_keys=True)
    }
    again = summary.summarise(records, name=name, settings=committed["settings"])
    for method, figures in committed["methods"].items():
        for key in ("task_loss", "base_text_bits_per_byte"):
            assert again["methods"][method][key] == pytest.approx(figures[key])
    assert (RESULTS / f"{name}.md").read_text("utf-8") == summary.render_table(committed)


def test_the_rows_of_a_field_are_halved_between_base_and_task(tmp_path):
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(7)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    base = _load("base")
    seen, new = base.read_halves(tmp_path / "sums.jsonl")
    assert (len(seen), len(new)) == (3, 4)
    assert sorted(map(base.join_row, seen + new)) == sorted(f"{number} + 1?\n{number + 1}" for number in range(7))
    assert base.read_halves(tmp_path / "sums.jsonl") == (seen, new)


def test_chats_become_running_text_and_long_texts_pieces():
    base = _load("base")
    chat = {"messages": [{"role": "user", "content": "One? "}, {"role": "assistant", "content": " Two.\n"}]}
    assert base.join_row(chat) == "One?\nTwo."
    assert "".join(base.cut("x" * 9000)) == "x" * 9000
    assert [len(piece) for piece in base.cut("x" * 9000)] == [4000, 4000, 1000]


def test_a_folder_that_holds_no_base_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"holds neither the base.json of base.py nor the report.json of hub-moe demo"):
        _load("trial").read_base(tmp_path)


def test_the_index_has_every_committed_comparison(summary):
    summaries = [json.loads(file.read_text("utf-8")) for file in RESULTS.glob("*.json")]
    assert summaries
    index = (RESULTS / "comparisons.md").read_text("utf-8")
    assert index == summary.render_index(summaries)
    assert all(f"({each['task']}.md)" in index for each in summaries)
