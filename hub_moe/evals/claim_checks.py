"""The checks of a claim that need no model: files, suite, prompts, and the numbers from the samples."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .records import EntryResult, ModelSource, Record, Sample, TaskSource
from .records.record import hash_json
from .request_hashes import hash_request
from .run import request_kind
from .scoring import ScoredTask, score_task, summarise
from .suites import Suite, list_suites
from .tasks import BuiltSuite

_SHOWN = 3

DocumentKey = tuple[str, str, int]  # entry, task, place in the split


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
        return Finding("model", False, f"{found} is another model than the record's: {_some(problems)}")
    below = f" and of its base {found.base}" if found.base else ""
    return Finding("model", True, f"all {_count_files(found)} files of {found}{below} have the record's sha256")


def check_suite(record: Record, suite: Suite, *, chat_template: str | None) -> Finding:
    """Whether the record is of the suite that it declares, and its settings are those of that suite."""
    problems = []
    if suite.name != record.suite.name:
        problems.append(f"it is named {record.suite.name}, and declares {suite.name}")
    if suite.source.sha256 != record.suite.sha256:
        problems.append("its declaration does not have the sha256 that it claims")
    names, declared = [entry.name for entry in record.entries], [entry.name for entry in suite.entries]
    if names != declared:
        problems.append(f"it has results for {', '.join(names)}, and declares {', '.join(declared)}")
    if record.execution.system_prompt != suite.system_prompt:
        problems.append("it ran with another system prompt than it declares")
    template = hash_json(chat_template) if suite.chat_template and chat_template is not None else None
    if record.execution.chat_template_sha256 != template:
        problems.append("it ran with another chat template than the model's")
    if record.seeds.get("fewshot") != suite.fewshot_seed:
        problems.append("it names another few-shot seed than it declares")
    if problems:
        return Finding("suite", False, f"the record contradicts its suite: {_some(problems)}")
    return Finding("suite", True, _describe_suite(record, suite))


def find_suite_changes(record: Record) -> tuple[str, ...] | None:
    """In what the record's suite differs from ours of that name, in words such as `limit`, `without mmlu`.

    None where we have none of that name, empty where it differs in nothing.
    """
    ours = next((suite.source for suite in list_suites() if suite.name == record.suite.name), None)
    if ours is None:
        return None
    if ours.sha256 == record.suite.sha256:
        return ()
    return tuple(_describe_changes(ours.declaration, record.suite.declaration))


def check_tasks(record: Record, built: BuiltSuite) -> Finding:
    """Whether tasks, data and every prompt, built again here, have the hashes in the record."""
    claimed = [(entry.name, task) for entry in record.entries for task in entry.tasks]
    found = [(each.entry.name, each.source) for each in built.tasks]
    names, rebuilt = ([(entry, task.name) for entry, task in tasks] for tasks in (claimed, found))
    problems = [f"{name} is not in the {where}" for name, where in _differing_names(names, rebuilt)]
    if not problems and names != rebuilt:
        problems.append("its tasks are not in the order of the suite, or are there more than once")
    for (_, ours), (_, theirs) in zip(found, claimed, strict=True) if not problems else ():
        problems += [f"{ours.name} has another {field}" for field in _changed_fields(ours, theirs)]
    if problems:
        return Finding("prompts", False, f"the questions are not those of the suite: {_some(problems)}")
    total = sum(task.num_documents for _, task in claimed)
    return Finding("prompts", True, f"all prompts of {total:,} documents, built again, have the record's hashes")


def check_samples(samples: Sequence[Sample], built: BuiltSuite) -> Finding:
    """Whether there is one sample for each document, with the prompts as they were built here, and whole answers."""
    expected = {key: _expect(document, instances) for key, document, instances in _documents(built)}
    found = {_key(sample): sample for sample in samples}
    if len(found) != len(samples):
        return Finding("samples", False, f"{len(samples) - len(found)} documents are there more than once")
    if missing := sorted(expected.keys() - found.keys()):
        return Finding("samples", False, f"{len(missing)} documents have no answer: {_some(map(_name, missing))}")
    if foreign := sorted(found.keys() - expected.keys()):
        return Finding("samples", False, f"{len(foreign)} documents are not in the suite: {_some(map(_name, foreign))}")
    differ = [key for key, (document, _) in expected.items() if document != _document(found[key])]
    if differ:
        names = _some(map(_name, differ))
        return Finding("samples", False, f"{len(differ)} documents or their prompts differ: {names}")
    if broken := [key for key, (_, shape) in expected.items() if not _is_whole(found[key], shape)]:
        names = _some(map(_name, broken))
        return Finding("samples", False, f"{len(broken)} documents have no whole, finite answers: {names}")
    return Finding("samples", True, "one answer for each document and prompt")


def check_numbers(record: Record, samples: Sequence[Sample], built: BuiltSuite, *, tokenizer: Any = None) -> Finding:
    """Whether scores and metrics, computed again from the answers in the samples, are the record's."""
    by_document = {_key(sample): sample for sample in samples}
    answer_from_samples(built, by_document)
    max_length = record.execution.max_length
    scored = [score_task(each, tokenizer=tokenizer, max_length=max_length) for each in built.tasks]
    wrong = [
        _name(_key(sample))
        for each in scored
        for sample in each.samples
        if not _same_scores(sample, by_document[_key(sample)])
    ]
    if wrong:
        return Finding("numbers", False, f"{len(wrong)} scores do not follow from their answers: {_some(wrong)}")
    problems = [problem for entry in record.entries for problem in _compare_entry(entry, scored)]
    if problems:
        return Finding("numbers", False, f"the record's numbers do not follow from its samples: {_some(problems)}")
    count = sum(len(entry.metrics) for entry in record.entries)
    return Finding("numbers", True, f"all {count} metrics follow from the samples")


