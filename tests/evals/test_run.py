"""A run leaves a record of everything, agrees with lm_eval, loses nothing when killed, and shares no answer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_moe.errors import ConfigError, EvaluationError, UnsupportedModelError
from hub_moe.evals.journal import Journal
from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.records import find_records, read_record
from hub_moe.evals.records.record import hash_json
from hub_moe.evals.run import RunFacts, evaluate_suite, journal_key
from hub_moe.experts.products import choose_products

from .checkpoints import TASKS, build, evaluate, save_model, save_patch

ROOT = Path(__file__).parents[2]

# Arguments: model, folder of records. Kills itself behind the tenth answer.
KILLED = """
import os, signal, sys
from hub_moe.evals.journal import Journal
from tests.evals.checkpoints import evaluate
kept = Journal.add_partial
def add_partial(self, *answer):
    kept(self, *answer)
    if len(self._answers) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add_partial = add_partial
evaluate(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def model(tmp_path, tiny_config, tiny_tokenizer):
    return save_model(tmp_path / "model", tiny_config, tiny_tokenizer)


def answers(stored):
    return [(s.task, s.index, s.log_likelihoods, s.is_greedy, s.texts) for s in stored.read_samples()]


def test_the_record_says_what_was_run_and_how(model, tmp_path):
    record = evaluate(model, tmp_path / "evals").record
    assert (record.suite.name, record.model.name, record.model.kind) == ("offline", "model", "checkpoint")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= record.model.files.keys()
    assert all(len(sha256) == 64 for sha256 in record.model.files.values())
    execution = record.execution
    assert (execution.dtype, execution.experts, execution.batch_size) == ("float32", "hub_moe", 4)
    assert [entry.name for entry in record.entries] == list(TASKS)
    assert all(entry.limit == 6 and entry.tasks[0].num_documents == 6 for entry in record.entries)
    assert {"torch", "transformers", "lm_eval", "datasets", "python"} <= record.versions.keys()
    assert record.versions["hub_moe experts"] == choose_products(torch.float32).name
    assert record.entry("running_text").main.name == "bits_per_byte"
    assert record.entry("cloze").main.standard_error is not None
    assert not record.resumed


def test_a_record_is_alike_when_made_again(model, tmp_path):
    first, second = evaluate(model, tmp_path / "one"), evaluate(model, tmp_path / "two")
    assert answers(first) == answers(second)
    assert first.record.samples.sha256 == second.record.samples.sha256
    assert [(e.metrics, e.tasks) for e in first.record.entries] == [(e.metrics, e.tasks) for e in second.record.entries]


def test_metrics_are_those_of_lm_eval(model, tmp_path):
    record = evaluate(model, tmp_path / "evals", limit=12).record
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=4,
    )
    tasks = {task.source.name: task.task for task in build(lm.tokenizer, limit=12).tasks}
    theirs = lm_eval.evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=12, bootstrap_iters=0)[
        "results"
    ]
    for entry in record.entries:
        for metric in entry.metrics:
            name = metric.name if "," in metric.name else f"{metric.name},none"
            assert metric.value == pytest.approx(theirs[entry.tasks[0].name][name], rel=1e-6), metric


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(model, tmp_path):
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "killed")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == -9, process.stderr[-3000:]
    assert find_records(tmp_path / "killed") == []
    loaded = load_model(ModelRequest(str(model), batch_size=4))
    asked = []
    run = loaded.lm._loglikelihood_tokens
    loaded.lm._loglikelihood_tokens = lambda requests, **rest: asked.extend(requests) or run(requests, **rest)
    built = build(loaded.tokenizer)
    resumed = evaluate_suite(loaded, built, tmp_path / "killed", RunFacts(["test"]))
    whole = evaluate(model, tmp_path / "whole")
    assert answers(resumed) == answers(whole)
    assert resumed.record.resumed
    num_questions = sum(instance.request_type == "loglikelihood" for instance in built.requests)
    assert sum(request[0] is not None for request in asked) == num_questions - 10
    assert list((tmp_path / "killed" / ".unfinished").iterdir()) == []


def test_a_base_and_its_fine_tune_never_share_an_answer(model, tmp_path, tiny_tokenizer):
    patch = save_patch(tmp_path / "patch", model, tiny_tokenizer)
    keys = []
    for request in (
        ModelRequest(str(model)),
        ModelRequest(str(patch)),
        ModelRequest(str(model), dtype="bfloat16"),
        ModelRequest(str(model), experts="eager"),
        ModelRequest(str(model), batch_size=3),
    ):
        keys.append(journal_key(load_model(request)))
    assert len({hash_json(key) for key in keys}) == 5
    base, candidate = evaluate(model, tmp_path / "evals"), evaluate(patch, tmp_path / "evals")
    assert answers(base) != answers(candidate)
    assert candidate.record.model.kind == "expert_patch"
    assert candidate.record.model.base.files == base.record.model.files


