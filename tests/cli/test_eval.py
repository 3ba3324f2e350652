"""`hub-moe eval`, `compare` and `verify` as a person types them, against folders, a Hub and broken input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_moe.cli.main import main
from hub_moe.evals.records import find_records
from tests.anatomy.families import tiny_config
from tests.evals.checkpoints import save_model, save_patch
from tests.evals.forging import Forger

ROOT = Path(__file__).parents[2]
FEW = ("--suite", "offline", "--tasks", "cloze,brackets", "--limit", "4")

# Arguments: JSON of the commands. Prints for each its exit code, stdout and stderr.
SEVERAL = """
import contextlib, io, json, sys
from hub_moe.cli.main import main
found = []
for command in json.loads(sys.argv[1]):
    sys.argv = ["hub-moe", *command]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """A base and a patch for it; tests change copies only."""
    root = tmp_path_factory.mktemp("eval")
    base = save_model(root / "base", tiny_config("hub_moe"), tiny_tokenizer)
    save_patch(root / "patch", base, tiny_tokenizer)
    return root


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `hub-moe` in this process: `(exit code, stdout, stderr)`."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, _without_bars(captured.err)

    return run


def _without_bars(text):
    return "".join(line for line in text.splitlines(keepends=True) if "it/s]" not in line)


def run_all(hub, *commands):
    """Run commands one after the other in one process of its own, whose Hub is `hub`."""
    surroundings = hub.environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    commands = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, commands], env=surroundings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fine_tune_is_evaluated_beside_its_base_and_both_records_can_be_checked(run, models, tmp_path):
    out = tmp_path / "evals"
    code, printed, err = run("eval", models / "patch", *FEW, "--base", models / "base", "--out", out)
    assert code == 0, err
    assert "cloze acc" in printed
    assert "Candidate: patch" in printed
    assert "Traceback" not in err
    base, candidate = sorted((r.record.model.kind, r) for r in find_records(out))
    assert (base[0], candidate[0]) == ("checkpoint", "expert_patch")

    code, printed, err = run("eval", models / "patch", *FEW, "--base", models / "base", "--out", out, "--json")
    found = json.loads(printed)
    assert code == 0
    assert "has this evaluation of base already" in err
    assert found["comparison"]["base"] == base[1].record.id == found["comparison"]["base"]
    assert found["record"]["model"]["kind"] == "expert_patch"

    code, printed, _ = run("compare", base[1].path, candidate[1].path, "--json")
    assert (code, json.loads(printed)["suite"]) == (0, "offline")
    code, printed, err = run("verify", candidate[1].path, "--model", models / "patch", "--nonce", "1")
    assert (code, candidate[1].path.name + ": " in printed) == (0, True), err
    assert "Note: This is NOT the suite offline as it stands" in printed
    assert "Note: The nonce was given" in printed

    forged = Forger(candidate[1].path).change_metric("cloze", "acc", value=0.9).write(tmp_path / "forged")
    code, printed, _ = run("verify", forged, "--model", models / "patch", "--json")
    assert code == 1
    assert json.loads(printed)[forged.name]["outcome"] == "failed"
    code, printed, _ = run("verify", forged, "--model", models / "patch")
    assert (code, "FAILED  numbers: " in printed) == (1, True)


def test_another_way_of_running_does_not_take_the_bases_record(run, models, tmp_path):
    once = ("eval", models / "patch", *FEW, "--base", models / "base", "--out", tmp_path)
    assert "already" not in run(*once)[2]
    assert "already" not in run(*once, "--batch-size", "2")[2]
    assert "already" not in run(*once, "--num-fewshot", "1")[2]
    assert "already" in run(*once, "--limit", "4")[2]


