"""What is known of expert patches in repos and pull requests: their metadata, records, reviews and merges.

Formats: `expert_patch.json`, `model_card.json` and records of hub_moe, the marks that comments end with, trailers of
merges. Anybody may have written any of it: numbers are from records whose content has the hash that it claims, none is
from free text, and sizes are bounded before anything is parsed.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from .store import GitRepo, Repo, Store
from .store.errors import NotFoundError
from .store.git import LogEntry

PATCHES = "patches"
METADATA_FILE = "expert_patch.json"
WEIGHTS_FILE = "expert_patch.safetensors"
FACTS_FILE = "model_card.json"
REPRODUCED = ("bit-equal", "within tolerance")
VERDICTS = ("accept", "reject", "incomplete")
MAX_LAYERS, MAX_EXPERTS = 512, 4096

_MAX_JSON_BYTES = 5_000_000
_MAX_RECORD_BYTES = 1_000_000
_MAX_RECORDS = 20
_MAX_ENTRIES = 100
_MAX_LETTERS = 200
_MAX_MARK = 20_000
_MAX_COMMITS = 2000
_NAME = r"\w[\w.-]{0,95}"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TENSOR = re.compile(r"(?:.{0,80}\.)?layers\.(\d{1,4})\..{0,80}\bexperts\.(\d{1,5})\..{1,80}")
_RECORD_NAME = re.compile(r".+-[0-9a-f]{16}\.json")
_REVIEW = re.compile(r"<!-- hub_moe:review (\{[^<>]*\}) -->\s*\Z")
_TRAILER = re.compile(r"(Merged-Patch|Pull-Request|Contributor|Base-Commit|Merge-Method): (\S.{0,300})")
_FORMS = {
    "Merged-Patch": re.compile(rf"({_NAME}) weights_sha256=[0-9a-f]{{64}}"),
    "Pull-Request": re.compile(r"#([1-9]\d{0,8})"),
    "Contributor": re.compile(rf"({_NAME})"),
    "Merge-Method": re.compile(r"(exact|mean|ties|dare|slerp|side-by-side)"),
}


@dataclass(frozen=True)
class PatchSummary:
    """A patch by its metadata. `layers` has by layer the experts, each with how many of its tensors are changed."""

    name: str
    layers: Mapping[int, Mapping[int, int]]
    base: str = ""
    base_commit: str = ""
    method: str = ""
    other_parts: tuple[str, ...] = ()
    fault: str = ""

    @property
    def num_experts(self) -> int:
        """Over all layers."""
        return sum(len(experts) for experts in self.layers.values())


@dataclass(frozen=True)
class Score:
    """The main metric of one entry of a record."""

    suite: str
    entry: str
    metric: str
    value: float
    num_documents: int
    higher_is_better: bool
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RecordSummary:
    """A record: of a patch where `weights_sha256` is known. `fault` says why its numbers are not shown."""

    path: str
    id: str = ""
    is_of_patch: bool = False
    weights_sha256: str = ""
    suite_sha256: str = ""
    scores: tuple[Score, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class ReviewMark:
    """A verdict on a commit, as a comment ends with it."""

    commit: str
    verdict: str
    reasons: tuple[str, ...]
    outcomes: Mapping[str, str]


@dataclass(frozen=True)
class MergedPatch:
    """A patch that a commit on main says it merged."""

    name: str
    commit: str
    pull_request: int | None
    contributor: str | None
    method: str | None


def read_patch(store: Store, repo: Repo, git: GitRepo, *, commit: str, name: str) -> PatchSummary:
    """The patch in `patches/NAME` at a commit."""
    content, oid = _read(store, git, commit, f"{PATCHES}/{name}/{METADATA_FILE}", _MAX_JSON_BYTES)
    key = (repo.uid, oid, name, "patch")
    known = store.derived.get(key)
    if isinstance(known, PatchSummary):
        return known
    try:
        patch = parse_patch(name, content)
    except ValueError as error:
        patch = PatchSummary(name[:_MAX_LETTERS], {}, fault=str(error)[:_MAX_LETTERS])
    store.derived.put(key, patch, size=500 + 200 * len(patch.layers) + 150 * patch.num_experts)
    return patch


def parse_patch(name: str, content: bytes) -> PatchSummary:
    """The summary of an `expert_patch.json`.

    Raises:
        ValueError: With one sentence, if it is none, or declares more than a page can show.
    """
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"{METADATA_FILE} is too large to be shown")
    fields = _load(content, METADATA_FILE)
    base, tensors = fields.get("base"), fields.get("tensors")
    if not isinstance(base, dict) or not isinstance(tensors, dict):
        raise ValueError(f"{METADATA_FILE} has no base or no tensors")
    layers = _read_layers(fields.get("experts"))
    for tensor in tensors:
        place = _TENSOR.fullmatch(tensor)
        if place and int(place[2]) in layers.get(int(place[1]), {}):
            layers[int(place[1])][int(place[2])] += 1
    training = fields.get("training")
    parts = ("shared_experts", "non_expert_modules", "balancing_bias")
    return PatchSummary(
        name=name[:_MAX_LETTERS],
        layers=layers,
        base=_text(base.get("repo")),
        base_commit=_matching(_COMMIT, base.get("commit")),
        method=_text(training.get("method")) if isinstance(training, dict) else "",
        other_parts=tuple(part.replace("_", " ") for part in parts if fields.get(part) is True),
    )


def _read_layers(experts: Any) -> dict[int, dict[int, int]]:
    if not isinstance(experts, dict) or len(experts) > MAX_LAYERS:
        raise ValueError(f"{METADATA_FILE} does not say which experts it changes, in at most {MAX_LAYERS} layers")
    layers: dict[int, dict[int, int]] = {}
    for layer, chosen in experts.items():
        is_list = isinstance(chosen, list) and len(chosen) <= MAX_EXPERTS and all(type(one) is int for one in chosen)
        if not re.fullmatch("0|[1-9][0-9]{0,3}", layer, re.ASCII) or not is_list:
            raise ValueError(f"{METADATA_FILE} names layers or experts that no model has")
        if not all(0 <= one < MAX_EXPERTS for one in chosen):
            raise ValueError(f"{METADATA_FILE} names experts below 0 or above {MAX_EXPERTS - 1}")
        layers[int(layer)] = dict.fromkeys(sorted(chosen), 0)
    return dict(sorted(layers.items()))


def read_weights_sha256(store: Store, git: GitRepo, commit: str, name: str) -> str:
    """What the weights of a patch at a commit hash to; empty where there are none in the large-file store."""
    with suppress(NotFoundError):
        return store.files.find(git, commit, f"{PATCHES}/{name}/{WEIGHTS_FILE}").sha256 or ""
    return ""


def read_records(store: Store, git: GitRepo, commit: str, name: str) -> list[RecordSummary]:
    """The records in a patch's `evals/`, at most 20 of them."""
    folder = f"{PATCHES}/{name}/evals"
    try:
        entries = store.files.list_entries(git, commit, folder=folder, recursive=False)
    except NotFoundError:
        return []
    paths = [one.path for one in entries if not one.is_folder and _RECORD_NAME.fullmatch(one.path)]
    found = []
    for path in paths[:_MAX_RECORDS]:
        content, _ = _read(store, git, commit, path, _MAX_RECORD_BYTES)
        try:
            found.append(parse_record(path, content))
        except ValueError as error:
            found.append(RecordSummary(path, fault=str(error)[:_MAX_LETTERS]))
    return found


