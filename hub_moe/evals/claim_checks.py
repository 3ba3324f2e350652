"""The checks of a claim that need no model: files, suite, prompts, and the numbers from the samples."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import HubMoeError
from .records import EntryResult, ModelSource, Record, Sample
from .request_hashes import hash_request
from .scoring import ScoredTask, score_task, summarise
from .suites import load_suite
from .tasks import BuiltSuite, BuiltTask

_SHOWN = 3
_TASK_FIELDS = ("config_sha256", "dataset", "num_documents", "prompts_sha256", "num_fewshot", "fewshot_seed")


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, whether it held, and in words what was found."""

    check: str
    passed: bool
    detail: str


def check_model(claimed: ModelSource, found: ModelSource) -> Finding:
    """Whether the model at hand has the files, by name and sha256, that the record names; its base likewise."""
    problems = list(_compare_files(claimed, found))
    if problems:
        return Finding("model", False, f"the model is another one than the record's: {_some(problems)}")
    levels = 1 + (found.base is not None)
    return Finding("model", True, f"all {len(_all_files(found))} files of {levels} model(s) have the record's sha256")


def check_suite(record: Record) -> Finding:
    """Whether the suite is the one of that name which comes with hub_moe, whole.

    A suite of somebody's own, and a part of ours, are no fault, but they are not the suite of that name.
    """
    name = record.suite.name
    try:
        ours = load_suite(name).source
    except HubMoeError:
        return Finding("suite", True, f"{name} is no suite of hub_moe; its declaration is in the record")
    if ours.sha256 == record.suite.sha256:
        return Finding("suite", True, f"the whole suite {name}")
    changed = _changed_keys(ours.declaration, record.suite.declaration)
    return Finding("suite", True, f"NOT the suite {name} as it stands: other {', '.join(changed)}")


def check_tasks(record: Record, built: BuiltSuite) -> Finding:
    """Whether tasks, data and every prompt, built again here, have the hashes in the record."""
    claimed = {(entry.name, task.name): task for entry in record.entries for task in entry.tasks}
    found = {(each.entry.name, each.source.name): each.source for each in built.tasks}
    problems = [f"{name} is not in the {where}" for name, where in _differing_names(claimed, found)]
    for key in claimed.keys() & found.keys():
        problems += [
            f"{key[1]} has another {field}"
            for field in _TASK_FIELDS
            if getattr(claimed[key], field) != getattr(found[key], field)
        ]
    if problems:
        return Finding("prompts", False, f"the questions are not those of the suite: {_some(sorted(problems))}")
    total = sum(task.num_documents for task in claimed.values())
    return Finding("prompts", True, f"all prompts of {total:,} documents, built again, have the record's hashes")


def check_samples(samples: Sequence[Sample], built: BuiltSuite) -> Finding:
    """Whether there is one sample for each document, with the prompts as they were built here."""
    expected = {
        (each.source.name, document.index): (document.sha256, document.group, prompts)
        for each in built.tasks
        for document, prompts in zip(each.documents, _prompts(each), strict=True)
    }
    found = {
        (sample.task, sample.index): (sample.document_sha256, sample.group, sample.prompt_sha256s) for sample in samples
    }
    if len(found) != len(samples):
        return Finding("samples", False, f"{len(samples) - len(found)} documents are there more than once")
    if missing := sorted(expected.keys() - found.keys()):
        return Finding("samples", False, f"{len(missing)} documents have no answer: {_some(map(_name, missing))}")
    if foreign := sorted(found.keys() - expected.keys()):
        return Finding("samples", False, f"{len(foreign)} documents are not in the suite: {_some(map(_name, foreign))}")
    if differ := sorted(key for key in expected if expected[key] != found[key]):
        return Finding(
            "samples", False, f"{len(differ)} documents or their prompts differ: {_some(map(_name, differ))}"
        )
    return Finding("samples", True, "one answer for each document and prompt")


