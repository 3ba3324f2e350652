"""What GitHub reads is well-formed, asks for few rights and calls commands that exist."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ISSUE_FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PINNED = re.compile(r"\./|[\w-]+/[\w-]+@(?:v\d+|release/v\d+)$")


def _load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_unless_a_job_says_more(path):
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    extra = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert extra == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_does_not_run_twice_at_once_nor_forever(path):
    workflow = _load(path)
    assert workflow["concurrency"]["group"].startswith(path.stem)
    assert all("uses" in job or job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_to_a_major_version(path):
    workflow = _load(path)
    used = [part["uses"] for part in [*workflow["jobs"].values(), *_steps(workflow)] if "uses" in part]
    assert [name for name in used if not PINNED.match(name)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_targets_that_exist(path):
    defined = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = {step["run"].split()[1] for step in _steps(_load(path)) if step.get("run", "").startswith("make ")}
    assert called <= defined


def test_ci_runs_what_a_contributor_runs():
    commands = [step["run"] for step in _steps(_load(ROOT / ".github" / "workflows" / "ci.yml")) if "run" in step]
    assert commands == ["make check", "make test"]


@pytest.mark.parametrize("path", ISSUE_FORMS, ids=lambda path: path.stem)
def test_an_issue_form_says_what_it_is_for_and_asks_something(path):
    form = _load(path)
    assert form["name"]
    assert form["description"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_review_action_calls_a_command_that_exists_and_puts_no_input_into_a_script():
    action = _load(ROOT / ".github" / "actions" / "review-contribution" / "action.yml")
    steps = action["runs"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    assert all("${{" not in script for script in scripts)
    assert all(PINNED.match(step["uses"]) for step in steps if "uses" in step)
    wanted = set(re.findall(r"--[a-z-]+", scripts[-1]))
    assert "hub-moe review" in scripts[-1]
    assert all(f'"{option}"' in (ROOT / "hub_moe/cli/review.py").read_text() for option in ("--all-open", "--no-post"))
    known = (ROOT / "tests" / "golden" / "cli" / "hub-moe-review.txt").read_text("utf-8")
    assert [option for option in wanted if option not in known] == []
    used = set(re.findall(r"inputs\.([\w-]+)", str(steps)))
    assert used == set(action["inputs"])
