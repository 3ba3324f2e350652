"""The main job at a size of seconds, with real interruptions in real processes."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

from hub_moe.data import Corpus, Document
from hub_moe.demo import DemoPlan, DemoReport, plan_demo, run_demo
from hub_moe.demo.folder import open_run_folder
from hub_moe.demo.local_hub import open_local_hub
from hub_moe.errors import CheckpointError, ConfigError, HubError
from hub_moe.hubserver.process import Hub
from hub_moe.hubserver.store import Store
from hub_moe.hubserver.store.check import find_faults
from hub_moe.training import TrainingPlan, find_checkpoint, read_record

PLAN = DemoPlan(
    training=TrainingPlan(steps=30, batch_size=4, learning_rate=1e-2, evaluations=3, checkpoints=2),
    vocab_size=320,
    block_length=32,
    held_out_share=0.1,
    corpus_bytes=150_000,
    model_changes={
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
    curve_blocks=8,
    completion_tokens=8,
    tuning_steps=4,
    suite_limit=4,
    verified_documents=4,
)

PROGRAM = """
import sys
from hub_moe.demo import run_demo
from hub_moe.errors import HubMoeError
from tests.test_demo import PLAN
try:
    run_demo(sys.argv[1], plan=PLAN)
except HubMoeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _start(output, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(output)],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def _record(output):
    return read_record(find_checkpoint(output / "checkpoints"))


def _weights(output):
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict()


def _assert_same_end(output, finished):
    assert _record(output) == _record(finished)
    expected = _weights(finished)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in _weights(output).items())