def test_the_check_before_needs_no_weights(run, models, tmp_path):
    model = shutil.copytree(
        models / "base", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "evals")
    )
    code, printed, _ = run("eval", model, *FEW, "--dry-run", "--json")
    found = json.loads(printed)
    assert (code, found["num_requests"], found["problems"]) == (0, 28, [])
    code, printed, _ = run("eval", model, *FEW, "--dry-run")
    assert (code, "cloze: 4 documents" in printed) == (0, True)
    assert not (tmp_path / "evals").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "ofline"), "There is no suite 'ofline'; did you mean offline?"),
        (("--suite", "offline", "--tasks", "clothe"), "no task 'clothe'; did you mean cloze?"),
        (("--suite", "offline", "--limit", "0"), "limit=0 asks no documents"),
        (("--suite", "offline", "--dtype", "int8"), "The dtype 'int8' is unknown"),
        (("--suite", "offline", "--experts", "fastest"), "cannot run by 'fastest'"),
        (("--suite", "offline", "--device", "gpu"), "The device 'gpu' cannot be used here"),
        (("--suite", "offline", "--device", "meta"), "The device 'meta' cannot be used here"),
        (("--suite", "offline", "--max-length", "0"), "The longest sequence is 0 tokens"),
        (("--suite", "offline", "--revision", "main"), "which has no revision 'main'"),
        (("--suite", "offline", "--subfolder", "../x"), "leads out of"),
        (("--suite", "offline", "--subfolder", "x"), "holds no model"),
        (("--suite", "text"), "give one by --data-dir"),
        (("--suite", "offline", "--data-dir", "nowhere"), "nowhere does not exist"),
        (("--suite", "offline", "--base", "no base"), "'no base' is neither a folder nor a repo id"),
        (("--suite", "code-running"), "runs code that the model writes"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(run, models, tmp_path, arguments, message):
    code, printed, err = (
        run("eval", models / "base", *arguments, "--limit", "2", "--out", tmp_path / "out")[:3]
        if ("--limit" not in arguments)
        else run("eval", models / "base", *arguments, "--out", tmp_path / "out")
    )
    assert (code, printed) == (1, "")
    assert message in err
    assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_answer_longer_than_the_model_takes_is_one_sentence(run, models, tmp_path):
    arguments = ("--suite", "offline", "--tasks", "cloze", "--limit", "2", "--max-length", "1")
    code, printed, err = run("eval", models / "base", *arguments, "--out", tmp_path)
    assert (code, printed) == (1, "")
    assert "and the model takes 1 at most" in err
    assert not find_records(tmp_path)


def _break_model(name):
    def _break(folder):
        (folder / name).unlink()

    return _break


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _other_type(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}), "utf-8")


def _no_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


def _truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty, "holds no model"),
        (_other_type, "model cannot be loaded so: "),
        (_no_tokenizer, "has no tokenizer, which an evaluation needs"),
        (_break_model("model.safetensors"), "model.safetensors"),
        (_truncated, "model"),
    ],
)
def test_a_broken_model_is_one_sentence(run, models, tmp_path, damage, message):
    model = shutil.copytree(models / "base", tmp_path / "model")
    damage(model)
    code, printed, err = run("eval", model, *FEW, "--out", tmp_path / "out")
    assert (code, printed) == (1, "")
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


def test_names_that_are_nothing_are_one_sentence(run, tmp_path):
    for command in (("eval", "no model"), ("verify", "no claim"), ("compare", "none.json", "none.json")):
        code, printed, err = run(*command)
        assert (code, printed, err.count("\n")) == (1, "", 1)
        assert err.startswith("Error: ")
    assert "has no record" in run("verify", tmp_path)[2]


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a folder that refuses")
def test_a_folder_that_cannot_be_written_is_one_sentence(run, models, tmp_path):
    (tmp_path / "file").write_text("")
    code, printed, err = run("eval", models / "base", *FEW, "--out", tmp_path / "file" / "evals")
    assert (code, printed) == (1, "")
    assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
    code, _, err = run("eval", models / "base", *FEW, "--out", "/proc/self/evals")
    assert (code, "Traceback" in err) == (1, False)


def test_ctrl_c_leaves_the_answers_and_the_same_command_goes_on(models, tmp_path):
    out = tmp_path / "evals"
    tasks = ("--suite", "offline", "--tasks", "cloze", "--limit", "60", "--batch-size", "1", "--plain")
    command = [sys.executable, "-m", "hub_moe", "eval", str(models / "base"), *tasks, "--out", str(out), "--json"]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while _count_answers(out) < 20 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    answered = _count_answers(out)
    assert process.returncode == 130, err
    assert printed == b""
    assert b"Traceback" not in err
    assert answered >= 20
    assert find_records(out) == []
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["record"]
    assert record["resumed"]
    assert _count_answers(out) == 0


