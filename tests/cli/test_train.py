"""`hub-moe train` as a command: what it prints, refuses, and does in two processes."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hub_moe.training.run_config import parse_run_config

from ..training.runs import CHOICE, make_tables, read_losses, read_weights, run, save_base, write_rows

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory, tiny_tokenizer):
    """A run of chosen experts."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "choice.json").write_text(json.dumps(CHOICE), "utf-8")
    return make_tables(
        folder / "run",
        base=save_base(folder / "base", "deepseek_v3", tiny_tokenizer),
        rows=write_rows(folder / "rows.jsonl"),
        method={"name": "experts", "choice": str(folder / "choice.json")},
    )


def _command(tables, folder, *options, launcher=()):
    file = folder / "asked.toml"
    tables = {**tables, "output": {"folder": str(folder / "run")}}
    file.write_text(parse_run_config(tables).to_toml(), "utf-8")
    return [sys.executable, *launcher, "-m", "hub_moe", "train", str(file), *options]


def _start(command, **options):
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def _run(command, **options):
    process = _start(command, **options)
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tables, tmp_path):
    tables = {**tables, "training": {**tables["training"], "micro_batch_size": 2}}
    code, out, errors = _run(_command(tables, tmp_path, "--json", launcher=TORCHRUN))
    assert code == 0, errors
    report = json.loads(out)
    assert report["processes"] == 2
    alone = run({**tables, "output": {"folder": str(tmp_path / "alone")}})
    assert report["tokens"] == alone.report["tokens"]
    for (step, loss, held_out), (step_alone, loss_alone, held_out_alone) in zip(
        read_losses(tmp_path / "run"), read_losses(alone.folder), strict=True
    ):
        assert step == step_alone
        assert loss == pytest.approx(loss_alone, abs=1e-5)
        assert held_out == pytest.approx(held_out_alone, abs=1e-5)
    weights, expected = read_weights(tmp_path / "run" / "patch"), read_weights(alone.result)
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in weights.items())


@pytest.mark.slow
def test_an_error_of_a_run_in_two_processes_ends_both(tables, tmp_path):
    tables = {**tables, "training": {**tables["training"], "batch_size": 3}}
    code, _, errors = _run(_command(tables, tmp_path, launcher=TORCHRUN))
    assert code != 0
    assert "batch_size is 3, which 2 processes" in errors


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_same_command_goes_on(tables, tmp_path):
    command = _command(tables, tmp_path)
    with _start(command) as process:
        for line in process.stderr:
            if line.startswith("step 3/8"):
                break
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode != 0
    assert "the same command goes on from there" in errors
    assert not (tmp_path / "run" / "report.json").exists()
    code, out, errors = _run([*command, "--json"])
    assert code == 0, errors
    assert json.loads(out)["resumed_at_step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("file_bytes", [3_000, 20_000])
def test_no_room_is_one_sentence_and_leaves_nothing_half_written(tables, tmp_path, file_bytes):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    code, _, errors = _run(_command(tables, tmp_path), preexec_fn=limit_file_size)
    assert code == 1
    assert errors.splitlines()[-1].startswith(f"Error: Cannot write to {tmp_path / 'run'}"), errors
    names = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert not names & {"report.json", "patch"}
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
def test_no_room_for_the_pictures_loses_nothing_that_was_trained(tables, tmp_path):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = _command(tables, tmp_path, "--json")
    code, _, errors = _run(command, preexec_fn=limit_file_size)
    assert code == 1
    assert errors.splitlines()[-1].startswith(f"Error: Cannot write to {tmp_path / 'run'}"), errors
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"report.json", "patch"}
    code, out, errors = _run(command)
    assert code == 0, errors
    assert json.loads(out)["resumed_at_step"] == 8


def test_a_misspelt_key_is_told_at_once(tables, tmp_path):
    command = _command(tables, tmp_path, "--set", "training.stpes=3")
    code, out, errors = _run(command)
    assert (code, out) == (1, "")
    assert errors == "Error: [training] has no key 'stpes'; did you mean steps?\n"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(tables, tmp_path):
    code, out, errors = _run(_command(tables, tmp_path, "--dry-run", "--set", "training.steps=5"))
    assert code == 0, errors
    assert "routed experts" in out
    assert "4.61 K" in out  # 3 experts of 3 matrices of 32 x 16
    assert "steps" in out
    assert not (tmp_path / "run").exists()
