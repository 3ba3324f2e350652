"""Two records are compared document by document, and only where both models were asked the same."""

from dataclasses import replace

import pytest

from hub_moe.errors import EvaluationError
from hub_moe.evals.compare import compare_records
from hub_moe.evals.records import Execution, Metric, ModelSource, write_record

from .records.examples import make_record, make_samples

RIGHT, WRONG = 1.0, 0.0


def store(tmp_path, name, scores, *, changes=None, **of_samples):
    record = make_record(model=ModelSource(name, "checkpoint"), **(changes or {}))
    return write_record(tmp_path, record, make_samples(scores, **of_samples))


def test_a_candidate_that_is_right_more_often_is_better(tmp_path):
    base = store(tmp_path, "base", [WRONG] * 12 + [RIGHT] * 8)
    candidate = store(tmp_path, "candidate", [RIGHT] * 11 + [WRONG] + [RIGHT] * 8)
    found = compare_records(base, candidate)
    (task,) = found.comparison.tasks
    assert (task.verdict, task.test, task.num_only_base, task.num_only_candidate) == ("better", "exact McNemar", 0, 11)
    assert task.difference.value == pytest.approx(11 / 20)
    assert (found.base_model, found.candidate_model, found.metrics) == ("base", "candidate", {"cloze": "acc"})
    turned = compare_records(candidate, base).comparison.tasks[0]
    assert (turned.verdict, turned.difference.value) == ("worse", pytest.approx(-11 / 20))


def test_the_same_answers_are_tied(tmp_path):
    base, candidate = (store(tmp_path, name, [RIGHT, WRONG] * 5) for name in ("base", "candidate"))
    assert compare_records(base, candidate).comparison.tasks[0].verdict == "tied"


def test_fewer_bits_per_byte_are_better(tmp_path):
    entry = make_record().entries[0]
    metric = Metric("bits_per_byte", 2.0, higher_is_better=False, num_documents=10)
    changes = {"entries": (replace(entry, metrics=(metric,), main_metric="bits_per_byte"),)}

    def store_bits(name, factor):
        samples = [
            replace(sample, scores={"bits_per_byte": factor * (90 + 2 * place)}, sizes={"bits_per_byte": 50.0 + place})
            for place, sample in enumerate(make_samples([0.0] * 10))
        ]
        return write_record(tmp_path, make_record(model=ModelSource(name, "checkpoint"), **changes), samples)

    task = compare_records(store_bits("base", 1.0), store_bits("candidate", 0.9)).comparison.tasks[0]
    assert (task.verdict, task.lower_is_better) == ("better", True)
    assert task.base.value == pytest.approx(sum(90 + 2 * i for i in range(10)) / sum(50 + i for i in range(10)))
    assert task.difference.value == pytest.approx(-0.1 * task.base.value)


def test_documents_of_a_group_are_clustered(tmp_path):
    def store_grouped(name, scores):
        samples = [replace(s, group=str(place // 4)) for place, s in enumerate(make_samples(scores))]
        return write_record(tmp_path, make_record(model=ModelSource(name, "checkpoint")), samples)

    task = compare_records(store_grouped("a", [WRONG] * 24), store_grouped("b", [RIGHT, WRONG] * 12)).comparison.tasks[
        0
    ]
    assert task.difference.num_clusters == 6
    assert task.test != "exact McNemar"


def test_other_prompts_are_refused(tmp_path):
    base = store(tmp_path, "base", [RIGHT, WRONG])
    candidate = store(tmp_path, "candidate", [RIGHT, WRONG], prompt_sha256s=("e" * 64, "f" * 64))
    with pytest.raises(EvaluationError, match=r"cloze cannot be compared: The prompts differ for 2 of 2 documents"):
        compare_records(base, candidate)


def test_a_part_of_the_documents_is_refused(tmp_path):
    base = store(tmp_path, "base", [RIGHT, WRONG, RIGHT, WRONG])
    candidate = store(tmp_path, "candidate", [RIGHT, WRONG, RIGHT])
    with pytest.raises(EvaluationError, match="1 documents were scored for the base only"):
        compare_records(base, candidate)


def test_edited_samples_are_refused(tmp_path):
    base = store(tmp_path, "base", [RIGHT, WRONG])
    candidate = store(tmp_path, "candidate", [WRONG, WRONG])
    candidate.samples_path.write_bytes(base.samples_path.read_bytes())
    with pytest.raises(EvaluationError, match="was edited"):
        compare_records(base, candidate)


def test_records_without_a_common_entry_are_refused(tmp_path):
    entry = replace(make_record().entries[0], name="other")
    base = store(tmp_path, "base", [RIGHT, WRONG])
    candidate = store(tmp_path, "candidate", [RIGHT, WRONG], changes={"entries": (entry,)}, entry="other")
    with pytest.raises(EvaluationError, match="no entry in common: cloze against other"):
        compare_records(base, candidate)


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path):
    base, candidate = (store(tmp_path, name, [RIGHT, WRONG]) for name in ("base", "candidate"))
    with pytest.raises(EvaluationError, match="no metric 'acc_norm'; it has acc"):
        compare_records(base, candidate, metrics={"cloze": "acc_norm"})


def test_a_metric_of_an_entry_that_is_not_shared_is_refused(tmp_path):
    base, candidate = (store(tmp_path, name, [RIGHT, WRONG]) for name in ("base", "candidate"))
    with pytest.raises(EvaluationError, match="do not share an entry 'clothe'; they share cloze"):
        compare_records(base, candidate, metrics={"clothe": "acc"})


def test_other_rounding_is_named(tmp_path):
    base = store(tmp_path, "base", [RIGHT, WRONG])
    execution = Execution(engine="hub_moe", dtype="bfloat16", experts="grouped_mm", batch_size=8, num_threads=3)
    candidate = store(tmp_path, "candidate", [RIGHT, WRONG], changes={"execution": execution})
    assert compare_records(base, candidate).execution_differences == {"dtype": ("float32", "bfloat16")}
