"""The README is true: its programs and commands run as they stand, and what it names exists."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_blocks(text):
    """The fenced blocks of a Markdown text, as `(language, content)`."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def read_examples(text):
    """Each Python block with the `hub-moe` commands that follow it, up to the next Python block."""
    examples = []
    for language, content in read_blocks(text):
        if language == "python":
            examples.append((content, []))
        elif language == "bash":
            lines = [line for line in content.splitlines() if line.startswith("hub-moe ")]
            if lines:
                examples[-1][1].extend(lines)
    return examples


def find_make_targets(text):
    """The targets of `make` that a text tells its reader to run."""
    return set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, flags=re.MULTILINE))


def _run(arguments, folder):
    scripts = sysconfig.get_path("scripts")
    surroundings = os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(arguments, cwd=folder, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("program", "commands"), read_examples(README), ids=["load", "train, inspect, export"])
def test_an_example_runs_in_an_empty_folder(program, commands, tmp_path):
    assert _run([sys.executable, "-c", program], tmp_path)
    for command in commands:
        assert _run(shlex.split(command, comments=True), tmp_path)


def test_the_readme_shows_programs_and_commands():
    assert len(read_examples(README)) >= 2
    assert any(commands for _, commands in read_examples(README))


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_the_make_targets_that_a_text_names_exist(text):
    defined = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE))
    assert {"demo", "test"} <= find_make_targets(README)
    assert find_make_targets(text) <= defined


def test_every_make_target_is_phony():
    defined = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, flags=re.MULTILINE))
    assert set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[1].split()) == defined


def test_contributing_fits_on_two_pages():
    assert len(CONTRIBUTING.splitlines()) <= 120


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_the_files_that_a_text_names_exist_unless_it_marks_them_as_planned(text):
    named = re.findall(r"`([\w./-]+/(?:[\w.-]+\.(?:py|md|toml|json))?)`( \(planned\))?", text)
    assert {path for path, planned in named if not planned and not (ROOT / path).exists()} == set()
    assert {path for path, planned in named if planned and (ROOT / path).exists()} == set()
