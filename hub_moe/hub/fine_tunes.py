"""Which fine-tune of a base is the best? Found on its Hub and ranked by what others could reproduce.

Whatever a fine-tune says was written by strangers. What counts: a record has the hash that it claims and is of the
weights that lie there; the base's record is of the base's weights at a commit on main, and was asked the same; a review
is by somebody whom the base's owner trusts, about somebody else's work, at the head that is proposed now.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..errors import ConfigError
from ..evals.records import EntryResult, StoredRecord
from .base_records import BaseRecords
from .candidates import Candidate, CandidateReader
from .differences import Compare, Differences
from .found_records import RecordReader
from .lineage import fetch_info
from .pull_requests import list_files
from .ranking import (
    NO_RESULT,
    SELF_REPORTED,
    FineTune,
    Result,
    Standing,
    choose_results,
    find_metric,
    judge_contribution,
    judge_records,
)

DEFAULT_LIMIT = 20
_MOST_NAMED = 5


@dataclass(frozen=True)
class FoundFineTunes:
    """The best fine-tunes of a base, best first.

    Attributes:
        commit: Of the base's main now.
        task: By which they are ranked; None if by all that they claim.
        tasks: The names that could be asked for.
        num_found: How many there are, of which `fine_tunes` holds the first.
        notes: What was left out and why.
    """

    base: str
    commit: str
    task: str | None
    tasks: tuple[str, ...]
    num_found: int
    fine_tunes: tuple[FineTune, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **{name: getattr(self, name) for name in ("base", "commit", "task", "num_found")},
            "tasks": list(self.tasks),
            "fine_tunes": [each.to_dict() for each in self.fine_tunes],
            "notes": list(self.notes),
        }


def find_fine_tunes(
    api: HfApi,
    base: str,
    *,
    compare: Compare,
    scratch: Path,
    task: str | None = None,
    limit: int = DEFAULT_LIMIT,
    say: Callable[[str], None] = lambda text: None,
) -> FoundFineTunes:
    """The fine-tunes of OWNER/NAME: patches in it, patches proposed to it, models whose card names it.

    Args:
        compare: Two records by document; `hub_moe.evals.compare` has it.
        scratch: A folder for what is read.
        task: Entry of the suites to rank by: reproduced results first, then the larger gain over the base. None ranks
            by how many of its tasks each improves, reproduced ones first.
        limit: How many to give.

    Raises:
        ConfigError: If `base` is no id of a repo, or no record is about `task`.
        HubError: If there is no such model, or it cannot be read.
    """
    info = fetch_info(api, base)
    files = list_files(api, info.id, str(info.sha))
    records = RecordReader(api, scratch)
    candidates = CandidateReader(api, info.id, commit=str(info.sha), files=files, records=records, say=say)
    bases = BaseRecords(api, info.id, commit=str(info.sha), files=files, records=records)
    finder = _Finder(candidates, bases, Differences(compare, records), task)
    found, tasks = finder.find()
    ranked = finder.rank(found, tasks, base=info.id, limit=limit) if found else []
    parts = (candidates, records, bases, finder.differences)
    return FoundFineTunes(
        base=info.id,
        commit=str(info.sha),
        task=task,
        tasks=tuple(tasks),
        num_found=len(found),
        fine_tunes=tuple(ranked),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


class _Finder:
    """Judges the candidates, and compares those that are shown by document."""

    def __init__(
        self, candidates: CandidateReader, bases: BaseRecords, differences: Differences, task: str | None
    ) -> None:
        self._candidates, self._bases, self.differences, self._task = candidates, bases, differences, task
        self._stored: dict[str, StoredRecord] = {}

    def find(self) -> tuple[list[FineTune], list[str]]:
        """Every fine-tune, and the names of all tasks."""
        found = [self._judge(each) for each in self._candidates.read()]
        return found, sorted({result.task for each in found for result in each.results} | self._bases.tasks.keys())

    def _judge(self, candidate: Candidate) -> FineTune:
        rejection = judge_contribution(candidate.reviews)
        standings = judge_records(candidate.reviews)
        results = choose_results(
            self._make_result(candidate, stored, entry, standings)
            for stored in candidate.own
            for entry in stored.record.entries
        )
        if rejection is not None:
            results = tuple(replace(each, standing=rejection) for each in results)
        standing = rejection or min((each.standing for each in results), key=_rank_of, default=NO_RESULT)
        return replace(candidate.fine_tune, standing=standing, results=results)

    def _make_result(
        self, candidate: Candidate, stored: StoredRecord, entry: EntryResult, standings: Mapping[str, Standing]
    ) -> Result:
        record, metric = stored.record, entry.main
        standing = standings.get(record.id, SELF_REPORTED)
        proved = standings if standing.word == "reproduced" else None
        found = self._bases.find(candidate, record, entry, proved=proved)
        self._stored[record.id] = stored
        if found is not None:
            self._stored[found[0].record.id] = found[0]
        return Result(
            task=entry.name,
            metric=metric.name,
            value=metric.value,
            higher_is_better=metric.higher_is_better,
            num_documents=metric.num_documents,
            record=record.id,
            created=record.created,
            standing=standing,
            base_value=found[1].main.value if found else None,
            base_record=found[0].record.id if found else None,
        )

    def rank(self, found: Sequence[FineTune], tasks: Sequence[str], *, base: str, limit: int) -> list[FineTune]:
        """The first `limit`, each compared by document; who loses a gain by that goes down and the next comes."""
        if self._task is not None:
            found = [self._keep_task(each, self._task) for each in found]
            if self._task not in tasks:
                raise ConfigError(_describe_unknown(base, self._task, tasks))
        of_base = self._bases.tasks.get(self._task or "")
        metric = find_metric(self._task, found, of_base) if self._task else None
        ranked, measured = list(found), set[FineTune]()
        while True:
            ranked.sort(key=lambda each: _order(each, self._task, metric))
            place = next((i for i, each in enumerate(ranked[:limit]) if each not in measured), None)
            if place is None:
                return ranked[:limit]
            ranked[place] = self._measure(ranked[place])
            measured.add(ranked[place])

    def _keep_task(self, fine_tune: FineTune, task: str) -> FineTune:
        result = fine_tune.of_task(task)
        standing = result.standing if result else NO_RESULT
        is_rejected = fine_tune.standing.word == "rejected"
        return replace(
            fine_tune, results=(result,) if result else (), standing=fine_tune.standing if is_rejected else standing
        )

    def _measure(self, fine_tune: FineTune) -> FineTune:
        return replace(fine_tune, results=tuple(self._measure_all(fine_tune)))

    def _measure_all(self, fine_tune: FineTune) -> Iterator[Result]:
        for each in fine_tune.results:
            if each.base_record is None:
                yield each
                continue
            base, candidate = self._stored[each.base_record], self._stored[each.record]
            yield self.differences.measure(
                each, base=base, candidate=candidate, whose=fine_tune.name, alone=self._task is not None
            )


def _rank_of(standing: Standing) -> int:
    return standing.rank


def _order(fine_tune: FineTune, task: str | None, metric: str | None) -> tuple[Any, ...]:
    if task is None:
        return (*fine_tune.order(), fine_tune.name.lower())
    result = fine_tune.of_task(task)
    inner = result.order(metric)[1:] if result else (True, True, 0.0, 0)
    return (fine_tune.standing.rank, *inner, fine_tune.name.lower())


def _describe_unknown(base: str, task: str, tasks: Sequence[str]) -> str:
    if not tasks:
        return f"Neither {base} nor a fine-tune of it has a record, so none can be ranked by {task!r}."
    near = difflib.get_close_matches(task, tasks, n=3, cutoff=0.5)
    if near:
        advice = f"did you mean {' or '.join(near)}?"
    else:
        more = f" and {len(tasks) - _MOST_NAMED} more" if len(tasks) > _MOST_NAMED else ""
        advice = f"there are {', '.join(tasks[:_MOST_NAMED])}{more}."
    return f"No record of {base} or its fine-tunes is about the task {task!r}; {advice}"
