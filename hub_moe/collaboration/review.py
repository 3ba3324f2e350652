"""A stranger's check of a contribution: safe, what it says it is, true in its claims, and no loss elsewhere."""

import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from ..errors import EvaluationError, HubError, HubMoeError
from ..evals.claims import FOLDER
from ..evals.compare import RecordComparison, compare_records
from ..evals.models import ModelRequest, check_device
from ..evals.records import StoredRecord, find_records, read_record
from ..evals.session import Plan, evaluate
from ..evals.suites import Suite, load_suite
from ..evals.verify import DEFAULT_DOCUMENTS, Reviewer, Verification, verify_record
from ..hub.marks import ContributionMark, ReviewMark, Verdict, read_mark
from ..hub.pull_requests import (
    PullRequest,
    describing,
    fetch_pull_request,
    list_open,
    parse_reference,
    read_proposal,
)
from ..patches.bases import Place, fetch_base
from ..patches.comparison import ExpertChange, measure_changes
from .costs import check_tolerance, describe_costs, share_of
from .safety import Contribution, list_faults, open_contribution, shown

EXIT_CODES: dict[Verdict, int] = {"accept": 0, "reject": 1, "incomplete": 3}
_REPLAYED = ("bit-equal", "within tolerance")

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReviewOptions:
    """How thorough a review is.

    Attributes:
        suite: Name or file of the suite for regressions; None takes those of the records beside the base.
        limit: Documents of each of its tasks.
        data_dir: Files in place of the Hub's datasets.
        num_documents: Of each record that are asked again.
        nonce: Chooses them; None draws one that nobody could foresee.
        tolerance: By what share of the base's value a task may get worse.
    """

    suite: str | None = None
    limit: int | None = None
    data_dir: Path | None = None
    num_documents: int = DEFAULT_DOCUMENTS
    nonce: str | None = None
    device: str | None = None
    batch_size: int = 16
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        if self.device is not None:
            check_device(self.device)


