"""Requests built for a suite, against those of lm_eval itself."""

import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from hub_moe.errors import ConfigError, DatasetError
from hub_moe.evals.request_hashes import hash_request
from hub_moe.evals.suites import DECLARATIONS, load_suite
from hub_moe.evals.tasks import build_suite

MISSING = "Suites are run by lm_eval, which is not installed: pip install 'hub_moe[eval]'"
GSM8K = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{"question": f"What is {n} and {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(1, 13)]


pytestmark = pytest.mark.usefixtures("datasets_cache")


class AskedLM(LM):
    """Answers anything, and keeps what it was asked."""

    tokenizer_name = "tiny"

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer, self.asked = tokenizer, []

    def loglikelihood(self, requests):
        return self._keep(requests, (-1.0, False))

    def loglikelihood_rolling(self, requests):
        return self._keep(requests, -1.0)

    def generate_until(self, requests):
        return self._keep(requests, "1")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _keep(self, requests, answer):
        self.asked += [(request.request_type, request.args) for request in requests]
        return [answer] * len(requests)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, rows in (("test", ROWS[:4]), ("train", ROWS[4:])):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def ask_lm_eval(tasks, *, tokenizer=None, folder=DECLARATIONS / "tasks" / "offline", **settings):
    lm = AskedLM(tokenizer)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings)
    return lm.asked


def asked_of(built):
    return [(instance.request_type, instance.args) for instance in built.requests]


def same_requests(ours, theirs):
    """lm_eval asks by kind of request, and each kind by task."""
    kinds = list(dict.fromkeys(kind for kind, _ in theirs))
    return [each for kind in kinds for each in ours if each[0] == kind] == theirs


@pytest.mark.parametrize("num_fewshot", [0, 3])
@pytest.mark.parametrize("limit", [None, 7])
def test_requests_are_those_of_lm_eval(num_fewshot, limit):
    names = ["cloze", "arithmetic", "sorting", "running_text", "copying"]
    suite = load_suite("offline", tasks=names, num_fewshot=num_fewshot, limit=limit)
    tasks = [task for entry in suite.entries for task in entry.tasks]
    theirs = ask_lm_eval(tasks, num_fewshot=num_fewshot, limit=limit)
    assert same_requests(asked_of(build_suite(suite)), theirs)


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_requests_in_a_chat_template_are_those_of_lm_eval(chat_tokenizer, num_fewshot, multiturn):
    suite = load_suite("offline", tasks=["cloze", "copying"], num_fewshot=num_fewshot, limit=5)
    suite = replace(suite, chat_template=True, system_prompt="Be brief.", fewshot_as_multiturn=multiturn)
    theirs = ask_lm_eval(
        ["offline_cloze", "offline_copying"],
        tokenizer=chat_tokenizer,
        num_fewshot=num_fewshot,
        limit=5,
        apply_chat_template=True,
        system_instruction="Be brief.",
        fewshot_as_multiturn=multiturn,
    )
    ours = asked_of(build_suite(suite, tokenizer=chat_tokenizer))
    assert ours[0][1][0].startswith("<system>Be brief.</system>")
    assert ours[0][1][0].count("<user>") == (num_fewshot + 1 if multiturn else 1)
    assert same_requests(ours, theirs)
    assert asked_of(build_suite(suite, tokenizer=AskedLM(chat_tokenizer))) == ours


