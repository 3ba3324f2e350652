"""An expert patch as pages show it: the heat map, the comparison with the base, and who has reproduced what."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..cards import parse_object
from ..contributions import (
    MAX_EXPERTS,
    MAX_LAYERS,
    METADATA_FILE,
    PATCHES,
    REPRODUCED,
    MergedPatch,
    PatchSummary,
    RecordSummary,
    ReviewMark,
    Score,
    is_number,
    may_speak_for,
    parse_review,
    read_comparison,
    read_merges,
    read_patch,
    read_records,
    read_weights_sha256,
)
from ..profiles import Profile
from ..store import GitRepo, Repo, Store
from ..store.discussions import Discussion, Event
from ..store.errors import NotFoundError
from ..store.merges import find_range

_MAX_PATCHES = 5
_MAX_LISTED_PATCHES = 20
_MAX_REVIEWS = 20
_MAX_SPANS = 4000
_MAX_CONFIG_BYTES = 1_000_000
_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_VERDICTS = ("better", "worse", "tied")


@dataclass(frozen=True)
class Span:
    """Neighbouring experts of one row that look the same; `shade` is 1 to 3, by how much of each is in the patch."""

    x: int
    width: int
    shade: int


@dataclass(frozen=True)
class HeatMap:
    """Layers down, experts across, in units of a cell; `rows` has the layer, its spans and its experts in words."""

    num_experts: int
    cell: int
    rows: tuple[tuple[int, tuple[Span, ...], str], ...]
    is_cut: bool = False

    @property
    def columns(self) -> list[int]:
        """The experts that are named below the map."""
        step = max(1, -(-self.num_experts // 8))
        return list(range(0, self.num_experts, step))


@dataclass(frozen=True)
class Review:
    """The last review of one person."""

    reviewer: str
    mark: ReviewMark
    event_id: str
    is_owner: bool
    is_author: bool
    is_current: bool

    @property
    def counts(self) -> bool:
        """Whether somebody who may write to the repo says it of the head, and not of their own work."""
        return self.is_owner and self.is_current and not self.is_author


@dataclass(frozen=True)
class ComparedRow:
    """One entry of a suite: the patch's score from its record, the base's if there is one, their difference if paired.

    `status` is "self-reported", "reproduced" or "not reproduced", the last two `by` somebody.
    """

    score: Score
    record: RecordSummary
    base: Score | None
    base_record: RecordSummary | None
    difference: tuple[float, float, float] | None
    verdict: str
    status: str
    by: str


@dataclass(frozen=True)
class ShownPatch:
    """A patch in a pull request."""

    patch: PatchSummary
    heat_map: HeatMap | None
    rows: tuple[ComparedRow, ...]
    faulty: tuple[RecordSummary, ...]


@dataclass(frozen=True)
class RepoPatches:
    """What a model's main holds of patches."""

    merged: tuple[tuple[MergedPatch, PatchSummary | None], ...]
    others: tuple[PatchSummary, ...]
    more: int

    def __bool__(self) -> bool:
        return bool(self.merged or self.others)


def read_contribution(
    store: Store, repo: Repo, git: GitRepo, *, discussion: Discussion, events: Sequence[Event]
) -> dict[str, Any]:
    """For the page of a pull request: the patches that it adds or changes, and the reviews in it."""
    if not discussion.is_pull_request or repo.id.kind != "model":
        return {}
    start, head = find_range(git, discussion)
    changes = git.compare(start, head)
    names = sorted({path.split("/")[1] for path in changes if path.startswith(f"{PATCHES}/") and path.count("/") > 1})
    names = [name for name in names if git.find_entry(head, f"{PATCHES}/{name}/{METADATA_FILE}")]
    if not names:
        return {}
    reviews = find_reviews(store, repo, discussion, events, head)
    num_experts = _read_num_experts(store, git, head)
    shown = [
        _show_patch(store, repo, git, head, name=name, num_experts=num_experts, reviews=reviews)
        for name in names[:_MAX_PATCHES]
    ]
    return {"patches": shown, "more_patches": len(names) - len(shown), "reviews": reviews}


