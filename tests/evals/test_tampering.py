"""Whatever a cheat changes in a record is found and named, also where every hash and sum was made to fit again."""

import contextlib
import json
import math
import shutil
from dataclasses import replace

import pytest

from hub_moe.errors import EvaluationError
from hub_moe.evals.suites import load_suite

from .checkpoints import TASKS
from .forging import ALL, Forger, evaluate_other, failures, record_of, verify, write_json

# What a cheat may do without a model: (what, the check that finds it, a part of its words). Every hash fits again.
CHANGED = {
    "another score": (lambda f: f.change_metric("cloze", "acc", value=0.99), "numbers", "cloze acc: value is"),
    "a smaller standard error": (
        lambda f: f.change_metric("cloze", "acc", standard_error=0.001),
        "numbers",
        "standard_error is",
    ),
    "a bad metric called good": (
        lambda f: f.change_metric("running_text", "bits_per_byte", higher_is_better=True),
        "numbers",
        "higher_is_better is False",
    ),
    "a flattering number before the honest one": (
        lambda f: f.change_entry(
            "cloze", metrics=(replace(f.record.entries[0].main, value=1.0), *f.record.entries[0].metrics)
        ),
        "numbers",
        "cloze has other metrics",
    ),
    "another main metric": (lambda f: f.change_entry("cloze", main_metric="acc_norm"), "numbers", "main_metric is acc"),
    "unparsable answers kept quiet": (
        lambda f: f.change_entry("copying", num_unparsable=3),
        "numbers",
        "num_unparsable is",
    ),
    "an entry of nothing": (
        lambda f: f.change(entries=(*f.record.entries, replace(f.record.entries[0], name="mmlu", tasks=()))),
        "suite",
        "running_text, copying, mmlu",
    ),
    "an entry twice": (lambda f: f.change(entries=(f.record.entries[0], *f.record.entries)), "suite", "cloze, cloze"),
    "an entry less": (lambda f: f.change(entries=f.record.entries[1:]), "suite", "and declares cloze"),
    "a task of another version": (lambda f: f.change_task("cloze", version="9.0"), "prompts", "another version"),
    "a task twice": (
        lambda f: f.change_entry("cloze", tasks=f.record.entries[0].tasks * 2),
        "prompts",
        "more than once",
    ),
    "other prompts": (lambda f: f.change_task("cloze", prompts_sha256="0" * 64), "prompts", "another prompts_sha256"),
    "an edited task": (lambda f: f.change_task("cloze", config_sha256="0" * 64), "prompts", "another config_sha256"),
    "few-shot examples kept quiet": (lambda f: f.change_task("cloze", num_fewshot=5), "prompts", "another num_fewshot"),
    "other rows": (
        lambda f: f.change_task("cloze", dataset=replace(f.record.entries[0].tasks[0].dataset, rows_sha256="0" * 64)),
        "prompts",
        "another dataset",
    ),
    "a system prompt kept quiet": (
        lambda f: f.change(execution=replace(f.record.execution, system_prompt="Think.")),
        "suite",
        "system prompt",
    ),
    "a chat template that was not applied": (
        lambda f: f.change(execution=replace(f.record.execution, chat_template_sha256="0" * 64)),
        "suite",
        "chat template",
    ),
    "another suite's name": (
        lambda f: f.change(suite=replace(f.record.suite, name="standard")),
        "suite",
        "named standard, and declares offline",
    ),
    "another suite's hash without a declaration": (
        lambda f: f.change(suite=replace(load_suite("offline").source, declaration={})),
        "record",
        "lacks the key",
    ),
    "a dropped document": (
        lambda f: f.change_samples(lambda s: None, where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "1 documents have no answer: offline_cloze document 3",
    ),
    "a document twice": (
        lambda f: f.change_samples(lambda s: [s, s], where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "1 documents are there more than once",
    ),
    "a document in place of another": (
        lambda f: f.change_samples(lambda s: replace(s, index=99), where=lambda s: (s.entry, s.index) == ("cloze", 3)),
        "samples",
        "offline_cloze document 3",
    ),
    "another document's text": (
        lambda f: f.change_samples(lambda s: replace(s, document_sha256="0" * 64)),
        "samples",
        "16 documents or their prompts differ",
    ),
    "another group": (
        lambda f: f.change_samples(lambda s: replace(s, group="a")),
        "samples",
        "16 documents or their prompts differ",
    ),
    "answers moved to another entry": (
        lambda f: f.change_samples(lambda s: replace(s, entry="brackets"), where=lambda s: s.entry == "cloze"),
        "samples",
        "documents have no answer",
    ),
    "scores": (
        lambda f: f.change_samples(lambda s: replace(s, scores=dict.fromkeys(s.scores, 1.0))),
        "numbers",
        "scores do not follow from their answers",
    ),
    "sizes": (
        lambda f: f.change_samples(lambda s: replace(s, sizes={k: v * 2 for k, v in s.sizes.items()})),
        "numbers",
        "scores do not follow",
    ),
    "an answer less": (
        lambda f: f.change_samples(lambda s: replace(s, log_likelihoods=tuple(s.log_likelihoods)[:-1])),
        "samples",
        "no whole, finite answers",
    ),
    "flags less": (
        lambda f: f.change_samples(lambda s: replace(s, is_greedy=())),
        "samples",
        "no whole, finite answers",
    ),
    "texts where log-likelihoods were asked for": (
        lambda f: f.change_samples(lambda s: replace(s, texts=("A",))),
        "samples",
        "no whole, finite answers",
    ),
    # argmax takes NaN for the largest of all, and no difference from NaN is above a tolerance
    "NaN": (
        lambda f: f.change_samples(lambda s: replace(s, log_likelihoods=tuple(math.nan for _ in s.log_likelihoods))),
        "samples",
        "no whole, finite answers",
    ),
    "a limit that the suite has not": (
        lambda f: f.change_entry("cloze", limit=None),
        "numbers",
        "limit is 4, not None",
    ),
    "a few-shot seed": (lambda f: f.change(seeds={"fewshot": 7}), "suite", "few-shot seed"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_record_with_fitting_hashes_is_found(world, forger, tmp_path, what):
    change, check, words = CHANGED[what]
    change(forger)
    found = verify(forger.write(tmp_path), world / "base")
    assert found.outcome == "failed"
    assert words in failures(found)[check]


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"system_prompt": "You answer well."}, {"prompts"}),
        ({"entries": load_suite("offline", limit=4, tasks=TASKS, num_fewshot=1).entries}, {"prompts", "samples"}),
        ({"entries": load_suite("offline", limit=3, tasks=TASKS).entries}, {"prompts", "samples"}),
        ({"entries": load_suite("offline", limit=4, tasks=TASKS[:3]).entries}, {"suite", "prompts", "samples"}),
    ],
    ids=["system prompt", "few-shot", "limit", "fewer entries"],
)
def test_answers_to_other_questions_under_the_honest_declaration_are_found(world, forger, tmp_path, changes, fields):
    other = Forger(evaluate_other(world / "base", tmp_path / "other", **changes).path)
    other.change(suite=forger.record.suite, execution=replace(other.record.execution, system_prompt=None))
    found = verify(other.write(tmp_path / "forged"), world / "base", documents=ALL)
    assert fields <= failures(found).keys()
    assert found.num_replayed == 0


