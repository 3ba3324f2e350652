"""The README is true: its programs and commands run as they stand, and what it names exists."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from subprocess import PIPE

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_blocks(text):
    """The fenced blocks of a Markdown text, as `(language, content)`."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def read_section(text, title):
    """A section of a Markdown text, from its heading of the second level to the next."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1]


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
@pytest.mark.parametrize(
    ("program", "commands"),
    read_examples(read_section(README, "Three examples")),
    ids=["load", "train, inspect, export"],
)
def test_an_example_runs_in_an_empty_folder(program, commands, tmp_path):
    assert _run([sys.executable, "-c", program], tmp_path)
    for command in commands:
        assert _run(shlex.split(command, comments=True), tmp_path)


@pytest.mark.slow
def test_the_commands_about_a_hub_of_your_own_run_one_after_the_other(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "my-moe")
    start, *others = [
        block for language, block in read_blocks(read_section(README, "A Hub of your own")) if language == "bash"
    ]
    serve = next(line for line in start.splitlines() if line.startswith("hub-moe"))
    environment = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with subprocess.Popen(
        [*shlex.split(serve), "--port", "0"], cwd=tmp_path, env=environment, stdout=PIPE, stderr=PIPE, text=True
    ) as server:
        exports = server.stdout.readline() + server.stderr.readline() + server.stderr.readline()
        lines = [line for line in exports.splitlines() if line.startswith("export ")]
        script = "\n".join(["set -euo pipefail", *lines, *others])
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        server.terminate()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "my-clone" / "README.md").read_text() == "# My first MoE\n"
    assert (tmp_path / "lab-hub.tar").stat().st_size > 100_000


@pytest.mark.slow
def test_the_commands_about_fine_tuning_and_evaluation_run_one_after_the_other(tmp_path, tiny_model, tiny_tokenizer):
    demo, recipes = tmp_path / "runs" / "demo", tmp_path / "evals" / "recipes"
    tiny_model.save_pretrained(demo / "base" / "model")
    tiny_tokenizer.save_pretrained(demo / "base" / "model")
    rows = [json.dumps({"text": f"Topic {number}: " + "one word after the other. " * number}) for number in range(60)]
    (demo / "reference.jsonl").write_text("\n".join(rows))
    recipes.mkdir(parents=True)
    recipe = (ROOT / "evals" / "recipes" / "experts.toml").read_text("utf-8")
    assert "steps = 200" in recipe
    (recipes / "experts.toml").write_text(recipe.replace("steps = 200", "steps = 3"))
    section = read_section(README, "Fine-tune the experts that a domain uses")
    for language, content in read_blocks(section):
        _run(["bash", "-euc", content] if language == "bash" else [sys.executable, "-c", content], tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    for _, content in read_blocks(read_section(README, "Evaluate, and let others check")):
        printed = _run(["bash", "-euc", content], tmp_path)
    assert "within tolerance" in printed or "bit-equal" in printed
    assert "95 % interval" in (tmp_path / "runs" / "experts" / "patch" / "README.md").read_text("utf-8")


def test_the_fixture_hub_works_in_the_tests_of_another_project(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        next(
            block for language, block in read_blocks(read_section(README, "A Hub of your own")) if language == "python"
        )
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_the_readme_shows_programs_and_commands():
    examples = read_examples(read_section(README, "Three examples"))
    assert len(examples) >= 2
    assert any(commands for _, commands in examples)


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