def find_reviews(store: Store, repo: Repo, discussion: Discussion, events: Iterable[Event], head: str) -> list[Review]:
    """The last review of each person, those of the repo's owners first, then the latest."""
    found: dict[str, Review] = {}
    for event in list(events)[1:]:
        if event.type != "comment" or event.data["hidden"]:
            continue
        mark = parse_review(event.data["latest"]["raw"])
        if mark is not None:
            name = event.author.lower()
            found.pop(name, None)
            found[name] = Review(
                reviewer=event.author,
                mark=mark,
                event_id=event.id,
                is_owner=may_speak_for(store, repo, event.author),
                is_author=name == discussion.author.lower(),
                is_current=mark.commit == head,
            )
    latest_first = list(found.values())[::-1]
    return sorted(latest_first, key=lambda one: (not one.counts, not one.is_owner))[:_MAX_REVIEWS]


def read_repo_patches(store: Store, repo: Repo, profile: Profile) -> RepoPatches:
    """For the page of a model: its merged patches with whose they are, and the patches beside it that nobody merged."""
    ending = f"/{METADATA_FILE}"
    names = [
        file.path.split("/")[1]
        for file in profile.files
        if file.path.startswith(f"{PATCHES}/") and file.path.endswith(ending) and file.path.count("/") == 2
    ]
    with store.repos.open(repo) as git:
        commit = profile.head.oid
        merged = read_merges(store, repo, git, commit)
        found = {name: read_patch(store, repo, git, commit=commit, name=name) for name in names[:_MAX_LISTED_PATCHES]}
    merged_names = {one.name for one in merged}
    others = tuple(patch for name, patch in found.items() if name not in merged_names)
    shown = tuple((one, found.get(one.name)) for one in merged[:_MAX_LISTED_PATCHES])
    more = max(0, len(names) - len(found)) + max(0, len(merged) - len(shown))
    return RepoPatches(shown, others, more)


def draw_heat_map(layers: Mapping[int, Mapping[int, int]], num_experts: int | None = None) -> HeatMap | None:
    """The map of a patch's experts; None if it changes none."""
    touched = [expert for experts in layers.values() for expert in experts]
    if not touched:
        return None
    width = max(num_experts or 0, max(touched) + 1)
    most = max((count for experts in layers.values() for count in experts.values()), default=0)
    left = _MAX_SPANS
    rows = []
    for layer, experts in list(layers.items())[:MAX_LAYERS]:
        spans = list(_find_spans(experts, most))
        shown = spans[: max(0, left)]
        left -= len(spans)
        rows.append((layer, tuple(shown), _name_experts(sorted(experts))))
    return HeatMap(width, 14 if width <= 64 else 7 if width <= 160 else 5, tuple(rows), left < 0)


def _find_spans(experts: Mapping[int, int], most: int) -> Iterable[Span]:
    shades = [(expert, 3 if count >= most else 2 if 2 * count >= most else 1) for expert, count in experts.items()]
    for (_, shade), run in groupby(enumerate(shades), key=lambda one: (one[1][0] - one[0], one[1][1])):
        chosen = [expert for _, (expert, _) in run]
        yield Span(chosen[0], len(chosen), shade)


def _name_experts(experts: Sequence[int]) -> str:
    """`0, 7, 12–15`, cut after fifty runs."""
    runs = []
    for _, run in groupby(enumerate(experts), key=lambda one: one[1] - one[0]):
        chosen = [expert for _, expert in run]
        runs.append(str(chosen[0]) if len(chosen) == 1 else f"{chosen[0]}–{chosen[-1]}")
    return ", ".join(runs[:50]) + (f" and {len(runs) - 50} more" if len(runs) > 50 else "")


