"""A served model is asked as a loaded one is, and what goes wrong between here and there is one sentence."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_moe.cli.main import main
from hub_moe.errors import EvaluationError
from hub_moe.evals.models import ModelRequest, load_model
from hub_moe.evals.noise_floor import measure_noise_floor
from hub_moe.evals.records import find_records
from hub_moe.evals.verify import Reviewer, verify_record
from tests.anatomy.families import tiny_config

from .checkpoints import build, evaluate, save_model

ROOT = Path(__file__).parents[2]

CHAT = """
description = "Chats."
chat_template = true

[[entries]]
name = "copying"
tasks = ["offline_copying"]
source = "hub_moe/offline"

[[entries]]
name = "cloze"
tasks = ["offline_cloze"]
source = "hub_moe/offline"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    return save_model(tmp_path_factory.mktemp("served") / "model", tiny_config("hub_moe"), tiny_tokenizer)


@pytest.fixture(scope="module")
def url(model):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.evals.completions_server", str(model), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
        server.kill()


def _wait_for(port):
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("the server does not answer")


@pytest.fixture
def run(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hub-moe", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


def asking(model, url, *more, name="tiny", tasks="cloze,brackets"):
    few = ("--suite", "offline", "--tasks", tasks, "--limit", "3", "--batch-size", "4")
    return ("eval", name, "--endpoint", url, "--tokenizer", model, *few, *more)


def test_an_endpoint_gives_the_log_likelihoods_of_the_model_it_serves(run, model, url, tmp_path):
    tasks = ("cloze", "brackets", "copying")
    code, _, err = run(*asking(model, f"{url}/v1", "--out", tmp_path / "served", tasks=",".join(tasks)))
    assert code == 0, err
    (served,) = find_records(tmp_path / "served")
    loaded = evaluate(model, tmp_path / "loaded", limit=3, tasks=tasks)
    assert (served.record.model.kind, served.record.model.name, served.record.model.files) == ("endpoint", "tiny", {})
    assert served.record.execution.engine == "local-completions"
    assert served.record.energy is None
    pairs = list(zip(served.read_samples(), loaded.read_samples(), strict=True))
    for ours, theirs in pairs:
        assert ours.prompt_sha256s == theirs.prompt_sha256s
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-4)
        assert ours.texts == theirs.texts
    assert sum(len(ours.log_likelihoods) for ours, _ in pairs) == 21
    found = verify_record(served.path, Reviewer(model=str(model)))
    assert found.outcome in ("bit-equal", "within tolerance")
    assert any("endpoint and names no files" in note for note in found.reservations)
    assert any("engine local-completions, this check with hub_moe" in note for note in found.reservations)


def test_a_chat_endpoint_generates(run, model, url, tmp_path):
    more = ("--endpoint-kind", "chat", "--out", tmp_path)
    suite = tmp_path / "chat.toml"
    suite.write_text(CHAT, "utf-8")
    plain = run(*asking(model, f"{url}/v1", *more, tasks="copying"))
    assert (plain[0], "A chat endpoint takes chats" in plain[2]) == (1, True)
    code, _, err = run(*asking(model, f"{url}/v1", *more, tasks="copying"), "--suite", suite)
    assert code == 0, err
    (stored,) = find_records(tmp_path)
    assert stored.record.execution.engine == "local-chat-completions"
    assert any(sample.texts[0] for sample in stored.read_samples())
    assert stored.record.execution.chat_template_sha256 is None
    with pytest.raises(EvaluationError, match="writes its prompts itself"):
        verify_record(stored.path, Reviewer(model=str(model)))
    code, printed, err = run(*asking(model, f"{url}/v1", *more, tasks="cloze"), "--suite", suite)
    assert (code, printed) == (1, "")
    assert "gives no log-likelihoods" in [line for line in err.splitlines() if line.startswith("Error: ")][0]


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("/v1", "huge", "does not exist"),
        ("/broken", "tiny", "500"),
        ("/nowhere", "tiny", "404"),
    ],
)
def test_an_endpoint_that_refuses_is_one_sentence(run, model, url, tmp_path, monkeypatch, path, name, message):
    code, printed, err = run(*asking(model, url + path, "--out", tmp_path, name=name))
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert (code, printed, len(errors)) == (1, "", 1)
    assert message in errors[0]
    assert find_records(tmp_path) == []


def test_a_server_that_is_down_is_one_sentence(run, model, tmp_path):
    code, printed, err = run(*asking(model, "http://127.0.0.1:9/v1", "--out", tmp_path))
    assert (code, printed) == (1, "")
    assert "Error: The endpoint http://127.0.0.1:9/v1 cannot be reached" in err


def test_the_noise_floor_of_an_endpoint_is_refused(model, url):
    loaded = load_model(ModelRequest("tiny", endpoint=f"{url}/v1", tokenizer=str(model)))
    with pytest.raises(EvaluationError, match="noise floor of an endpoint cannot be measured"):
        measure_noise_floor(loaded, build(loaded.tokenizer, limit=2))