def parse_record(path: str, content: bytes) -> RecordSummary:
    """The main numbers of a record.

    Raises:
        ValueError: With one sentence, if it is none, or its content has another hash than it claims.
    """
    if len(content) > _MAX_RECORD_BYTES:
        raise ValueError("it is too large to be shown")
    fields = _load(content, "it")
    claimed = fields.pop("id", None)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != claimed:
        raise ValueError("it was edited: its content does not have the hash that it claims")
    model, suite, entries = fields.get("model"), fields.get("suite"), fields.get("entries")
    if not isinstance(model, dict) or not isinstance(suite, dict) or not isinstance(entries, list):
        raise ValueError("it is no record of an evaluation")
    files = model.get("files")
    weights = files.get(WEIGHTS_FILE) if isinstance(files, dict) else None
    return RecordSummary(
        path=path,
        id=str(claimed),
        is_of_patch=model.get("kind") == "expert_patch",
        weights_sha256=_matching(_SHA256, weights),
        suite_sha256=_matching(_SHA256, suite.get("sha256")),
        scores=tuple(_read_score(_text(suite.get("name")), entry) for entry in entries[:_MAX_ENTRIES]),
    )


def _read_score(suite: str, entry: Any) -> Score:
    metrics = entry.get("metrics") if isinstance(entry, dict) else None
    chosen = [
        one
        for one in (metrics if isinstance(metrics, list) else [])
        if isinstance(one, dict) and one.get("name") == entry.get("main_metric")
    ]
    if not chosen or not is_number(chosen[0].get("value")) or type(chosen[0].get("num_documents")) is not int:
        raise ValueError("it has an entry without its main metric")
    metric = chosen[0]
    low, high = metric.get("low"), metric.get("high")
    return Score(
        suite=suite,
        entry=_text(entry.get("name")),
        metric=_text(metric.get("name")),
        value=metric["value"],
        num_documents=metric["num_documents"],
        higher_is_better=metric.get("higher_is_better") is not False,
        low=low if is_number(low) else None,
        high=high if is_number(high) else None,
    )