def test_a_copy_of_a_model_in_another_folder_is_the_same_model(model, tmp_path, tiny_config, tiny_tokenizer):
    copy = save_model(tmp_path / "copy", tiny_config, tiny_tokenizer)
    other = save_model(tmp_path / "other", tiny_config, tiny_tokenizer, seed=1)
    keys = [journal_key(load_model(ModelRequest(str(each)))) for each in (model, copy, other)]
    assert keys[0] == keys[1] != keys[2]


def test_a_torn_line_of_the_journal_is_dropped_and_the_rest_kept(tmp_path):
    with Journal(tmp_path, {"model": "a"}) as journal:
        journal.add_partial("loglikelihood", ("one", "two"), (-1.5, True))
        journal.add_partial("generate_until", ("one", {"until": ["\n"]}), "text\u2028of lines\n")
    whole = journal.path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole)):
        journal.path.write_bytes(whole[:cut])
        with Journal(tmp_path, {"model": "a"}) as again:
            assert again.num_found == 1
            again.add_partial("loglikelihood", ("three", "four"), (-2.5, False))
        with Journal(tmp_path, {"model": "a"}) as last:
            assert last.find("loglikelihood", ("one", "two")) == (-1.5, True)
            assert last.find("loglikelihood", ("three", "four")) == (-2.5, False)
    journal.path.write_bytes(whole)
    with Journal(tmp_path, {"model": "a"}) as again:
        assert again.find("generate_until", ("one", {"until": ["\n"]})) == "text\u2028of lines\n"


def test_answers_drawn_at_random_are_not_kept(tmp_path):
    with Journal(tmp_path, {"model": "a"}) as journal:
        journal.add_partial("generate_until", ("one", {"do_sample": True}), "a")
        assert journal.find("generate_until", ("one", {"do_sample": True})) is None


def test_a_model_whose_logits_are_not_numbers_leaves_no_record(model, tmp_path):
    loaded = load_model(ModelRequest(str(model), batch_size=4))
    with torch.no_grad():
        loaded.lm.model.lm_head.weight[5] = float("nan")
    with pytest.raises(EvaluationError, match=r"The log-likelihood of document \d+ of offline_\w+ is nan"):
        evaluate_suite(loaded, build(loaded.tokenizer), tmp_path / "evals", RunFacts(["test"]))
    assert find_records(tmp_path / "evals") == []
    assert not list((tmp_path / "evals").glob("*.parquet"))


def test_a_full_disk_leaves_no_record_and_keeps_the_answers(model, tmp_path):
    loaded = load_model(ModelRequest(str(model), batch_size=4))
    folder = tmp_path / "evals"
    folder.mkdir()
    built = build(loaded.tokenizer)
    name = f"{built.suite.name}-"
    (folder / f".samples.{os.getpid()}.tmp").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match="directory"):
        evaluate_suite(loaded, built, folder, RunFacts(["test"]))
    assert not list(folder.glob(f"{name}*"))
    assert len(list((folder / ".unfinished").iterdir())) == 1


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch size is 0"),
        ({"dtype": "float33"}, ConfigError, "dtype 'float33' is unknown"),
        ({"experts": "fastest"}, ConfigError, "cannot run by 'fastest'"),
        ({"revision": "main"}, EvaluationError, "is a folder, which has no revision"),
        ({"endpoint": "localhost:8000"}, ConfigError, "is no URL"),
    ],
)
def test_a_model_that_cannot_run_as_asked_is_refused(model, request_, error, message):
    with pytest.raises(error, match=message):
        load_model(ModelRequest(str(model), **request_))


def test_a_dense_model_has_no_experts_to_choose(tmp_path, tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **shape)).save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    assert load_model(ModelRequest(str(tmp_path / "dense"))).execution.experts is None
    with pytest.raises(UnsupportedModelError, match="llama has no experts"):
        load_model(ModelRequest(str(tmp_path / "dense"), experts="eager"))


def test_the_id_of_a_record_covers_its_samples(model, tmp_path):
    stored = evaluate(model, tmp_path / "evals")
    data = json.loads(stored.path.read_text("utf-8"))
    assert data["id"].startswith(stored.path.stem.rpartition("-")[2])
    assert read_record(stored.path).record.samples == stored.record.samples
    assert replace(stored.record, samples=replace(stored.record.samples, sha256="0" * 64)).id != stored.record.id


def test_prompts_that_are_too_long_for_the_model_are_counted(model, tmp_path):
    record = evaluate(model, tmp_path / "long", max_length=40, tasks=("cloze", "running_text")).record
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [
        max(len(tokenizer("".join(i.args))["input_ids"]) for i in instances)
        for instances in build(tokenizer, tasks=("cloze",)).tasks[0].instances_by_document()
    ]
    assert 0 < record.entry("cloze").num_truncated == sum(length > 40 for length in lengths)
    assert record.entry("running_text").num_truncated == 0  # read in windows
    assert evaluate(model, tmp_path / "short", tasks=("cloze",)).record.entry("cloze").num_truncated == 0