def test_gsm8k_reads_the_users_files_and_asks_as_lm_eval_does(data_dir):
    suite = load_suite("standard", tasks=["gsm8k"])
    built = build_suite(suite, data_dir=data_dir)
    paths = {split: str(data_dir / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    spec = load_yaml(GSM8K) | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
    spec.pop("tag")
    assert asked_of(built) == ask_lm_eval([spec], num_fewshot=5)
    source = built.tasks[0].source
    assert (source.dataset.path, source.dataset.revision, source.dataset.num_rows) == ("gsm8k/test.jsonl", None, 4)
    assert (source.num_fewshot, source.fewshot_seed, source.version) == (5, 1234, "3.0")
    assert source.generation["until"] == ["Question:", "</s>", "<|im_end|>"]


STANDARD_ROWS = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man bakes.",
        "ctx_b": "he",
        "endings": ["eats.", "sings.", "falls.", "runs."],
        "label": "2",
    },
    "ai2_arc": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "winogrande": {"sentence": "Ann paid Eve since _ owed.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    "piqa": {"goal": "Cut bread", "sol1": "with a knife", "sol2": "with a spoon", "label": 0},
    "mmlu": {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "algebra"},
    "gsm8k": ROWS[0],
    "super_glue": {"passage": "Snow is cold.", "question": "is snow cold", "label": 1},
    "lambada_openai": {"text": "Snow is white and very cold"},
}


def test_every_standard_task_of_lm_eval_is_built_from_files_in_the_shape_of_its_dataset(tmp_path):
    for name, row in STANDARD_ROWS.items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test", "dev"):
            rows = "".join(json.dumps({**row, "number": n}) + "\n" for n in range(2 if split == "test" else 30))
            (tmp_path / name / f"{split}.jsonl").write_text(rows)
    said = []
    built = build_suite(load_suite("standard", limit=2), data_dir=tmp_path, say=said.append)
    assert len(built.tasks) == 8 + 57
    assert "Reading mmlu, 57 tasks" in said
    assert {task.entry.name: task.source.num_fewshot for task in built.tasks} == {
        **{"hellaswag": 10, "arc_easy": 0, "arc_challenge": 25, "winogrande": 5, "piqa": 0},
        **{"mmlu": 5, "gsm8k": 5, "boolq": 0, "lambada_openai": 0},
    }
    for task in built.tasks:
        assert task.main_metric in {metric.name for metric in task.metrics}
        assert task.source.num_documents == len(task.documents) == 2
    assert {document.group for task in built.tasks_of("mmlu") for document in task.documents} >= {"mmlu_anatomy"}
    assert {metric.name: metric.higher_is_better for metric in built.tasks_of("boolq")[0].metrics} == {"acc": True}


def test_hashes_do_not_tell_where_the_users_files_lie(data_dir, tmp_path_factory):
    import shutil

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(data_dir / "gsm8k", elsewhere / "gsm8k")
    suite = load_suite("standard", tasks=["gsm8k"])
    assert (
        build_suite(suite, data_dir=data_dir).tasks[0].source == build_suite(suite, data_dir=elsewhere).tasks[0].source
    )


def test_without_the_train_file_gsm8k_asks_without_examples_or_with_those_of_the_task(data_dir):
    (data_dir / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(DatasetError, match="gsm8k takes its 5 examples from the split 'train'.*num_fewshot 0"):
        build_suite(load_suite("standard", tasks=["gsm8k"]), data_dir=data_dir)
    built = build_suite(load_suite("standard", tasks=["gsm8k"], num_fewshot=0), data_dir=data_dir)
    assert built.requests[0].args[0] == "Question: What is 1 and 1?\nAnswer:"
    worked = build_suite(load_suite("gsm8k"), data_dir=data_dir)
    assert (worked.tasks[0].source.num_fewshot, worked.requests[0].args[0].count("Q:")) == (8, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "gsm8k" / "test.jsonl").unlink(), "gsm8k lacks the split 'test' of gsm8k"),
        (lambda folder: (folder / "gsm8k").rename(folder / "other"), r"data folder with gsm8k/ in it; .* has none"),
        (lambda folder: (folder / "gsm8k" / "test.jsonl").write_text(""), "gsm8k/test.jsonl is empty"),
        (lambda folder: (folder / "gsm8k" / "test.jsonl").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "gsm8k" / "test.jsonl").rename(folder / "gsm8k" / "test.csv"), "of different kinds"),
        (lambda folder: (folder / "gsm8k" / "train.jsonl").write_text(json.dumps(ROWS[9])), "too few examples"),
    ],
)
def test_a_data_folder_that_does_not_fit_is_refused_in_a_sentence(data_dir, change, message):
    change(data_dir)
    with pytest.raises(DatasetError, match=message):
        build_suite(load_suite("standard", tasks=["gsm8k"]), data_dir=data_dir)


