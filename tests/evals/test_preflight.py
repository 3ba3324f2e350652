"""What is known about a suite before a model is loaded, against a real Hub and without one."""

import json
import os
import subprocess
import sys

import pytest

from hub_moe.errors import ConfigError, DatasetError
from hub_moe.evals.preflight import check_suite
from hub_moe.evals.statistics import plan_detectable_difference
from hub_moe.evals.suites import load_suite

PUSH = """
import datasets
from huggingface_hub import HfApi
api = HfApi()
rows = datasets.Dataset.from_list([{"question": f"Is {n} even?", "label": n % 2} for n in range(40)])
for name in ("plain", "gated", "private"):
    datasets.DatasetDict(test=rows).push_to_hub(f"alice/eval-{name}", private=name == "private")
api.update_repo_settings("alice/eval-gated", repo_type="dataset", gated="auto")
api.create_repo("alice/eval-script", repo_type="dataset")
api.upload_file(path_or_fileobj=b"import datasets", path_in_repo="eval-script.py", repo_id="alice/eval-script",
    repo_type="dataset")
api.create_repo("alice/eval-empty", repo_type="dataset")
print(api.dataset_info("alice/eval-plain").sha)
"""

CHECK = """
import json, sys
from pathlib import Path
from hub_moe.evals.preflight import check_suite
from hub_moe.evals.suites import load_suite
said = []
found = check_suite(load_suite({suite!r}), say=said.append)
built = [task.source.dataset.revision for task in found.built.tasks] if found.built else []
print(json.dumps({{**found.to_dict(), "lines": found.to_lines(), "said": said, "built": built}}))
"""

TASK = """
task: {name}
dataset_path: alice/eval-{name}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def commit(hub):
    """The commit of alice/eval-plain, with the other datasets beside it."""
    return hub.run_python(PUSH).strip()


@pytest.fixture
def write_suite(tmp_path):
    """Writes a suite of one entry for each of alice's datasets `names`."""

    def write(*names, pins=None):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        entries = ""
        for name in names:
            (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name))
            entries += f'[[entries]]\nname = "{name}"\ntasks = ["{name}"]\nsource = "./tasks"\n'
            entries += f'datasets = {{ "alice/eval-{name}" = "{pins[name]}" }}\n' if pins else ""
        path = tmp_path / "hub.toml"
        path.write_text(f'description = ""\n{entries}')
        return str(path)

    return write


def check_on(hub, suite, *, user, home, **settings):
    environment = {**hub.environment(user, home=home), **settings}
    code = CHECK.format(suite=suite)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_dataset_in_the_way_is_named_with_its_reason(hub, commit, write_suite, tmp_path):
    suite = write_suite("plain", "gated", "private", "script", "missing", "empty")
    found = check_on(hub, suite, user="bob", home=tmp_path / "home")
    states = {check["path"].removeprefix("alice/eval-"): check["state"] for check in found["datasets"]}
    assert states == {
        "plain": "reachable",
        "gated": "gated",
        "private": "missing",
        "script": "script-only",
        "missing": "missing",
        "empty": "unreadable",
    }
    assert len(found["problems"]) == 5
    assert "ask for access on its page" in found["problems"][0]
    assert found["entries"] == []
    assert found["num_requests"] is found["expected_s"] is None


def test_a_dataset_without_a_pin_is_resolved_and_said_so(hub, commit, write_suite, tmp_path):
    found = check_on(hub, write_suite("plain"), user=None, home=tmp_path / "home")
    assert (found["datasets"][0]["pinned"], found["datasets"][0]["revision"]) == (None, commit)
    assert found["built"] == [commit]
    assert f"alice/eval-plain is not pinned by this suite; resolved at run time to {commit}" in found["said"]
    assert found["lines"][0] == f"alice/eval-plain: reachable, not pinned by this suite, {commit}"
    assert (found["num_requests"], found["entries"][0]["num_documents"]) == (80, 40)


