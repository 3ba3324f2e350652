"""The noise floor asks the same questions in other ways of running, and leaves the model as it was."""

import pytest

from hub_moe.errors import EvaluationError
from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.noise_floor import _describe, choose_probes, measure_noise_floor
from hub_moe.evals.records import read_record
from hub_moe.evals.run import RunFacts, answer_instances, evaluate_suite
from tests.anatomy.families import tiny_config

from .checkpoints import build, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    return save_model(tmp_path_factory.mktemp("noise") / "model", tiny_config("hub_moe"), tiny_tokenizer)


@pytest.mark.parametrize(("dtype", "largest"), [("float32", 1e-4), ("bfloat16", 2.0)])
def test_rounding_changes_little_and_the_record_keeps_it(model, tmp_path, dtype, largest):
    loaded = load_model(ModelRequest(str(model), dtype=dtype, batch_size=8))
    built = build(loaded.tokenizer, tasks=["cloze", "brackets"])
    answer_instances(loaded.lm, built.requests)
    before = [instance.resps for instance in built.requests]
    floor = measure_noise_floor(loaded, built, num_documents=8)
    assert floor.num_documents == 8
    assert set(floor.variations) == {"batch size 1", "experts eager", "no reuse of prefixes"}
    for found in floor.variations.values():
        assert 0 <= found["flips"] <= 8
        assert 0 <= found["max_difference"] < largest
    answer_instances(loaded.lm, built.requests)
    assert [instance.resps for instance in built.requests] == before
    assert loaded.lm.reuse_reason is None
    stored = evaluate_suite(loaded, built, tmp_path, RunFacts(["test"], noise_floor=floor))
    assert read_record(stored.path).record.noise_floor == floor


def test_flips_are_documents_with_another_choice_or_greedy_flag():
    documents = [["a", "b"]] * 3
    expected = [[(-1.0, True), (-2.0, False)]] * 3
    found = [[(-1.5, True), (-2.0, False)], [(-3.0, True), (-2.0, False)], [(-1.0, False), (-2.0, False)]]
    assert _describe(documents, expected, found) == {"flips": 2.0, "max_difference": 2.0}


def test_probes_are_spread_over_all_tasks_with_log_likelihoods(tiny_tokenizer):
    built = build(tiny_tokenizer, limit=6)
    probes = choose_probes(built, 6)
    assert [probe[0].task_name for probe in probes] == [
        name for name in ("offline_cloze", "offline_brackets", "offline_text") for _ in range(2)
    ]
    assert [probe[0].doc_id for probe in probes[:2]] == [0, 5]


def test_a_suite_without_log_likelihoods_has_no_noise_floor(model):
    loaded = load_model(ModelRequest(str(model)))
    with pytest.raises(EvaluationError, match="needs a task with log-likelihoods"):
        measure_noise_floor(loaded, build(loaded.tokenizer, limit=2, tasks=["copying"]))
