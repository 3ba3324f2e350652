import os
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import hf_raise_for_status

from hub_moe import __version__
from hub_moe.cli.main import describe_error
from hub_moe.cli.output import describe_bytes, describe_count, print_table
from hub_moe.errors import ConfigError

HUB_MOE = Path(sysconfig.get_path("scripts")) / "hub-moe"


def run(*arguments, **environment):
    return subprocess.run(
        [HUB_MOE, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_the_version_is_the_packages():
    assert run("--version").stdout == f"hub-moe {__version__}\n"


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "hub_moe", "--version"], capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (0, f"hub-moe {__version__}\n")


def test_help_names_every_command_and_is_quick():
    times_s = []
    for _ in range(3):
        before_s = _children_cpu_s()
        done = run("--help")
        times_s.append(_children_cpu_s() - before_s)

    assert all(f"\n  {command} " in done.stdout for command in ("demo", "inspect", "export"))
    assert min(times_s) < 0.5


def _children_cpu_s():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["demo", "inspect", "export"])
def test_every_help_has_examples(command):
    assert f"Examples:\n    hub-moe {command}" in run(command, "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspekt"],
        ["inspect"],
        ["inspect", "nano", "--memory", "much"],
        ["inspect", "nano", "--context", "0"],
        ["export", "a", "b"],
        ["export", "a", "b", "--to", "llama"],
    ],
)
def test_wrong_usage_ends_with_2_and_says_so_on_stderr_alone(arguments):
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_known_error_is_one_sentence_and_a_traceback_only_on_demand(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = run("inspect", tmp_path)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: {tmp_path}/config.json has no model_type, so it is not the config of a model.\n"
    assert "Traceback" in run("inspect", tmp_path, HUB_MOE_DEBUG="1").stderr


def hub_error(status, code):
    url = f"{ENDPOINT}/api/models/someone/model/tree/main"
    response = httpx2.Response(status, headers={"X-Error-Code": code}, request=httpx2.Request("GET", url))
    with pytest.raises(HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "sentence", "hint"),
    [
        (404, "RepoNotFound", f"someone/model is not on {ENDPOINT}.", "hf auth login"),
        (403, "GatedRepo", "someone/model is gated.", "ask for access"),
        (404, "RevisionNotFound", "someone/model has no such revision.", "branches"),
    ],
)
def test_an_error_of_the_hub_is_told_in_our_words_however_it_is_wrapped(status, code, sentence, hint):
    error = hub_error(status, code)
    wrapped = OSError("a long story\nin several lines")
    wrapped.__cause__ = error

    for one in (error, wrapped):
        told, hint_told = describe_error(one)
        assert told == sentence
        assert hint in hint_told


def test_an_unreachable_hub_is_told_with_its_address():
    told, hint = describe_error(LocalEntryNotFoundError("An error happened while trying to locate the file"))

    assert told == f"Cannot reach {ENDPOINT}, and the files are not in the local cache."
    assert "HF_ENDPOINT" in hint


def test_our_own_error_is_told_as_it_is():
    assert describe_error(ConfigError("n_group=3 must divide 8.")) == ("n_group=3 must divide 8.", None)


def test_another_error_is_told_by_its_first_line():
    assert describe_error(OSError("No space left.\nDetails")) == ("No space left.", None)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 K"), (9_996, "10.0 K"), (999_960, "1.00 M"), (671_026e6, "671.0 B")],
)
def test_counts_have_three_or_four_digits(number, text):
    assert describe_count(number) == text


def test_sizes_are_in_powers_of_ten():
    assert [describe_bytes(size) for size in (512, 70_272, 1.342e12)] == ["512 B", "70.3 kB", "1.34 TB"]


def test_a_table_in_a_narrow_terminal_loses_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    print_table(("Tensors", "sha256"), [("routed experts", "0123456789abcdef"), ("router", "fedcba")], [("all", "")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]

    assert [line[0] for line in lines if len(line) == 1] == [24 * "─", "all"]
    assert [line for line in lines if len(line) == 2] == [
        ["Tensors", "sha256"],
        ["routed", "0123456789a"],
        ["experts", "bcdef"],
        ["router", "fedcba"],
    ]