def read_comparison(store: Store, git: GitRepo, commit: str, name: str) -> dict[str, Any]:
    """The comparison with the base that `model_card.json` of a patch holds; empty if there is none."""
    content, _ = _read(store, git, commit, f"{PATCHES}/{name}/{FACTS_FILE}", _MAX_JSON_BYTES)
    with suppress(ValueError):
        found = _load(content, FACTS_FILE).get("comparison") if len(content) <= _MAX_JSON_BYTES else None
        return found if isinstance(found, dict) else {}
    return {}


def parse_review(text: str) -> ReviewMark | None:
    """The review that a comment ends with; None if there is none, or it is damaged."""
    found = _REVIEW.search(text[-_MAX_MARK:])
    if found is None:
        return None
    try:
        fields = _load(found[1].encode("utf-8", "surrogatepass"), "the mark")
    except ValueError:
        return None
    reasons, outcomes = fields.get("reasons", []), fields.get("records", {})
    is_sound = (
        fields.get("format_version") == 1
        and fields.get("verdict") in VERDICTS
        and _matching(_COMMIT, fields.get("commit"))
        and isinstance(reasons, list)
        and isinstance(outcomes, dict)
        and all(isinstance(one, str) for one in [*reasons, *outcomes.values()])
    )
    if not is_sound:
        return None
    reasons = tuple(_text(one) for one in reasons[:20])
    outcomes = {one: _text(outcome) for one, outcome in islice(outcomes.items(), 100)}
    return ReviewMark(fields["commit"], fields["verdict"], reasons, outcomes)


def read_merges(store: Store, repo: Repo, git: GitRepo, commit: str) -> tuple[MergedPatch, ...]:
    """The patches merged by those who may write to the repo, newest first, from the last 2000 commits."""
    key = (repo.uid, commit, "merges")
    known = store.derived.get(key)
    if not isinstance(known, tuple):
        entries = islice(git.log(commit), _MAX_COMMITS)
        known = tuple(
            one for entry in entries for one in parse_merge(entry) if may_speak_for(store, repo, entry.author)
        )
        store.derived.put(key, known, size=500 * len(known) + 200)
    return known


def may_speak_for(store: Store, repo: Repo, user: str) -> bool:
    """Whether somebody may write to a repo."""
    return store.accounts.role_in(repo.id.owner, user) in {"admin", "write"}


def parse_merge(entry: LogEntry) -> Iterator[MergedPatch]:
    """The patches that a commit names in the trailers at the end of its message."""
    found: dict[str, list[str]] = {}
    for line in reversed(entry.message.strip()[-_MAX_MARK:].splitlines()):
        trailer = _TRAILER.fullmatch(line.strip())
        if trailer is None:
            break
        found.setdefault(trailer[1], []).insert(0, trailer[2].strip())
    names = [name for name in _values(found, "Merged-Patch") if name]
    numbers, people = (_pair(_values(found, key), len(names)) for key in ("Pull-Request", "Contributor"))
    method = next(iter(_values(found, "Merge-Method")), None)
    for name, number, person in zip(names, numbers, people, strict=True):
        yield MergedPatch(name, entry.oid, int(number) if number else None, person, method)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15 and math.isfinite(value)


def _values(found: Mapping[str, Sequence[str]], key: str) -> list[str | None]:
    matches = (_FORMS[key].fullmatch(text) for text in found.get(key, []))
    return [match[1] if match else None for match in matches]


def _pair(values: list[str | None], count: int) -> Iterable[str | None]:
    return values if len(values) == count else [None] * count


def _read(store: Store, git: GitRepo, commit: str, path: str, limit_bytes: int) -> tuple[bytes, str]:
    """One byte more than the limit of a file at most, and its git id; empty where there is none."""
    with suppress(NotFoundError):
        facts = store.files.find(git, commit, path)
        return store.files.read(git, facts, limit_bytes=limit_bytes + 1), facts.oid
    return b"", ""


def _load(content: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not valid JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _refuse(text: str) -> Literal[0]:
    raise ValueError(text)


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def _text(value: Any) -> str:
    return value[:_MAX_LETTERS].encode("utf-8", "replace").decode() if isinstance(value, str) else ""