def check_numbers(record: Record, samples: Sequence[Sample], built: BuiltSuite) -> Finding:
    """Whether scores and metrics, computed again from the answers in the samples, are the record's."""
    by_document = {(sample.task, sample.index): sample for sample in samples}
    scored = []
    for each in built.tasks:
        answer_from_samples(each, by_document)
        scored.append(score_task(each))
    wrong = [
        _name((sample.task, sample.index))
        for each in scored
        for sample in each.samples
        if not _same_scores(sample, by_document[sample.task, sample.index])
    ]
    if wrong:
        return Finding("numbers", False, f"{len(wrong)} scores do not follow from their answers: {_some(wrong)}")
    problems = [problem for entry in record.entries for problem in _compare_entry(entry, scored)]
    if problems:
        return Finding("numbers", False, f"the record's numbers do not follow from its samples: {_some(problems)}")
    count = sum(len(entry.metrics) for entry in record.entries)
    return Finding("numbers", True, f"all {count} metrics follow from the samples")


def answer_from_samples(built: BuiltTask, samples: Mapping[tuple[str, int], Sample]) -> None:
    """Put the answers in the samples into the instances, as if the model had just given them."""
    for document, instances in zip(built.documents, built.instances_by_document(), strict=True):
        sample = samples[built.source.name, document.index]
        for number, instance in enumerate(instances):
            instance.resps = _answers(sample, number, len(instances))


def _answers(sample: Sample, number: int, num_requests: int) -> list[Any]:
    if sample.texts:
        repeats = len(sample.texts) // num_requests
        return list(sample.texts[number * repeats : (number + 1) * repeats])
    if sample.is_greedy:
        return [(sample.log_likelihoods[number], sample.is_greedy[number])]
    return [sample.log_likelihoods[number]]


def _prompts(built: BuiltTask) -> Iterator[tuple[str, ...]]:
    for instances in built.instances_by_document():
        yield tuple(hash_request(instance) for instance in instances)


def _compare_files(claimed: ModelSource, found: ModelSource) -> Iterator[str]:
    if claimed.kind != found.kind:
        yield f"{found.name} is a {found.kind}, the record's a {claimed.kind}"
        return
    for name in sorted(claimed.files.keys() | found.files.keys()):
        if name not in found.files:
            yield f"{name} is missing"
        elif name not in claimed.files:
            yield f"{name} was not there"
        elif claimed.files[name] != found.files[name]:
            yield f"{name} has another sha256"
    if claimed.base and found.base:
        yield from (f"base: {problem}" for problem in _compare_files(claimed.base, found.base))
    elif claimed.base or found.base:
        yield "only one of them has a base"


def _all_files(source: ModelSource) -> list[str]:
    return [*source.files, *(_all_files(source.base) if source.base else ())]


def _compare_entry(entry: EntryResult, scored: Sequence[ScoredTask]) -> Iterator[str]:
    tasks = [each for each in scored if each.built.entry.name == entry.name]
    found = summarise(entry.name, tasks, main_metric=tasks[0].built.main_metric, limit=tasks[0].built.entry.limit)
    for field in ("main_metric", "limit", "num_unparsable"):
        if getattr(found, field) != getattr(entry, field):
            yield f"{entry.name}: {field} is {getattr(found, field)}, not {getattr(entry, field)}"
    ours, theirs = ({metric.name: metric for metric in each.metrics} for each in (found, entry))
    if ours.keys() != theirs.keys():
        yield f"{entry.name} has other metrics"
        return
    for name, metric in ours.items():
        for field in ("value", "standard_error", "low", "high", "num_documents", "num_clusters", "higher_is_better"):
            if not _same(getattr(metric, field), getattr(theirs[name], field)):
                yield f"{entry.name} {name}: {field} is {getattr(metric, field)}, not {getattr(theirs[name], field)}"


def _same_scores(one: Sample, other: Sample) -> bool:
    return (
        one.is_unparsable == other.is_unparsable
        and _same_numbers(one.scores, other.scores)
        and _same_numbers(one.sizes, other.sizes)
    )


def _same_numbers(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)


def _differing_names(claimed: Collection[Any], found: Collection[Any]) -> Iterator[tuple[str, str]]:
    for key in sorted(set(claimed) - set(found)):
        yield key[1], "suite"
    for key in sorted(set(found) - set(claimed)):
        yield key[1], "record"


def _changed_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]} document {key[1]}"


def _some(problems: Any) -> str:
    found = list(problems)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
