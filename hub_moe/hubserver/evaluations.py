"""Scores that models report in `.eval_results/*.yaml`, and the benchmarks that datasets declare in `eval.yaml`.

Formats: hub-docs, eval_results.yaml and docs/hub/eval-results.md. Not done: proving a score by its `verifyToken`; every
score here is self-reported, and says so.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .cards import MAX_CARD_BYTES, parse_yaml, weigh
from .store import GitRepo, Repo, Store
from .store.errors import NotFoundError

FOLDER = ".eval_results"
_MAX_FILES = 200
_DATASET_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Score:
    """One entry of a result file, or why the file cannot be read (`error`); `pull_request` if only proposed so far."""

    path: str
    data: dict[str, Any]
    error: str = ""
    pull_request: int | None = None

    def describe(self) -> dict[str, Any]:
        """As one of a model's `evalResults`."""
        proposed = {"pullRequest": self.pull_request} if self.pull_request is not None else {}
        if self.error:
            return {"filename": self.path, "error": self.error, **proposed}
        return {"filename": self.path, "verified": False, "data": self.data, **proposed}


def read_scores(store: Store, repo: Repo) -> list[Score]:
    """What a model's `main` says, then what its open pull requests would add to it or change."""
    with store.repos.open(repo) as git:
        merged = _read_folder(store, repo, git, git.resolve("main"))
        scores = [score for found in merged.values() for score in found]
        for discussion in reversed(store.discussions.list_all(repo, is_pull_request=True, statuses=("open",))):
            if git.read_ref(discussion.ref) is None:
                continue  # its commits were deleted
            proposed = _read_folder(store, repo, git, git.resolve(discussion.ref))
            new = [score for key, found in proposed.items() if key not in merged for score in found]
            scores += [Score(one.path, one.data, one.error, discussion.num) for one in new if one not in scores]
    return scores


def parse_scores(path: str, text: str) -> list[Score]:
    """The entries of one result file, or one with an `error`."""
    try:
        entries = parse_yaml(text)
        if not isinstance(entries, list) or not entries:
            raise ValueError("expected a list of results")
        return [Score(path, _check_entry(entry)) for entry in entries]
    except ValueError as error:
        return [Score(path, {}, error=f"Invalid evaluation results: {error}.")]


def parse_benchmark(text: str) -> list[str] | None:
    """The ids of the tasks that an `eval.yaml` declares, None if it is not valid."""
    try:
        found = parse_yaml(text)
    except ValueError:
        return None
    tasks = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not isinstance(tasks, list):
        return None
    ids = [task.get("id") if isinstance(task, dict) else None for task in tasks]
    names = [name for name in ids if isinstance(name, str) and name]
    return names if names and len({*names}) == len(ids) else None


def _read_folder(store: Store, repo: Repo, git: GitRepo, commit: str) -> dict[tuple[str, str], list[Score]]:
    """By path and git id of each result file, what is in it."""
    try:
        entries = store.files.list_entries(git, commit, folder=FOLDER, recursive=False)
    except NotFoundError:
        return {}
    found = {}
    for entry in [one for one in entries if one.path.endswith((".yaml", ".yml")) and not one.is_folder][:_MAX_FILES]:
        key = (repo.uid, f"{entry.oid}/{entry.path}")
        scores = store.derived.get(key)
        if not isinstance(scores, list):
            facts = store.files.facts(git, [entry.oid])[entry.oid]
            content = store.files.read(git, facts, limit_bytes=MAX_CARD_BYTES)
            scores = parse_scores(entry.path, content.decode("utf-8", "replace"))
            store.derived.put(key, scores, size=weigh([score.describe() for score in scores]))
        found[entry.path, entry.oid] = scores
    return found


def _check_entry(entry: object) -> dict[str, Any]:
    """An entry whose required parts are there and whose optional parts are what they should be."""
    if not isinstance(entry, dict):
        raise ValueError("each result must be a mapping")
    dataset, source = entry.get("dataset"), entry.get("source")
    if not isinstance(dataset, dict) or not _DATASET_ID.fullmatch(str(dataset.get("id"))):
        raise ValueError('"dataset.id" must be OWNER/NAME')
    if not isinstance(dataset.get("task_id"), str) or not dataset["task_id"]:
        raise ValueError('"dataset.task_id" must be a string')
    if isinstance(entry.get("value"), bool) or not isinstance(entry.get("value"), int | float):
        raise ValueError('"value" must be a number')
    if source is not None and (not isinstance(source, dict) or not _is_link(source.get("url"))):
        raise ValueError('"source.url" must be an http address')
    for name in ("notes", "verifyToken"):
        if not isinstance(entry.get(name), str | None):
            raise ValueError(f'"{name}" must be a string')
    if entry.get("date") is not None:
        _check_date(entry["date"])
    return entry


def _check_date(text: object) -> None:
    try:
        datetime.fromisoformat(str(text))
    except ValueError:
        raise ValueError('"date" must be an ISO 8601 date') from None


def _is_link(text: object) -> bool:
    return isinstance(text, str) and text.startswith(("https://", "http://"))