def test_a_data_folder_that_is_none_or_not_given_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        build_suite(load_suite("gsm8k"), data_dir=tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"data folder with text/ in it; give one by --data-dir"):
        build_suite(load_suite("text"))


def test_tasks_that_make_their_documents_themselves_want_nothing_of_a_data_folder(data_dir):
    suite = load_suite("offline", tasks=["brackets"], limit=2)
    assert asked_of(build_suite(suite, data_dir=data_dir)) == asked_of(build_suite(suite))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_ones_own_text_is_cut_at_line_ends_and_loses_nothing(tmp_path, ending):
    from datasets import Dataset

    text = "".join(f"line {n} of a longer text\n" for n in range(600))
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / f"test.{ending}"
    if ending == "txt":
        path.write_text(text)
    else:
        write = Dataset.from_dict({"text": [text, "short"]})
        write.to_json(path) if ending == "jsonl" else write.to_parquet(path)
    built = build_suite(load_suite("text"), data_dir=tmp_path)
    pieces = [instance.args[0] for instance in built.requests]
    assert "".join(pieces) == (text if ending == "txt" else text + "short")
    assert max(map(len, pieces)) <= 4000
    assert len(pieces) > 3
    assert built.tasks[0].main_metric == "bits_per_byte"
    assert all(metric.is_ratio and not metric.higher_is_better for metric in built.tasks[0].metrics)


def test_a_column_that_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "test.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DatasetError, match="no column `text`; there are body"):
        build_suite(load_suite("text"), data_dir=tmp_path)


def test_the_same_suite_has_the_same_hashes_in_every_process():
    code = (
        "from hub_moe.evals.suites import load_suite; from hub_moe.evals.tasks import build_suite\n"
        "print([task.source for task in build_suite(load_suite('offline', limit=20)).tasks])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([task.source for task in build_suite(load_suite("offline", limit=20)).tasks])
    assert done.stderr == ""


def test_hashes_change_with_what_they_stand_for():
    few = build_suite(load_suite("offline", tasks=["sorting"], num_fewshot=1)).tasks[0].source
    more = build_suite(load_suite("offline", tasks=["sorting"], num_fewshot=2)).tasks[0].source
    assert few.dataset == more.dataset
    assert few.file_sha256 == more.file_sha256
    assert few.config_sha256 != more.config_sha256
    assert few.prompts_sha256 != more.prompts_sha256
    other_seed = replace(load_suite("offline", tasks=["sorting"], num_fewshot=2), fewshot_seed=5)
    assert build_suite(other_seed).tasks[0].source.prompts_sha256 != more.prompts_sha256


def test_a_request_is_hashed_with_its_generation_settings():
    instance = build_suite(load_suite("offline", tasks=["copying"], limit=1)).requests[0]
    before = hash_request(instance)
    instance.arguments[1]["temperature"] = 0.9
    assert hash_request(instance) != before


def test_documents_keep_their_place_and_group():
    task = build_suite(load_suite("offline", tasks=["brackets"], limit=30)).tasks[0]
    assert [document.index for document in task.documents] == list(range(30))
    assert {document.group for document in task.documents} == {f"depth {n}" for n in range(1, 5)}
    assert len({document.sha256 for document in task.documents}) == 30
    assert len(task.instances) == 90
    assert (task.source.num_documents, task.source.dataset.num_rows) == (30, 200)


def test_a_chat_template_that_is_not_there_is_refused(tiny_tokenizer):
    suite = replace(load_suite("offline", limit=1), chat_template=True)
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        build_suite(suite)
    with pytest.raises(ConfigError, match="this tokenizer has none"):
        build_suite(suite, tokenizer=tiny_tokenizer)


def test_building_leaves_random_numbers_and_logging_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    level = logging.getLogger("lm_eval").level
    build_suite(load_suite("offline", tasks=["cloze"], limit=2))
    assert random.random() == expected
    assert logging.getLogger("lm_eval").level == level


def test_without_lm_eval_the_extra_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from hub_moe.evals.suites import load_suite; from hub_moe.evals.tasks import build_suite\n"
        "build_suite(load_suite('offline'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("MissingExtraError: " + MISSING)
