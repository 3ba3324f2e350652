"""A fine-tune against its base: two records of the same questions, compared document by document."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import EvaluationError
from .records import EntryResult, NoiseFloor, Sample, StoredRecord
from .records.record import hash_json
from .statistics import Comparison, DocumentScores, Pairs, compare_tasks, pair_scores

# other settings change the speed, not the answers
_MATTERS = ("engine", "dtype", "attention", "experts", "batch_size", "max_length", "system_prompt")


@dataclass(frozen=True)
class RecordComparison:
    """What two records say about two models.

    Attributes:
        base, candidate: Ids of the records.
        metrics: By entry, the metric compared. Perplexities are compared by their logarithm, in nats.
        left_out: Entries that only one of the records has.
        execution_differences: By setting, those of base and candidate: they may differ by rounding alone.
        noise_floors: Of the two records, where they were measured.
    """

    comparison: Comparison
    base: str
    candidate: str
    base_model: str
    candidate_model: str
    suite: str
    metrics: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    execution_differences: Mapping[str, tuple[Any, Any]] | None = None
    noise_floors: Mapping[str, NoiseFloor | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "comparison": self.comparison.to_dict()}


def compare_records(
    base: StoredRecord,
    candidate: StoredRecord,
    *,
    metrics: Mapping[str, str] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> RecordComparison:
    """Compare by paired differences of documents, entry by entry; see `statistics.RULE` for the verdicts.

    Args:
        metrics: By entry, a metric to compare in place of its main one.
        alpha: See `compare_tasks`.
        seed: Of permutation tests.

    Raises:
        EvaluationError: If the records have no entry in common, or not one that `metrics` names, or their documents or
            prompts differ.
    """
    names = [entry.name for entry in base.record.entries]
    others = [entry.name for entry in candidate.record.entries]
    shared = [name for name in names if name in others]
    if not shared:
        raise EvaluationError(
            f"The records have no entry in common: {', '.join(names)} against {', '.join(others)}; run both models on "
            "the same suite."
        )
    if unknown := sorted(set(metrics or {}) - set(shared)):
        raise EvaluationError(f"The records do not share an entry {unknown[0]!r}; they share {', '.join(shared)}.")
    chosen = {name: _choose_metric(base.record.entry(name), metrics or {}) for name in shared}
    pairs = _pair(base, candidate, chosen)
    costs = [name for name in shared if _is_cost(base.record.entry(name), chosen[name])]
    comparison = compare_tasks(pairs, lower_is_better=costs, alpha=alpha, seed=seed)
    return RecordComparison(
        comparison=comparison,
        base=base.record.id,
        candidate=candidate.record.id,
        base_model=str(base.record.model),
        candidate_model=str(candidate.record.model),
        suite=base.record.suite.name,
        metrics=chosen,
        left_out=tuple(sorted(set(names) ^ set(others))),
        execution_differences=find_execution_differences(base, candidate),
        noise_floors={"base": base.record.noise_floor, "candidate": candidate.record.noise_floor},
    )


def find_execution_differences(base: StoredRecord, candidate: StoredRecord) -> dict[str, tuple[Any, Any]]:
    """The settings that change rounding, and with it answers, in which the two runs differ."""
    ours, theirs = asdict(base.record.execution), asdict(candidate.record.execution)
    return {name: (ours[name], theirs[name]) for name in _MATTERS if ours[name] != theirs[name]}


def _choose_metric(entry: EntryResult, wanted: Mapping[str, str]) -> str:
    name = wanted.get(entry.name, entry.main_metric)
    known = [metric.name for metric in entry.metrics]
    if name not in known:
        raise EvaluationError(f"The entry {entry.name} has no metric {name!r}; it has {', '.join(known)}.")
    return name


def _is_cost(entry: EntryResult, metric: str) -> bool:
    return any(each.name == metric and not each.higher_is_better for each in entry.metrics)


def _pair(base: StoredRecord, candidate: StoredRecord, chosen: Mapping[str, str]) -> dict[str, Pairs]:
    ours, theirs = _by_entry(base.read_samples()), _by_entry(candidate.read_samples())
    pairs = {}
    for name, metric in chosen.items():
        try:
            pairs[name] = pair_scores(_scores(ours[name], metric), _scores(theirs[name], metric))
        except EvaluationError as error:
            raise EvaluationError(f"{name} cannot be compared: {error}") from error
    return pairs


def _by_entry(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found = defaultdict(list)
    for sample in samples:
        found[sample.entry].append(sample)
    return found


def _scores(samples: Sequence[Sample], metric: str) -> DocumentScores:
    if any(metric not in sample.scores for sample in samples):
        raise EvaluationError(f"{metric} is no sum over documents, so it has no paired difference; choose another.")
    is_ratio = any(metric in sample.sizes for sample in samples)
    is_grouped = all(sample.group is not None for sample in samples)
    return DocumentScores(
        documents=[f"{sample.task} {sample.index} {sample.document_sha256}" for sample in samples],
        prompts=[hash_json(list(sample.prompt_sha256s)) for sample in samples],
        scores=[sample.scores[metric] for sample in samples],
        sizes=[sample.sizes[metric] for sample in samples] if is_ratio else None,
        groups=[str(sample.group) for sample in samples] if is_grouped else None,
    )