def edit(data, **changes):
    """The JSON with values at dotted paths replaced, and the declaration's hash made to fit."""
    from hub_moe.evals.records.record import hash_json

    data = json.loads(json.dumps(data))
    for path, value in changes.items():
        *folders, last = path.split("__")
        at = data
        for folder in folders:
            at = at[int(folder) if folder.isdigit() else folder]
        at[last] = value
    with contextlib.suppress(ValueError):
        data["suite"]["sha256"] = hash_json(data["suite"]["declaration"])
    return data


HOSTILE = {
    "a path out of the folder": ({"samples__name": "../other.parquet"}, "no name of a table"),
    "a hidden file": ({"samples__name": ".parquet"}, "no name of a table"),
    "no name": ({"samples__name": ""}, "no name of a table"),
    "a broken name": ({"samples__name": "a\0b"}, "no name of a table"),
    "missing samples": ({"samples__name": "offline-0.parquet"}, "are missing"),
    "another number of samples": ({"samples__num_rows": 15}, "16 rows; 15 were expected"),
    "a number that is none": ({"wall_s": math.nan}, "finite"),
    "infinity": ({"wall_s": math.inf}, "finite"),
    "half a character": ({"created": "\ud800"}, "whole characters"),
    "NaN in the declaration": ({"suite__declaration__fewshot_seed": math.nan}, "finite"),
    "an unknown key": ({"verified": True}, "no key 'verified'"),
    "a declaration that is none": ({"suite__declaration__entries": []}, "no entries"),
    "a huge limit": ({"suite__declaration__entries__0__limit": 10**30}, "more than"),
    "a task that is none": ({"suite__declaration__entries__0__tasks": ["nope"]}, "no task 'nope'"),
    "a folder of the author's": ({"suite__declaration__entries__0__source": "./"}, "--suite-dir"),
    "a folder anywhere": ({"suite__declaration__entries__0__source": "lm_eval//proc/self/cwd"}, "no folder of tasks"),
    "a folder above": ({"suite__declaration__entries__0__source": "hub_moe/../../tests"}, "no folder of tasks"),
    "a metric that is none": ({"suite__declaration__entries__0__main_metric": "best"}, "no metric 'best'"),
    "a column that is none": ({"suite__declaration__entries__0__group_column": "best"}, "no column 'best'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_record_fails_and_never_crashes(world, tmp_path, what):
    changes, words = HOSTILE[what]
    honest = record_of(world / "base")
    path = write_json(tmp_path, edit(json.loads(honest.read_text("utf-8")), **changes))
    for samples in honest.parent.glob("*.parquet"):
        shutil.copy(samples, tmp_path)
    found = verify(path, world / "base", documents=ALL)
    assert found.outcome == "failed"
    assert any(words in detail for detail in failures(found).values()), found.findings


def test_an_edited_record_fails_at_its_hash(world, tmp_path):
    shutil.copytree(world / "base" / "evals", tmp_path / "evals")
    path = record_of(tmp_path)
    path.write_text(path.read_text("utf-8").replace('"wall_s": ', '"wall_s": 1'), "utf-8")
    assert "was edited" in failures(verify(path, world / "base"))["record"]


def test_samples_of_another_record_fail_at_their_hash(world, tmp_path):
    shutil.copytree(world / "base" / "evals", tmp_path / "evals")
    (ours,) = (tmp_path / "evals").glob("*.parquet")
    (theirs,) = (world / "patch" / "evals").glob("*.parquet")
    shutil.copy(theirs, ours)
    assert "was edited: it has the hash" in failures(verify(record_of(tmp_path), world / "base"))["record"]


def test_a_table_that_would_fill_the_memory_is_not_unpacked(world, forger, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hub_moe.evals.records import samples as module
    from hub_moe.evals.records.samples import read_samples

    row = module._to_row(forger.samples[0])
    long = pa.Table.from_pylist([{**row, "log_likelihoods": [0.0] * 200_000}], schema=module._SCHEMA)
    pq.write_table(long, tmp_path / "long.parquet", compression="zstd")
    assert (tmp_path / "long.parquet").stat().st_size < 20_000
    monkeypatch.setattr(module, "_MAX_VALUES", 100_000)
    with pytest.raises(EvaluationError, match="200,000 values in a column"):
        read_samples(tmp_path / "long.parquet")
    wide = pa.Table.from_pylist([{**row, "texts": ["a" * 10_000]}] * 3000, schema=module._SCHEMA)
    pq.write_table(wide, tmp_path / "wide.parquet", compression="zstd")
    monkeypatch.setattr(module, "_MAX_BYTES", 10_000_000)
    with pytest.raises(EvaluationError, match="unpacks to more than"):
        read_samples(tmp_path / "wide.parquet")
    gaps = pa.Table.from_pylist([{**row, "log_likelihoods": [None]}], schema=module._SCHEMA)
    pq.write_table(gaps, tmp_path / "gaps.parquet")
    with pytest.raises(EvaluationError, match="gap in its column log_likelihoods"):
        read_samples(tmp_path / "gaps.parquet")
