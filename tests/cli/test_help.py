"""Every command's --help is a committed text, so that a new command or option shows in review.

`make golden` rewrites the texts after a deliberate change.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden" / "cli"

# typer draws for the terminal it finds; this pins one: 100 columns, no colour, no CI service.
TERMINAL = {"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
TERMINAL |= {"_TYPER_FORCE_DISABLE_TERMINAL": "1", "PYTHONUTF8": "1", "LANGUAGE": "en"}
NOT_PASSED_ON = {"GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "TTY_COMPATIBLE"}

PRINT_HELPS = """
import json
from typer.main import get_command
from typer.testing import CliRunner
from hub_moe.cli.main import app

def helps(command, path):
    arguments = [*path[1:], "--help"]
    done = CliRunner().invoke(app, arguments, prog_name="hub-moe", catch_exceptions=False)
    yield "-".join(path), done.output
    for name, inner in getattr(command, "commands", {}).items():
        yield from helps(inner, [*path, name])

print(json.dumps(dict(helps(get_command(app), ["hub-moe"]))))
"""


@pytest.fixture(scope="module")
def helps():
    """The help of every command in the tree, by name: `hub-moe`, `hub-moe-inspect`, ..."""
    passed_on = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HELPS],
        env=passed_on | TERMINAL,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout)
    return {name: _without_trailing_spaces(text) for name, text in texts.items()}


def _without_trailing_spaces(text):
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def _read_golden():
    return {path.stem: path.read_text(encoding="utf-8") for path in GOLDEN.glob("*.txt")}


def _write_golden(helps):
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name, text in helps.items():
        (GOLDEN / f"{name}.txt").write_text(text, encoding="utf-8")


def test_every_help_is_the_committed_text(helps, request):
    if request.config.getoption("--update-golden"):
        _write_golden(helps)
    assert _read_golden() == helps, "run `make golden` if the change is meant, and commit it"