@dataclass(frozen=True)
class Review:
    """What was found out about the head of a pull request.

    Attributes:
        name: The patch's, None where it has none that can be told.
        rejections: Why it should not be merged.
        gaps: What could not be found out.
        notes: What a reader should know beside the verdict.
        changes: How far each expert moves, relative to the base.
        verifications: Of each record, by its file's name.
        gains: The claims: the patch's records against those of the base beside them.
        regressions: The patch against the base on the base's own suites, run by the reviewer.
        tolerance: By what share of the base's value a task was allowed to get worse.
    """

    pull_request: PullRequest
    nonce: str
    name: str | None = None
    rejections: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    changes: tuple[ExpertChange, ...] = ()
    verifications: dict[str, Verification] = field(default_factory=dict)
    gains: tuple[RecordComparison, ...] = ()
    regressions: tuple[RecordComparison, ...] = ()
    tolerance: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Reject where anything is wrong, else incomplete where anything was not found out, else accept."""
        return "reject" if self.rejections else "incomplete" if self.gaps else "accept"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Those of the verdict."""
        return (*self.rejections, *self.gaps)

    @property
    def mark(self) -> ReviewMark:
        """What the comment ends with."""
        return ReviewMark(
            commit=self.pull_request.head,
            verdict=self.verdict,
            reasons=[each[:300] for each in self.reasons[:20]],
            records={each.record: each.outcome for each in self.verifications.values()},
            nonce=self.nonce,
            regressions=[
                task.task
                for each in self.regressions
                for task in each.comparison.tasks
                if task.verdict == "worse" and share_of(task, each) > self.tolerance
            ],
            tolerance=self.tolerance,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        pull_request = {key: value for key, value in asdict(self.pull_request).items() if key != "comments"}
        return {
            "pull_request": pull_request,
            "name": self.name,
            "verdict": self.verdict,
            "rejections": list(self.rejections),
            "gaps": list(self.gaps),
            "notes": list(self.notes),
            "nonce": self.nonce,
            "tolerance": self.tolerance,
            "changes": [asdict(each) for each in self.changes],
            "records": {name: each.to_dict() for name, each in self.verifications.items()},
            "gains": [each.to_dict() for each in self.gains],
            "regressions": [each.to_dict() for each in self.regressions],
        }


def review_pull_request(api: HfApi, reference: str, options: ReviewOptions, *, say: Say) -> Review:
    """Review the head of the pull request OWNER/NAME#N.

    Raises:
        HubError: If there is no open pull request of this number, or the Hub cannot be reached.
        ConfigError: If `reference` is none, or there is no such suite.
    """
    repo, number = parse_reference(reference)
    suites = None if options.suite is None else [load_suite(options.suite, limit=options.limit)]
    pull_request = fetch_pull_request(api, repo, number)
    require_open(pull_request)
    review = Review(pull_request, options.nonce or secrets.token_hex(8), tolerance=options.tolerance)
    say(f"Looking at the files of {pull_request} at {pull_request.head[:12]}")
    contribution, faults = open_contribution(api, pull_request, read_proposal(api, pull_request))
    if contribution is None:
        return replace(review, rejections=tuple(list_faults(faults)))
    return _Replay(api, contribution, options, say).run(review, suites)


def require_open(pull_request: PullRequest) -> None:
    """Refuse what is merged or closed.

    Raises:
        HubError: Saying so.
    """
    if pull_request.status in ("merged", "closed"):
        raise HubError(f"{pull_request} is {pull_request.status} already.")


def find_unreviewed(api: HfApi, repo: str) -> list[str]:
    """The open contributions whose head this user has not reviewed, as OWNER/NAME#N.

    Raises:
        HubError: If the Hub refuses, or nobody is logged in.
    """
    with describing(api, repo):
        me = api.whoami()["name"]
    found = (fetch_pull_request(api, repo, number) for number in list_open(api, repo))
    return [
        str(each)
        for each in found
        if read_mark(ContributionMark, each.description) and find_review(each, by=[me]) is None
    ]


def find_review(pull_request: PullRequest, *, by: Sequence[str]) -> tuple[str, ReviewMark] | None:
    """The last review of the head by one of these people: who it was, and the verdict."""
    people = {name.lower() for name in by}
    for comment in reversed(pull_request.comments[1:]):
        mark = read_mark(ReviewMark, comment.text)
        if mark is not None and mark.commit == pull_request.head and comment.author.lower() in people:
            return comment.author, mark
    return None


def post_review(api: HfApi, review: Review, text: str, *, again: bool = False) -> bool:
    """Say it in the pull request; True where that is a new comment.

    A comment of the same reviewer on the same head is replaced, unless `again` is set.

    Raises:
        HubError: If the Hub refuses, or nobody is logged in.
    """
    pull_request = review.pull_request
    with describing(api, str(pull_request)):
        me = api.whoami()["name"].lower()
        for comment in reversed(pull_request.comments[1:]):
            mark = read_mark(ReviewMark, comment.text)
            if mark is None or mark.commit != pull_request.head or comment.author.lower() != me or again:
                continue
            api.edit_discussion_comment(pull_request.repo, pull_request.number, comment.id, text)
            return False
        api.comment_discussion(pull_request.repo, pull_request.number, text)
    return True


class _Replay:
    """What takes the model: the claims asked again, and the base's own suites."""

    def __init__(self, api: HfApi, contribution: Contribution, options: ReviewOptions, say: Say) -> None:
        self._api, self._contribution, self._options, self._say = api, contribution, options, say

    def run(self, review: Review, suites: list[Suite] | None) -> Review:
        review = replace(review, name=self._contribution.name)
        try:
            review = replace(review, changes=self._measure())
        except HubMoeError as error:
            return replace(review, rejections=(_sentence(error),))
        review = self._replay_claims(review)
        if review.rejections:
            return replace(review, notes=(*review.notes, "Regressions were not looked for: it is rejected already."))
        return self._find_regressions(review, suites)

    def _measure(self) -> tuple[ExpertChange, ...]:
        base = self._contribution.patch.metadata.base
        self._say(f"Comparing every expert with {base}")
        folder = fetch_base(Place(base.repo, base.commit), token=self._api.token)
        return measure_changes(self._contribution.patch, folder)

    def _replay_claims(self, review: Review) -> Review:
        found: dict[str, Verification] = {}
        gaps, notes, rejections = [], [], []
        for path in self._contribution.records:
            self._say(f"Checking the claims of {path.name}")
            try:
                found[path.name] = verification = verify_record(path, self._reviewer(review), say=self._say)
            except (HubMoeError, OSError) as error:
                gaps.append(f"{path.name} could not be checked: {_sentence(error)}")
                continue
            notes += [f"{path.name}: {each.detail}" for each in verification.findings if "NOT" in each.detail]
            if verification.outcome == "failed":
                rejections += [f"{path.name}: {each}" for each in _why_failed(verification)]
            elif verification.outcome not in _REPLAYED or not verification.num_replayed:
                gaps.append(f"no answer of {path.name} was asked again")
        stored = [read_record(path) for path in self._contribution.records]
        if not any(each.record.model.kind == "expert_patch" for each in stored):
            gaps.append("it has no record of the patch in evals/, so it claims nothing that could be checked")
        return replace(
            review,
            verifications=found,
            gaps=tuple(gaps),
            notes=tuple(notes),
            rejections=tuple(rejections),
            gains=() if rejections else tuple(compare_claims(stored)),
        )

    def _reviewer(self, review: Review) -> Reviewer:
        return Reviewer(
            model=review.pull_request.repo,
            revision=review.pull_request.head,
            subfolder=self._contribution.subfolder,
            data_dir=self._options.data_dir,
            num_documents=self._options.num_documents,
            nonce=review.nonce,
            device=self._options.device,
        )

    def _find_regressions(self, review: Review, suites: list[Suite] | None) -> Review:
        base = self._contribution.patch.metadata.base
        assert base.commit is not None
        try:
            chosen = suites or read_suites(self._api, base.repo, base.commit)
        except (HubMoeError, OSError) as error:
            return replace(review, gaps=(*review.gaps, f"the base's records cannot be read: {_sentence(error)}"))
        if not chosen:
            gap = "the base has no record of its own to look for regressions by; choose a suite (--suite)"
            return replace(review, gaps=(*review.gaps, gap))
        found, gaps = [], []
        request = ModelRequest(base.repo, revision=base.commit, device=self._options.device)
        request = replace(request, batch_size=self._options.batch_size)
        candidate = replace(request, revision=review.pull_request.head, subfolder=self._contribution.subfolder)
        with tempfile.TemporaryDirectory() as folder:
            for suite in chosen:
                plan = Plan(suite, Path(folder), data_dir=self._options.data_dir)
                try:
                    comparison = evaluate(candidate, plan, base=request, say=self._say).comparison
                except (HubMoeError, OSError) as error:
                    gaps.append(f"regressions on the suite {shown(suite.name)} were not measured: {_sentence(error)}")
                    continue
                assert comparison is not None
                found.append(comparison)
        costs = [describe_costs(each, tolerance=self._options.tolerance) for each in found]
        return replace(
            review,
            regressions=tuple(found),
            gaps=(*review.gaps, *gaps),
            rejections=(*review.rejections, *(reason for beyond, _ in costs for reason in beyond)),
            notes=(*review.notes, *(note for _, within in costs for note in within)),
        )


def read_suites(api: HfApi, repo: str, commit: str) -> list[Suite]:
    """The suites of the records beside the base, each once.

    Raises:
        ConfigError, EvaluationError: If a record is damaged.
    """
    with describing(api, repo):
        snapshot = snapshot_download(
            repo, revision=commit, allow_patterns=[f"{FOLDER}/*.json"], endpoint=api.endpoint, token=api.token
        )
    return suites_of(find_records(Path(snapshot) / FOLDER))


def suites_of(stored: Sequence[StoredRecord]) -> list[Suite]:
    """The suites of some records, each once."""
    sources = {each.record.suite.sha256: each.record.suite for each in stored if each.record.suite.declaration}
    return [Suite.from_declaration(source.declaration) for source in sources.values()]


def compare_claims(stored: Sequence[StoredRecord]) -> Iterator[RecordComparison]:
    """The patch's records against those of the base that lie beside them, where both were asked the same."""
    bases = {each.record.suite.sha256: each for each in stored if each.record.model.kind != "expert_patch"}
    for each in stored:
        base = bases.get(each.record.suite.sha256)
        if each.record.model.kind == "expert_patch" and base is not None:
            try:
                yield compare_records(base, each)
            except EvaluationError:
                continue  # records of other documents are no comparison


def _why_failed(verification: Verification) -> list[str]:
    failed = [f"{each.check}: {shown(each.detail)}" for each in verification.findings if not each.passed]
    return failed or ["the claims do not hold"]


def _sentence(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])
