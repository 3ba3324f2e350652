"""One evaluation: a built suite, a loaded model, a record of everything."""

import datetime
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..environment import describe_versions
from ..errors import EvaluationError
from .journal import Journal, hash_request, is_drawn
from .models import LoadedModel
from .records import EntryResult, Execution, NoiseFloor, Record, SampleFile, StoredRecord, write_record
from .records.record import hash_json
from .scoring import ScoredTask, score_task, summarise
from .tasks import BuiltSuite

_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class RunFacts:
    """What a record says of a run that the model and the suite do not.

    Attributes:
        command: The words that make it again.
        seed: Of torch, where a task draws answers at random.
        noise_floor: As `measure_noise_floor` found it.
    """

    command: Sequence[str]
    seed: int = 0
    noise_floor: NoiseFloor | None = None


def evaluate_suite(loaded: LoadedModel, built: BuiltSuite, folder: Path, facts: RunFacts) -> StoredRecord:
    """Ask every question of the suite, score the answers and write the record into `folder`.

    An interrupted run goes on where it stopped when called again: answers are kept as they come in, by model, dtype,
    kernels, batch size and prompt.

    Raises:
        EvaluationError: If a log-likelihood is not a number. No record is written; the answers before it are kept.
        OSError: If the folder cannot be written.
    """
    started_s = time.monotonic()
    with Journal(folder / _UNFINISHED, journal_key(loaded)) as journal:
        was_resumed = journal.num_found > 0
        answer_all(loaded.lm, built, journal)
        scored = [score_task(each) for each in built.tasks]
        samples = [sample for each in scored for sample in each.samples]
        record = Record(
            suite=built.suite.source,
            model=loaded.source,
            execution=complete_execution(loaded, built),
            entries=_summarise_entries(built, scored),
            samples=SampleFile("none", "", 0),
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=tuple(facts.command),
            seeds={"fewshot": built.suite.fewshot_seed, "torch": facts.seed},
            versions=describe_versions(),
            wall_s=round(time.monotonic() - started_s, 3),
            tokens=_count_tokens(loaded.lm),
            noise_floor=facts.noise_floor,
            resumed=was_resumed,
        )
        stored = write_record(folder, record, samples)
        journal.remove()
    return stored


def journal_key(loaded: LoadedModel) -> dict[str, Any]:
    """What makes answers comparable; equal keys share a journal."""
    return {"model": loaded.source.sha256, "execution": asdict(loaded.execution)}


def answer_all(lm: Any, built: BuiltSuite, journal: Journal) -> None:
    """Put an answer, or one for each repeat, into `resps` of every instance; what the journal has is not asked.

    Raises:
        EvaluationError: If a log-likelihood is NaN or infinite.
    """
    by_kind = defaultdict(list)
    for instance in built.requests:
        instance.resps = []
        by_kind["loglikelihood" if instance.request_type == "multiple_choice" else instance.request_type].append(
            instance
        )
    lm.set_cache_hook(_Watch(journal, by_kind))
    for kind, instances in by_kind.items():
        _answer(lm, kind, [each for each in instances for _ in range(each.repeats or 1)], journal)


def _answer(lm: Any, kind: str, instances: Sequence[Any], journal: Journal) -> None:
    open_ones = []
    for instance in instances:
        answer = None if is_drawn(instance.args) else journal.find(kind, instance.args)
        if answer is None:
            open_ones.append(instance)
        else:
            instance.resps.append(answer)
    answers = getattr(lm, kind)(open_ones) if open_ones else []
    for instance, answer in zip(open_ones, answers, strict=True):
        check_answer(kind, answer, instance)
        journal.add_partial(kind, instance.args, answer)
        instance.resps.append(answer)


def check_answer(kind: str, answer: Any, instance: Any) -> None:
    """Refuse an answer that is no number.

    Raises:
        EvaluationError: Naming the task and the document.
    """
    if kind == "generate_until":
        return
    number = answer[0] if isinstance(answer, tuple | list) else answer
    if not math.isfinite(number):
        raise EvaluationError(
            f"The log-likelihood of document {instance.doc_id} of {instance.task_name} is {number}: the model's logits "
            "are not finite; nothing was recorded. Half precision overflows with some models: try float32 or bfloat16."
        )


class _Watch:
    """What a model tells every answer to as soon as it has it: NaN stops the run then, and not hours later."""

    def __init__(self, journal: Journal, by_kind: Mapping[str, Iterable[Any]]) -> None:
        self._journal = journal
        self._instances = {
            hash_request(kind, instance.args): instance for kind, instances in by_kind.items() for instance in instances
        }

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        arguments = list(arguments)
        instance = self._instances.get(hash_request(kind, arguments))
        if instance is not None:
            check_answer(kind, answer, instance)
            self._journal.add_partial(kind, arguments, answer)


def _summarise_entries(built: BuiltSuite, scored: Sequence[ScoredTask]) -> tuple[EntryResult, ...]:
    by_entry = defaultdict(list)
    for each in scored:
        by_entry[each.built.entry.name].append(each)
    return tuple(
        summarise(name, tasks, main_metric=tasks[0].built.main_metric, limit=tasks[0].built.entry.limit)
        for name, tasks in by_entry.items()
    )


def complete_execution(loaded: LoadedModel, built: BuiltSuite) -> Execution:
    """The execution with what the suite adds: its system prompt and the chat template that it applies."""
    template = getattr(loaded.tokenizer, "chat_template", None) if built.suite.chat_template else None
    return replace(
        loaded.execution,
        chat_template_sha256=None if template is None else hash_json(template),
        system_prompt=built.suite.system_prompt,
    )


def _count_tokens(lm: Any) -> dict[str, int]:
    names = {"prompt": "num_prompt_tokens", "computed": "num_computed_tokens", "generated": "num_generated_tokens"}
    return {name: getattr(lm, attribute) for name, attribute in names.items() if hasattr(lm, attribute)}
