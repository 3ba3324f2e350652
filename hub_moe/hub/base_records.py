"""What the base itself scores, as far as it may be believed: records of its weights at a commit on main."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from huggingface_hub import HfApi

from ..cards.collect import is_of
from ..evals.records import EntryResult, Record, StoredRecord
from .candidates import Candidate, weights_of
from .found_records import RecordReader
from .pull_requests import Listed, list_files, list_history
from .ranking import Standing

_MAX_COMMITS = 20


@dataclass(frozen=True)
class _State:
    """The base at a commit: sha256 of its weights by name, and the records that lie in its `evals/`."""

    weights: Mapping[str, str]
    records: tuple[StoredRecord, ...]


class BaseRecords:
    """The records of `base`, whose files at the newest commit are `files`."""

    def __init__(self, api: HfApi, base: str, *, commit: str, files: Mapping[str, Listed], records: RecordReader):
        self._api, self._base, self._head, self._records = api, base, commit, records
        self._states = {commit: self._make_state(commit, files)}
        self._history = set(list_history(api, base))
        self.notes: list[str] = []

    @property
    def tasks(self) -> dict[str, str]:
        """By name of every task that the base's newest records have, the metric."""
        head = self._states[self._head]
        return {entry.name: entry.main_metric for each in head.records for entry in each.record.entries}

    def find(
        self, candidate: Candidate, record: Record, entry: EntryResult, *, proved: Mapping[str, Standing] | None
    ) -> tuple[StoredRecord, EntryResult] | None:
        """The base's record that answers what `entry` of the candidate's record answers, and its entry.

        The base's own goes before one that lies beside the candidate, which is its author's word. With `proved`, the
        standing of records, such a one counts only if it was reproduced.
        """
        beside = [each for each in candidate.beside if proved is None or _is_reproduced(each, proved)]
        for commit in self._commits(candidate, record):
            state = self._read(commit)
            if state is None:
                continue
            for stored in (*state.records, *beside):
                is_its_base = record.model.base is None or record.model.base.sha256 == stored.record.model.sha256
                if is_its_base and is_of(stored.record, state.weights):
                    same = [each for each in stored.record.entries if _asks_the_same(each, entry)]
                    if same:
                        return stored, same[0]
        return None

    def _commits(self, candidate: Candidate, record: Record) -> Iterator[str]:
        """Those of main that it may be made from: as its files say, else as its records do, else the head."""
        if candidate.base_commit is not None:
            found = [candidate.base_commit]
        else:
            models = [record.model.base, *(each.record.model for each in candidate.beside)]
            found = [*(each.revision for each in models if each and each.revision), self._head]
        yield from (commit for commit in dict.fromkeys(found) if commit in self._history)

    def _read(self, commit: str) -> _State | None:
        if commit not in self._states:
            if len(self._states) >= _MAX_COMMITS:
                self.notes.append(f"{self._base} was looked at as it was at {_MAX_COMMITS} commits only.")
                return None
            self._states[commit] = self._make_state(commit, list_files(self._api, self._base, commit))
        return self._states[commit]

    def _make_state(self, commit: str, files: Mapping[str, Listed]) -> _State:
        weights = weights_of(files)
        found = self._records.read(self._base, files, revision=commit)
        return _State(weights, tuple(each for each in found if is_of(each.record, weights)))


def _is_reproduced(stored: StoredRecord, standings: Mapping[str, Standing]) -> bool:
    standing = standings.get(stored.record.id)
    return standing is not None and standing.word == "reproduced"


def _asks_the_same(one: EntryResult, other: EntryResult) -> bool:
    """Whether two entries are the same number of the same answers to the same prompts."""
    questions, others = (
        [(task.name, task.prompts_sha256, task.dataset.rows_sha256, task.num_documents) for task in entry.tasks]
        for entry in (one, other)
    )
    is_same_number = (one.name, one.main_metric, one.main.higher_is_better, one.main.num_documents) == (
        other.name,
        other.main_metric,
        other.main.higher_is_better,
        other.main.num_documents,
    )
    return is_same_number and questions == others