def _read_num_experts(store: Store, git: GitRepo, commit: str) -> int | None:
    try:
        facts = store.files.find(git, commit, "config.json")
        config = parse_object(store.files.read(git, facts, limit_bytes=_MAX_CONFIG_BYTES))
    except NotFoundError:
        return None
    counts = [config[key] for key in _EXPERT_KEYS if type(config.get(key)) is int and 0 < config[key] <= MAX_EXPERTS]
    return counts[0] if counts else None


def _show_patch(
    store: Store, repo: Repo, git: GitRepo, head: str, *, name: str, num_experts: int | None, reviews: list[Review]
) -> ShownPatch:
    patch = read_patch(store, repo, git, commit=head, name=name)
    weights = read_weights_sha256(store, git, head, name)
    records = [_check_weights(one, weights) for one in read_records(store, git, head, name)]
    rows = compare(records, read_comparison(store, git, head, name), reviews)
    faulty = tuple(one for one in records if one.fault)
    return ShownPatch(patch, draw_heat_map(patch.layers, num_experts), tuple(rows), faulty)


def _check_weights(record: RecordSummary, weights_sha256: str) -> RecordSummary:
    if record.fault or not record.is_of_patch or (weights_sha256 and record.weights_sha256 == weights_sha256):
        return record
    return RecordSummary(record.path, record.id, fault="it is of other weights than this pull request has")


def compare(
    records: Sequence[RecordSummary], comparison: Mapping[str, Any], reviews: Sequence[Review]
) -> Iterable[ComparedRow]:
    """Each score of the patch's records beside the base's on the same suite.

    The paired difference is taken from the card's facts, and only where these speak of the same records and scores.
    """
    bases = [one for one in records if not one.is_of_patch and not one.fault]
    for record in records:
        for score in record.scores if record.is_of_patch and not record.fault else ():
            base_record, base = _find_base(bases, record, score)
            difference, verdict = _find_difference(comparison, (record, score), (base_record, base))
            status, by = _judge(record.id, reviews)
            yield ComparedRow(score, record, base, base_record, difference, verdict, status, by)


def _find_base(
    bases: Sequence[RecordSummary], record: RecordSummary, score: Score
) -> tuple[RecordSummary | None, Score | None]:
    for base in bases:
        for one in base.scores if base.suite_sha256 == record.suite_sha256 else ():
            if (one.entry, one.metric, one.num_documents) == (score.entry, score.metric, score.num_documents):
                return base, one
    return None, None


def _find_difference(
    comparison: Mapping[str, Any],
    candidate: tuple[RecordSummary, Score],
    base: tuple[RecordSummary | None, Score | None],
) -> tuple[tuple[float, float, float] | None, str]:
    ids = (comparison.get("base_record_sha256"), comparison.get("record_sha256"))
    tasks = comparison.get("tasks")
    if base[0] is None or base[1] is None or ids != (base[0].id, candidate[0].id) or not isinstance(tasks, list):
        return None, ""
    for task in tasks[:100]:
        if not isinstance(task, dict) or task.get("task") != candidate[1].entry:
            continue
        numbers = [task.get(name) for name in ("base", "candidate", "difference", "low", "high")]
        if not all(is_number(one) for one in numbers) or task.get("verdict") not in _VERDICTS:
            return None, ""
        before, after, difference, low, high = (float(one) for one in numbers if one is not None)
        expected = (base[1].value, candidate[1].value, after - before)
        is_same = all(abs(one - other) < 1e-6 for one, other in zip((before, after, difference), expected, strict=True))
        return ((difference, low, high), task["verdict"]) if is_same and low <= difference <= high else (None, "")
    return None, ""


def _judge(record: str, reviews: Sequence[Review]) -> tuple[str, str]:
    for review in reviews:
        outcome = review.mark.outcomes.get(record) if review.counts else None
        if outcome is not None:
            return ("reproduced" if outcome in REPRODUCED else "not reproduced"), review.reviewer
    return "self-reported", ""