def test_a_pinned_dataset_is_read_at_its_commit_and_later_without_a_network(hub, commit, write_suite, tmp_path):
    suite = write_suite("plain", pins={"plain": commit})
    online = check_on(hub, suite, user=None, home=tmp_path / "home")
    assert online["built"] == [commit]
    assert "not pinned" not in "".join([*online["said"], *online["lines"]])
    offline = check_on(hub, suite, user=None, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert [check["state"] for check in offline["datasets"]] == ["cached"]
    assert offline["built"] == [commit]
    assert offline["entries"] == online["entries"]


def test_a_commit_that_is_not_there_is_missing(hub, commit, write_suite, tmp_path):
    found = check_on(hub, write_suite("plain", pins={"plain": "0" * 40}), user=None, home=tmp_path / "home")
    assert [check["state"] for check in found["datasets"]] == ["missing"]


@pytest.mark.parametrize(
    "settings",
    [
        {"HF_HUB_OFFLINE": "1"},
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),  # the client tries again and again
    ],
)
def test_without_a_network_and_a_cache_a_dataset_is_unreachable(hub, write_suite, tmp_path, settings):
    found = check_on(hub, write_suite("plain"), user=None, home=tmp_path / "home", **settings)
    assert [check["state"] for check in found["datasets"]] == ["unreachable"]
    assert found["problems"][0].startswith("The Hub cannot be reached for alice/eval-plain, and it is not in the cache")


def test_another_commit_in_the_cache_is_not_taken_for_the_pinned_one(hub, commit, write_suite, tmp_path):
    check_on(hub, write_suite("plain"), user=None, home=tmp_path / "home")
    suite = write_suite("plain", pins={"plain": "0" * 40})
    found = check_on(hub, suite, user=None, home=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert f"lies in the cache at {commit}, but the suite pins {'0' * 40}" in found["problems"][0]
    build = (
        "from hub_moe.evals.suites import load_suite; from hub_moe.evals.tasks import build_suite\n"
        f"build_suite(load_suite({suite!r}))"
    )
    environment = {**hub.environment(None, home=tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", build], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(found["problems"][0])


def test_the_offline_suite_passes_where_nothing_can_be_reached():
    code = CHECK.format(suite="offline")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {check["state"] for check in found["datasets"]} == {"made here"}
    assert found["problems"] == []
    assert done.stderr == ""


def test_costs_and_what_can_be_seen_are_told_before_the_run(tiny_tokenizer):
    suite = load_suite("offline", tasks=["cloze", "running_text", "copying"], limit=50)
    found = check_suite(suite, tokenizer=tiny_tokenizer, tokens_per_s=1000.0)
    cloze, text, copying = found.entries
    requests = found.built.tasks_of("cloze")[0].instances
    tokens = len(tiny_tokenizer(["".join(request.args) for request in requests])["input_ids"])
    assert cloze.num_requests == tokens == 200
    counted = sum(map(len, tiny_tokenizer(["".join(request.args) for request in requests])["input_ids"]))
    assert cloze.prompt_tokens == counted
    assert copying.generated_tokens == 50 * 24
    assert found.expected_s == (cloze.prompt_tokens + text.prompt_tokens + copying.prompt_tokens) / 1000
    assert cloze.detectable_difference == plan_detectable_difference(50)
    assert cloze.detectable_difference_of_suite == plan_detectable_difference(50, alpha=0.05 / 3)
    assert text.detectable_difference is None
    assert (cloze.num_groups, copying.num_groups) == (7, None)
    assert "is not known before a run" in found.to_lines()[4]
    assert json.dumps(found.to_dict())


def test_what_is_not_known_is_said():
    found = check_suite(load_suite("offline", tasks=["cloze"], limit=1))
    assert found.entries[0].prompt_tokens is found.expected_s is None
    assert found.entries[0].detectable_difference is None
    assert "expected time: not known before the model runs" in found.to_lines()[-1]
    found.raise_if_blocked()


def test_a_difference_of_more_than_all_documents_is_not_promised():
    found = check_suite(load_suite("offline", tasks=["cloze"], limit=2))
    assert "too few documents to count on showing any difference in acc" in found.to_lines()[1]


def test_a_suite_that_cannot_run_is_refused_before_any_dataset_is_looked_at(tmp_path):
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        check_suite(load_suite("code-running"))
    with pytest.raises(DatasetError, match="has none"):
        check_suite(load_suite("gsm8k"), data_dir=tmp_path)