def _count_answers(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob(".unfinished/*.jsonl"))


def test_models_of_a_hub_are_evaluated_and_their_claims_checked(hub, models, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.tokens["alice"])
    api.create_repo("alice/eval-base")
    sha = api.upload_folder(repo_id="alice/eval-base", folder_path=models / "base").oid
    evals = tmp_path / "evals"
    first, law = run_all(
        hub,
        ["eval", "alice/eval-base", *FEW, "--out", evals, "--json"],
        ["eval", models / "patch", *FEW, "--base", f"alice/eval-base@{sha}", "--out", evals, "--json"],
    )
    assert first[0] == law[0] == 0, (first, law)
    record = json.loads(first[1])["record"]
    assert (record["model"]["repo"], record["model"]["revision"]) == ("alice/eval-base", sha)
    assert "already" in law[2]
    stored = {r.record.model.kind: r for r in find_records(evals)}
    own = [stored["checkpoint"].path.name, stored["checkpoint"].samples_path.name]
    api.upload_folder(repo_id="alice/eval-base", folder_path=evals, path_in_repo="evals", allow_patterns=own)
    folder = shutil.copytree(models / "patch", tmp_path / "law")
    metadata = json.loads((folder / "expert_patch.json").read_text("utf-8"))
    metadata["base"] |= {"repo": "alice/eval-base", "commit": sha}
    (folder / "expert_patch.json").write_text(json.dumps(metadata), "utf-8")
    api.upload_folder(
        repo_id="alice/eval-base", folder_path=folder, path_in_repo="patches/law", create_pr=True, commit_message="law"
    )
    (evaluated,) = run_all(
        hub,
        [
            "eval",
            "alice/eval-base",
            "--revision",
            "refs/pr/1",
            "--subfolder",
            "patches/law",
            *FEW,
            "--out",
            tmp_path / "law-evals",
            "--json",
        ],
    )
    assert evaluated[0] == 0, evaluated
    record = json.loads(evaluated[1])["record"]
    assert (record["model"]["kind"], record["model"]["requested_revision"]) == ("expert_patch", "refs/pr/1")
    assert record["model"]["base"]["revision"] == sha
    api.upload_folder(
        repo_id="alice/eval-base",
        folder_path=tmp_path / "law-evals",
        path_in_repo="patches/law/evals",
        revision="refs/pr/1",
        ignore_patterns=[".*"],
    )
    checked, main, only, lone, missing, nothing = run_all(
        hub,
        ["verify", "alice/eval-base#1", "--json"],
        ["verify", "alice/eval-base", "--json", "--documents", "3"],
        ["verify", "alice/eval-base#1", "--subfolder", "patches/law", "--documents", "2"],
        ["verify", next((tmp_path / "law-evals").glob("*.json")), "--subfolder", "patches/law", "--documents", "2"],
        ["verify", "alice/eval-base#7"],
        ["eval", "alice/nothing", *FEW],
    )
    outcomes = [each["outcome"] for each in json.loads(checked[1]).values()]
    assert (checked[0], outcomes) == (0, ["bit-equal", "bit-equal"]), checked
    assert (main[0], len(json.loads(main[1]))) == (0, 1)
    assert (only[0], only[1].count("ok      model")) == (0, 1), only
    assert lone[0] == 0, lone
    assert (missing[0], missing[2].count("Error: ")) == (1, 1)
    assert (nothing[0], "Error: alice/nothing is not on" in nothing[2]) == (1, True)


def test_a_hub_that_cannot_be_reached_is_one_sentence(hub, tmp_path):
    commands = [
        ["eval", "alice/nothing", *FEW],
        ["verify", "alice/nothing"],
        ["eval", "alice/nothing", *FEW, "--dry-run"],
    ]
    surroundings = {
        **os.environ,
        **hub.environment(),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(commands)],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for code, printed, err in json.loads(done.stdout.splitlines()[-1]):
        assert (code, printed) == (1, "")
        assert "Error: Cannot reach http://127.0.0.1:9" in err
        assert "Traceback" not in err
