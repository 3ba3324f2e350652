"""Does a merged model still have what each contributor gained? Asked with each contributor's own suites."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, HubMoeError
from ..evals.compare import RecordComparison, compare_records
from ..evals.models import ModelRequest
from ..evals.records import StoredRecord, read_record
from ..evals.session import Plan, evaluate
from ..evals.statistics.comparison import Verdict
from ..evals.suites import Suite
from .costs import describe_cost, percent, share_lost
from .review import suites_of
from .safety import Contribution, shown

OF_THE_BASE = "(the base's own)"
"""In the place of a patch's name, where nobody's patch brought a suite."""

_KEPT, _LEAST_KEPT = 0.95, 0.5


@dataclass(frozen=True)
class Gain:
    """One task of a contributor's suite: base, the contributor's patch alone, and all patches merged.

    The verdicts are of paired comparisons: of patch and merged model with the base, and of the merged model with the
    patch.

    Attributes:
        tolerance: By what share of the base's value the merged model may be worse than the base.
    """

    patch: str
    suite: str
    task: str
    metric: str
    base: float
    own: float
    merged: float
    own_verdict: Verdict
    merged_verdict: Verdict
    against_own: Verdict = "tied"
    lower_is_better: bool = False
    tolerance: float = 0.0

    @property
    def kept_share(self) -> float | None:
        """Of what the patch alone gains, the share that the merged model has; None where it gains nothing."""
        if self.own_verdict != "better":
            return None
        return (self.merged - self.base) / (self.own - self.base)

    @property
    def cost(self) -> float:
        """By what share of its value the base got worse by the merge; negative where it got better."""
        return share_lost(self.metric, self.base, self.merged, lower_is_better=self.lower_is_better)

    @property
    def is_lost(self) -> bool:
        """Whether the merge takes away a gain, or makes the model worse than is put up with.

        A gain is taken away when less than half of it is kept, or when the merged model is shown to be worse than the
        patch alone and not shown to be better than the base.
        """
        kept = self.kept_share
        is_unseen = self.merged_verdict != "better" and self.against_own == "worse"
        has_gone = kept is not None and (kept < _LEAST_KEPT or is_unseen)
        return has_gone or (self.merged_verdict == "worse" and self.cost > self.tolerance)

    @property
    def outcome(self) -> str:
        """In a word or two."""
        if self.is_lost:
            return "lost"
        if self.kept_share is not None:
            return "kept" if self.kept_share > _KEPT else f"kept in part ({100 * self.kept_share:.0f} %)"
        return f"costs {percent(self.cost)}" if self.merged_verdict == "worse" else "no gain shown"

    @property
    def loss(self) -> str:
        """What is taken away, in words, where something is."""
        if self.kept_share is not None:
            figures = f"base {self.base:.3f}, alone {self.own:.3f}, merged {self.merged:.3f}"
            return f"the gain of {self.patch} on {self.task} is lost ({figures})"
        return f"{self.task} gets worse (base {self.base:.3f}, merged {self.merged:.3f})"

    @property
    def note(self) -> str | None:
        """What is put up with, in words, where something is."""
        if self.is_lost or self.merged_verdict != "worse":
            return None
        return f"Merging {describe_cost(self.task, self.cost, tolerance=self.tolerance)}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "kept_share": self.kept_share, "outcome": self.outcome}


@dataclass(frozen=True)
class Examiner:
    """How models are asked: the base, the merged model, and each patch alone, all at the commit that is merged into.

    Attributes:
        base: OWNER/NAME, at the commit `revision`.
        merged: The folder of the merged model.
        alone: The folder of each patch by its name, for this base; empty where the merged model is the patch alone.
        folder: Where the records go.
        may_skip: Whether a suite of the base's own that cannot be asked is left out, and told to `say`.
    """

    base: str
    revision: str
    merged: Path
    alone: Mapping[str, Path]
    folder: Path
    data_dir: Path | None = None
    device: str | None = None
    batch_size: int = 16
    tolerance: float = 0.0
    may_skip: bool = False
    say: Callable[[str], None] = lambda text: None

    def examine(self, contributions: Sequence[Contribution], own_suites: Sequence[Suite] = ()) -> Iterator[Gain]:
        """Every task of every contributor's suites, then of those of the base's that none of them brought.

        Raises:
            HubMoeError: If a suite cannot be asked, such as for want of its data.
        """
        asked: dict[str, tuple[StoredRecord, StoredRecord]] = {}
        for contribution in contributions:
            for suite in find_suites(contribution):
                if suite.source.sha256 not in asked:
                    asked[suite.source.sha256] = self._ask_both(suite)
                base, merged = asked[suite.source.sha256]
                yield from self._compare(contribution.name, suite, base, merged)
        for suite in own_suites:
            if suite.source.sha256 in asked:
                continue
            try:
                yield from self._compare(OF_THE_BASE, suite, *self._ask_both(suite))
            except (HubMoeError, OSError) as error:
                if not self.may_skip:
                    raise
                why = str(error).strip().partition("\n")[0]
                self.say(f"The base's suite {shown(suite.name)} was not asked, so its results leave the card: {why}")

    def _ask_both(self, suite: Suite) -> tuple[StoredRecord, StoredRecord]:
        base = self._ask(suite, self._request(self.base, revision=self.revision), "base")
        return base, self._ask(suite, replace(self._request(str(self.merged)), name=self.base), "merged")

    def _compare(self, name: str, suite: Suite, base: StoredRecord, merged: StoredRecord) -> Iterator[Gain]:
        own, against_own = merged, {}
        if name in self.alone:
            own = self._ask(suite, self._request(str(self.alone[name])), name)
            against_own = _by_task(compare_records(own, merged))
        merged_by_task = _by_task(compare_records(base, merged))
        of_own = compare_records(base, own)
        for task, compared in _by_task(of_own).items():
            yield Gain(
                patch=name,
                suite=suite.name,
                task=task,
                metric=of_own.metrics[task],
                base=compared.base.value,
                own=compared.candidate.value,
                merged=merged_by_task[task].candidate.value,
                own_verdict=compared.verdict,
                merged_verdict=merged_by_task[task].verdict,
                against_own=against_own[task].verdict if against_own else "tied",
                lower_is_better=compared.lower_is_better,
                tolerance=self.tolerance,
            )

    def _request(self, reference: str, *, revision: str | None = None) -> ModelRequest:
        return ModelRequest(reference, revision=revision, device=self.device, batch_size=self.batch_size)

    def _ask(self, suite: Suite, request: ModelRequest, role: str) -> StoredRecord:
        command = ["hub-moe", "verify", self.base]  # after the merge this asks the same of what then is there
        plan = Plan(suite, self.folder / role, data_dir=self.data_dir, command=command)
        return evaluate(request, plan, say=self.say).candidate


def find_suites(contribution: Contribution) -> list[Suite]:
    """The suites by which a contributor shows the gain.

    Raises:
        EvaluationError: If there is none.
    """
    stored = [read_record(path) for path in contribution.records]
    suites = suites_of([each for each in stored if each.record.model.kind == "expert_patch"])
    if not suites:
        raise EvaluationError(
            f"The patch {contribution.name} has no record, so nothing says what it gains; --accept-losses merges it "
            "all the same."
        )
    return suites


def _by_task(comparison: RecordComparison) -> dict[str, Any]:
    return {task.task: task for task in comparison.comparison.tasks}