def _go_on_until_the_model_is_made(output):
    """Start the run again and kill it behind the model: what comes then has tests of its own."""
    process = _start(output)
    for line in process.stderr:
        if line.startswith("Evaluating it by the suite"):
            break
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run, made in a process like those of the other tests."""
    output = tmp_path_factory.mktemp("demo") / "run"
    process = _start(output)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return output


def test_a_run_leaves_a_model_two_pictures_and_a_report(finished):
    names = {path.name for path in finished.iterdir()}
    pictures = {"chosen_experts.png", "expert_load.png", "loss_curve.png"}
    tuning = {"reference.jsonl", "tuning", "tuning.toml", "evals"}
    assert names == {"checkpoints", "hub", "model", "num_threads.txt", "report.json", "run.json", *pictures, *tuning}
    report = DemoReport.read(finished / "report.json")
    assert int((finished / "num_threads.txt").read_text("utf-8")) == report.training["torch_threads"]
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"checkpoint-30", "metrics.jsonl"}
    for picture in pictures:
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_happened(finished):
    report = DemoReport.read(finished / "report.json")
    assert json.loads((finished / "report.json").read_text("utf-8")) == json.loads(json.dumps(report.to_dict()))
    assert set(report.bits_per_byte) == {"model", "xz -9", "gzip -9", "unigram"}
    assert all(0 < value < 10 for value in report.bits_per_byte.values())
    assert report.training["steps"] == len(report.training["losses"]) == 30
    assert report.training["tokens"] == 30 * 4 * 32
    assert [point["tokens"] for point in report.training["held_out_losses"]] == [10 * 128, 20 * 128, 30 * 128]
    assert report.training["losses"][-1] < report.training["losses"][0]
    assert report.held_out["tokens"] == report.corpus["held_out"]["tokens"]
    assert report.held_out["bytes"] == report.corpus["held_out"]["bytes"]
    assert set(report.load_imbalance["last tenth"]) == {"layer 1", "layer 2"}
    assert report.parameters["total"] == sum(
        tensor.numel() for name, tensor in _weights(finished).items() if "lm_head" not in name and "bias" not in name
    )
    assert {task["verdict"] for task in report.comparison["comparison"]["tasks"]} <= {"better", "worse", "tied"}
    assert {found["outcome"] for found in report.verification.values()} <= {"bit-equal", "within tolerance"}
    assert len(report.verification) == 2  # the base's record lies beside the patch's
    assert len(report.summary_rows()) >= 6


def test_every_token_was_counted_in_the_load_history(finished):
    record = _record(finished)
    assert record.layer_indices == [1, 2]
    assert torch.tensor(record.load_history).sum((0, 2)).tolist() == [30 * 4 * 32 * 2] * 2


def test_the_saved_model_is_one_that_anybody_loads(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert len(tokenizer) == model.config.vocab_size == 320
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)


def test_the_hub_of_a_run_serves_the_model_and_the_dataset_by_name(finished, tmp_path):
    report = DemoReport.read(finished / "report.json")
    root = shutil.copytree(finished / "hub", tmp_path / "hub")
    with Store(root) as store:
        assert list(find_faults(store)) == []
    with Hub(root).running() as hub:
        api = HfApi(endpoint=hub.url, token=False)
        model = api.model_info(report.model["repo"], files_metadata=True)
        assert (model.sha, model.library_name) == (report.model["revision"], "transformers")
        assert model.card_data.datasets == [report.dataset["repo"]]
        published = {file.rfilename: file.size for file in model.siblings if file.rfilename != ".gitattributes"}
        folder = finished / "model"
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        assert published == sizes
        assert {name.split("/")[0] for name in published if "/" in name} == {"evals"}
        assert api.dataset_info(report.dataset["repo"]).sha == report.dataset["revision"]


def test_text_comes_back_from_the_hub_as_it_was_sent_and_a_failed_step_says_why(tmp_path):
    sent = Corpus(train=(Document("a.py", "one"),), held_out=(Document("b.py", "two"),))
    with open_local_hub(tmp_path / "hub", scratch=tmp_path / "scratch") as hub:
        received, _ = hub.send_corpus(sent)
        assert received == sent
        with pytest.raises(HubError, match="load_dataset .* failed: .*demo/absent"):
            hub.run_step("load_dataset", repo="demo/absent", revision="main", splits=str(tmp_path / "rows.json"))


def test_a_finished_run_is_only_read(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    report = run_demo(finished, plan=PLAN)
    assert report == DemoReport.read(finished / "report.json")
    assert "finished; --fresh starts it anew" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_with_other_settings_is_refused_and_named(finished):
    plan = dataclasses.replace(PLAN, vocab_size=300)
    with pytest.raises(ConfigError, match="plan.vocab_size is 320 there and 300 now"):
        run_demo(finished, plan=plan)


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "model").mkdir()
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not of a demo run"):
            run_demo(tmp_path, plan=PLAN, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fresh_removes_only_what_a_run_made(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    settings = {"plan": dataclasses.asdict(dataclasses.replace(PLAN, vocab_size=300))}
    folder = open_run_folder(output, settings, fresh=True)
    assert {path.name for path in output.iterdir()} == {"notes.txt", "run.json"}
    assert json.loads(folder.settings.read_text("utf-8")) == json.loads(json.dumps(settings))


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_ends_the_same(finished, tmp_path):
    output = tmp_path / "run"
    with _start(output) as process:
        for line in process.stderr:
            if line.startswith("step 18/30"):
                break
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode != 0
    assert errors.endswith("KeyboardInterrupt\n")
    assert "the same command goes on from there" in errors
    stopped_at = _record(output).step
    assert 18 <= stopped_at < 30
    assert not (output / "report.json").exists()
    _go_on_until_the_model_is_made(output)
    _assert_same_end(output, finished)


def test_a_run_killed_in_mid_save_leaves_nothing_that_looks_complete(finished, tmp_path):
    output = tmp_path / "run"
    process = _start(output)
    unfinished = output / "checkpoints" / "unfinished" / "checkpoint-15"
    while not unfinished.exists():
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    process.communicate(timeout=100)
    assert unfinished.exists()
    assert find_checkpoint(output / "checkpoints") is None
    assert not (output / "report.json").exists()
    _go_on_until_the_model_is_made(output)
    _assert_same_end(output, finished)


def test_a_run_killed_after_training_is_not_trained_again(finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "report.json").unlink()
    shutil.rmtree(output / "model")
    shutil.rmtree(output / "hub")
    report = run_demo(output, plan=PLAN)
    expected = DemoReport.read(finished / "report.json")
    assert (report.training["resumed_at_step"], report.training["tokens_per_s"]) == (30, None)
    assert (report.bits_per_byte, report.completion) == (expected.bits_per_byte, expected.completion)
    compared = [(task["task"], task["base"], task["candidate"]) for task in report.comparison["comparison"]["tasks"]]
    assert compared == [
        (task["task"], task["base"], task["candidate"]) for task in expected.comparison["comparison"]["tasks"]
    ]
    _assert_same_end(output, finished)


@pytest.mark.parametrize(
    ("file_bytes", "inside"), [(200_000, "/hub"), (400_000, "/checkpoints"), (430_000, "/checkpoints")]
)
def test_no_room_for_the_text_or_a_checkpoint_is_one_sentence(tmp_path, file_bytes, inside):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    process = _start(tmp_path / "run", preexec_fn=limit_file_size)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"CheckpointError: Cannot write to {tmp_path / 'run'}{inside}: ")
    assert find_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write to .*run: Not a directory"):
        run_demo(tmp_path / "file" / "run", plan=PLAN)


def test_minutes_fix_the_steps():
    one, three = plan_demo(minutes=1, seed=5), plan_demo(minutes=3, seed=5)
    assert three.training.steps == 3 * one.training.steps
    assert three.seed == three.training.seed == 5
