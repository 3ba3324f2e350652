"""Task files of a user's own, and what is refused before any code in them runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from hub_moe.errors import ConfigError, DatasetError
from hub_moe.evals.suites import load_suite
from hub_moe.evals.tasks import build_suite

pytestmark = pytest.mark.usefixtures("datasets_cache")

ROWS = [{"question": f"Is {n} even?", "answer": "no"} for n in range(12)]

OWN_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: {metric}
"""


@pytest.fixture
def own_suite(tmp_path):
    """A suite of two tasks in a folder of its own."""

    def write(*, metric="acc", rows=ROWS, extra="", suite=""):
        (tmp_path / "tasks").mkdir()
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps({**row, "half": n % 2}) + "\n" for n, row in enumerate(rows)))
        for name in ("one", "two"):
            text = OWN_TASK.format(name=name, path=data, metric=metric) + extra
            (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
        path = tmp_path / "own.toml"
        path.write_text(
            f'description = ""\n{suite}\n[[entries]]\nname = "both"\ntasks = ["one", "two"]\nsource = "./tasks"\n'
        )
        return load_suite(str(path))

    return write


def test_tasks_of_ones_own_beside_the_suite_are_groups_of_one_entry(own_suite):
    built = build_suite(own_suite())
    assert [{document.group for document in task.documents} for task in built.tasks] == [{"one"}, {"two"}]
    assert [task.name for task in built.tasks_of("both")] == ["one", "two"]
    assert built.tasks[0].main_metric == "acc"


def test_a_group_column_that_is_not_there_is_refused(own_suite):
    suite = own_suite()
    grouped = replace(suite, entries=(replace(suite.entries[0], group_column="half"),))
    assert {document.group for document in build_suite(grouped).tasks[0].documents} == {"0", "1"}
    wrong = replace(suite, entries=(replace(suite.entries[0], group_column="halves"),))
    with pytest.raises(ConfigError, match="no column 'halves' to group documents by; one has question, answer, half"):
        build_suite(wrong)


def test_a_metric_that_lm_eval_would_fetch_online_is_refused(own_suite):
    with pytest.raises(
        ConfigError, match=r"metric 'acc_nrm', for which lm_eval would go online.*did you mean acc_norm"
    ):
        build_suite(own_suite(metric="acc_nrm"))


def test_a_module_that_fetches_its_metric_is_refused_before_it_is_imported(own_suite, tmp_path):
    suite = own_suite(extra="process_docs: !function helper.keep\n")
    (tmp_path / "tasks" / "helper.py").write_text("import evaluate\nraise SystemExit('it was imported')\n")
    with pytest.raises(ConfigError, match=r"one imports evaluate in helper.py"):
        build_suite(suite)


def test_a_changed_module_is_another_task_file(own_suite, tmp_path):
    suite = own_suite(extra="process_docs: !function helper.keep\n")
    helper = tmp_path / "tasks" / "helper.py"
    helper.write_text("KEPT = 4\ndef keep(rows):\n    return rows.select(range(KEPT))\n")
    before = build_suite(suite).tasks[0].source
    helper.write_text("KEPT = 40 // 10\ndef keep(rows):\n    return rows.select(range(KEPT))\n")
    after = build_suite(suite).tasks[0].source
    assert before.num_documents == after.num_documents == 4
    assert before.file_sha256 != after.file_sha256
    assert before.prompts_sha256 == after.prompts_sha256


def test_code_of_the_model_runs_only_where_that_is_allowed(monkeypatch):
    suite = load_suite("code-running")
    with pytest.raises(
        ConfigError, match="humaneval runs code that the model writes; allow that only inside a sandbox"
    ):
        build_suite(suite)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ConfigError, match="needs HF_ALLOW_CODE_EVAL=1"):
        build_suite(suite, run_code=True)


def test_a_metric_that_was_allowed_and_cannot_be_fetched_is_told():
    code = (
        "from hub_moe.evals import build_suite, load_suite\n"
        "build_suite(load_suite('code-running', tasks=['mbpp']), run_code=True)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "mbpp fetches its metric from the public Hub, which failed" in done.stderr.splitlines()[-1]


def test_a_split_without_documents_and_a_function_that_is_not_there_are_refused(own_suite, tmp_path):
    suite = own_suite(extra="process_docs: !function helper.none\n")
    with pytest.raises(ConfigError, match="one names a function that is not there: Cannot import module 'helper'"):
        build_suite(suite)
    (tmp_path / "tasks" / "helper.py").write_text("def none(rows):\n    return rows.select([])\n")
    with pytest.raises(DatasetError, match="one has no documents in the split 'test'"):
        build_suite(suite)


def test_tasks_and_metrics_that_are_not_there_are_refused_with_the_nearest(own_suite):
    suite = own_suite()
    entry = suite.entries[0]
    for change, message in (
        ({"tasks": ("oen",)}, r"no task 'oen' in ./tasks; did you mean one"),
        ({"source": "./task"}, r"'./task' of both is no folder of tasks; did you mean tasks"),
        ({"source": "lm_eval/helaswag"}, "did you mean hellaswag"),
        ({"main_metric": "acc_norm"}, "one has no metric 'acc_norm' for both; it has acc"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_suite(replace(suite, entries=(replace(entry, **change),)))
