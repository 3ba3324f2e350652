"""What a fine-tune gains over its base, whose word that is, and which of two stands above the other."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .contributions import REPRODUCED, FoundReview, one_line

Word = Literal["reproduced", "self-reported", "none", "rejected"]
Kind = Literal["merged patch", "patch", "proposed patch", "expert patch", "finetune", "adapter", "merge", "quantized"]

_RANKS: dict[Word, int] = {"reproduced": 0, "self-reported": 1, "none": 2, "rejected": 3}


@dataclass(frozen=True)
class Standing:
    """Whose word a result is.

    Attributes:
        word: "none" where nothing is claimed.
        by: Who reproduced or rejected it: somebody whom the base's owner trusts, and not its author.
        reason: Of a rejection, where one is given.
    """

    word: Word
    by: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.word} by {self.by}" if self.by else self.word

    @property
    def rank(self) -> int:
        """0 is best."""
        return _RANKS[self.word]


SELF_REPORTED = Standing("self-reported")
NO_RESULT = Standing("none")


@dataclass(frozen=True)
class Result:
    """One entry of a record of a fine-tune.

    Attributes:
        value: Of the entry's main metric, `metric`.
        record: Its id.
        base_value: Of the base that it was made from, asked the same; None where no record says it.
        base_record: The id of that one.
        interval: 95 % interval of the difference, paired by document; None where the answers cannot be had.
        verdict: "better", "worse" or "tied" by the paired test; None likewise.
    """

    task: str
    metric: str
    value: float
    higher_is_better: bool
    num_documents: int
    record: str
    created: str
    standing: Standing
    base_value: float | None = None
    base_record: str | None = None
    interval: tuple[float, float] | None = None
    verdict: str | None = None

    @property
    def difference(self) -> float | None:
        """Fine-tune minus base."""
        return None if self.base_value is None else self.value - self.base_value

    @property
    def gain(self) -> float | None:
        """The difference, positive where the fine-tune is the better one."""
        return None if self.difference is None else self._towards_better(self.difference)

    def order(self, metric: str | None = None) -> tuple[Any, ...]:
        """Sorts the better-founded first, then the larger gain; results by another metric than `metric` come later."""
        standing, gain = self.standing.rank, self.gain
        size = self._towards_better(self.value) if gain is None else gain
        return standing, metric not in (None, self.metric), gain is None, -size, -self.num_documents

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "difference": self.difference, "gain": self.gain}

    def _towards_better(self, value: float) -> float:
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class FineTune:
    """A fine-tune of a base and what its records say.

    Attributes:
        name: Of the patch, or the id of the model's repo.
        repo, revision, subfolder: Where it is; `revision` is a commit.
        standing: Of its best-founded result; "rejected" if the contribution was.
    """

    name: str
    kind: Kind
    author: str
    repo: str
    revision: str
    subfolder: str | None = None
    pull_request: int | None = None
    standing: Standing = NO_RESULT
    results: tuple[Result, ...] = field(default=())

    def of_task(self, task: str) -> Result | None:
        """Its result on a task."""
        return next((each for each in self.results if each.task == task), None)

    def order(self) -> tuple[Any, ...]:
        """Sorts the better-founded first, then by how many of its tasks gained, less those that lost."""
        gains = [each.gain for each in self.results if each.standing == self.standing and each.gain is not None]
        return self.standing.rank, sum(each < 0 for each in gains) - sum(each > 0 for each in gains), -len(gains)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "results": [each.to_dict() for each in self.results]}


def judge_contribution(reviews: Sequence[FoundReview]) -> Standing | None:
    """The rejection, if the last review of the head by somebody who counts is one; incomplete ones say nothing."""
    for review in reversed(reviews):
        if review.counts and review.is_current and review.mark.verdict != "incomplete":
            reason = one_line(review.mark.reasons[0]) if review.mark.reasons else None
            return Standing("rejected", review.reviewer, reason) if review.mark.verdict == "reject" else None
    return None


def judge_records(reviews: Sequence[FoundReview]) -> dict[str, Standing]:
    """What the reviews that count found of each record at the head, by its id; the last that says something stands.

    It holds in this pull request only: anybody can put a copy of somebody else's record beside other weights, where it
    fails, or a copy of a sound patch beside another tokenizer.
    """
    found: dict[str, Standing] = {}
    for review in reversed(reviews):
        for record, outcome in review.mark.records.items() if review.counts and review.is_current else ():
            if outcome in REPRODUCED:
                found.setdefault(record, Standing("reproduced", review.reviewer))
            elif outcome == "failed":
                found.setdefault(record, Standing("rejected", review.reviewer, "its record could not be reproduced"))
    return found


def choose_results(results: Iterable[Result]) -> tuple[Result, ...]:
    """One for each task: the best-founded, then the one over most documents, then the newest; never the highest."""
    ordered = sorted(results, key=lambda each: (each.created, each.record))
    ordered.sort(key=lambda each: (-each.standing.rank, each.gain is not None, each.num_documents))
    chosen = {each.task: each for each in ordered}
    return tuple(sorted(chosen.values(), key=lambda each: (each.standing.rank, each.task)))


def find_metric(task: str, fine_tunes: Iterable[FineTune], of_base: str | None) -> str | None:
    """The metric to rank by: the base's, else the one that most fine-tunes have; None where there is no result."""
    counts = Counter(result.metric for each in fine_tunes if (result := each.of_task(task)))
    return of_base or min(counts, key=lambda name: (-counts[name], name), default=None)