def answer_from_samples(built: BuiltSuite, samples: Mapping[DocumentKey, Sample]) -> None:
    """Put the answers in the samples into the instances, as if the model had just given them."""
    for key, _, instances in _documents(built):
        answers = answers_of(samples[key])
        for instance in instances:
            instance.resps, answers = answers[: _repeats(instance)], answers[_repeats(instance) :]


def answers_of(sample: Sample) -> list[Any]:
    """A sample's answers as lm_eval's models give them."""
    if sample.texts:
        return list(sample.texts)
    if sample.is_greedy:
        return list(zip(sample.log_likelihoods, sample.is_greedy, strict=True))
    return list(sample.log_likelihoods)


def in_order(samples: Sequence[Sample], built: BuiltSuite) -> list[Sample]:
    """In the order of the suite's documents, whatever the order in the file."""
    by_document = {_key(sample): sample for sample in samples}
    return [by_document[key] for key, _, _ in _documents(built)]


def _documents(built: BuiltSuite) -> Iterator[tuple[DocumentKey, Any, list[Any]]]:
    for each in built.tasks:
        for document, instances in zip(each.documents, each.instances_by_document(), strict=True):
            yield (each.entry.name, each.source.name, document.index), document, instances


def _key(sample: Sample) -> DocumentKey:
    return sample.entry, sample.task, sample.index


def _document(sample: Sample) -> tuple[Any, ...]:
    return sample.document_sha256, sample.group, tuple(sample.prompt_sha256s)


def _expect(document: Any, instances: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[int, int, int]]:
    """What tells a document, and how many log-likelihoods, flags and texts answer it."""
    prompts = tuple(hash_request(instance) for instance in instances)
    number = sum(map(_repeats, instances))
    kind = request_kind(instances[0])
    shapes = {"generate_until": (0, 0, number), "loglikelihood": (number, number, 0)}
    return (document.sha256, document.group, prompts), shapes.get(kind, (number, 0, 0))


def _repeats(instance: Any) -> int:
    return int(instance.repeats or 1)


def _is_whole(sample: Sample, shape: tuple[int, int, int]) -> bool:
    """Not a number would be no answer, and beats every other one in argmax."""
    is_finite = all(map(math.isfinite, sample.log_likelihoods))
    return is_finite and (len(sample.log_likelihoods), len(sample.is_greedy), len(sample.texts)) == shape


def _describe_changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key in _changed_keys(ours, theirs) if key != "entries")
    our_entries, their_entries = ({entry["name"]: entry for entry in each["entries"]} for each in (ours, theirs))
    if left_out := [name for name in our_entries if name not in their_entries]:
        yield f"without {', '.join(left_out)}"
    if added := [name for name in their_entries if name not in our_entries]:
        yield f"with {', '.join(added)}"
    shared = our_entries.keys() & their_entries.keys()
    yield from sorted({key for name in shared for key in _changed_keys(our_entries[name], their_entries[name])})


def _describe_suite(record: Record, suite: Suite) -> str:
    changes = find_suite_changes(record)
    if changes is None:
        return f"{suite.name} is no suite of hub_moe; its declaration is in the record"
    return (
        f"NOT the suite {suite.name} as it stands ({', '.join(changes)})"
        if changes
        else f"the whole suite {suite.name}"
    )


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


def _count_files(source: ModelSource) -> int:
    return len(source.files) + (_count_files(source.base) if source.base else 0)


def _changed_fields(ours: TaskSource, theirs: TaskSource) -> list[str]:
    """All but the hash of the task's files: a remark in them, of another lm_eval, changes no question and no score."""
    return _changed_keys(asdict(replace(ours, file_sha256=None)), asdict(replace(theirs, file_sha256=None)))


def _compare_entry(entry: EntryResult, scored: Sequence[ScoredTask]) -> Iterator[str]:
    tasks = [each for each in scored if each.built.entry.name == entry.name]
    found = summarise(entry.name, tasks, main_metric=tasks[0].built.main_metric, limit=tasks[0].built.entry.limit)
    for field in ("main_metric", "limit", "num_unparsable", "num_truncated"):
        if getattr(found, field) != getattr(entry, field):
            yield f"{entry.name}: {field} is {getattr(found, field)}, not {getattr(entry, field)}"
    if [metric.name for metric in found.metrics] != [metric.name for metric in entry.metrics]:
        yield f"{entry.name} has other metrics"
        return
    for ours, theirs in zip(found.metrics, entry.metrics, strict=True):
        for field in ("value", "standard_error", "low", "high", "num_documents", "num_clusters", "higher_is_better"):
            if not _same(getattr(ours, field), getattr(theirs, field)):
                yield f"{entry.name} {ours.name}: {field} is {getattr(ours, field)}, not {getattr(theirs, field)}"


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


def _name(key: DocumentKey) -> str:
    return f"{key[1]} document {key[2]}"


def _some(problems: Any) -> str:
    found = list(problems)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more
