"""One evaluation: a built suite, a loaded model, a record of everything."""

import datetime
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..energy import EnergyMeter, EnergyReport
from ..environment import describe_versions
from ..errors import EvaluationError
from ..experts import describe_for_record
from .journal import Journal, hash_question, is_drawn
from .models import LoadedModel
from .records import EntryResult, Execution, NoiseFloor, Record, SampleFile, StoredRecord, write_record
from .records.record import hash_json
from .scoring import ScoredTask, score_task, summarise
from .task_files import hush_lm_eval
from .tasks import BuiltSuite

OnProgress = Callable[[int, int], None]

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


def evaluate_suite(
    loaded: LoadedModel,
    built: BuiltSuite,
    folder: Path,
    facts: RunFacts,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> StoredRecord:
    """Ask every question of the suite, score the answers and write the record into `folder`.

    An interrupted run goes on where it stopped when called again: answers are kept as they come in, by model, dtype,
    kernels, batch size and prompt. `on_progress` is told the requests that are answered and those there are in all.

    Raises:
        EvaluationError: If a log-likelihood is not a number. No record is written; the answers before it are kept.
        OSError: If the folder cannot be written.
    """
    started_s = time.monotonic()
    with Journal(folder / _UNFINISHED, journal_key(loaded)) as journal:
        was_resumed = journal.num_found > 0
        with EnergyMeter() as meter:
            answer_instances(loaded.lm, built.requests, journal, on_progress=on_progress)
            energy = meter.stop()
        tokens = _count_tokens(loaded.lm)
        tokenizer, max_length = loaded.tokenizer, loaded.execution.max_length
        scored = [score_task(each, tokenizer=tokenizer, max_length=max_length) for each in built.tasks]
        samples = [sample for each in scored for sample in each.samples]
        record = Record(
            suite=built.suite.source,
            model=loaded.source,
            execution=complete_execution(loaded, built),
            entries=summarise_entries(built, scored),
            samples=SampleFile("none", "", 0),
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=tuple(facts.command),
            seeds={"fewshot": built.suite.fewshot_seed, "torch": facts.seed},
            versions=describe_versions() | _describe_experts(loaded),
            wall_s=round(time.monotonic() - started_s, 3),
            tokens=tokens,
            energy=_describe_energy(energy, tokens, loaded),
            noise_floor=facts.noise_floor,
            resumed=was_resumed,
        )
        stored = write_record(folder, record, samples)
        journal.remove()
    return stored


def journal_key(loaded: LoadedModel) -> dict[str, Any]:
    """What makes answers comparable; equal keys share a journal."""
    execution = asdict(loaded.execution)
    del execution["reuses_prefix"]  # scores are the same with and without
    return {"model": loaded.source.sha256, "execution": execution | _describe_experts(loaded)}


def _describe_experts(loaded: LoadedModel) -> dict[str, str]:
    execution = loaded.execution
    if execution.experts is None or execution.device is None or execution.dtype is None:
        return {}
    return describe_for_record(execution.experts, execution.device, getattr(torch, execution.dtype))


def answer_instances(
    lm: Any,
    instances: Sequence[Any],
    journal: Journal | None = None,
    *,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Put an answer, or one for each repeat, into `resps` of every instance; what the journal has is not asked.

    Raises:
        EvaluationError: If a log-likelihood is NaN or infinite.
    """
    by_kind = defaultdict(list)
    for instance in instances:
        instance.resps = []
        by_kind[request_kind(instance)].append(instance)
    lm.set_cache_hook(_Watch(journal, by_kind, on_progress))
    with hush_lm_eval():
        for kind, asked in by_kind.items():
            _answer(lm, kind, [each for each in asked for _ in range(each.repeats or 1)], journal)


def request_kind(instance: Any) -> str:
    """The method of lm_eval's models that answers a request."""
    return "loglikelihood" if instance.request_type == "multiple_choice" else str(instance.request_type)


def _answer(lm: Any, kind: str, instances: Sequence[Any], journal: Journal | None) -> None:
    open_ones = []
    for instance in instances:
        answer = None if journal is None or is_drawn(instance.args) else journal.find(kind, instance.args)
        if answer is None:
            open_ones.append(instance)
        else:
            instance.resps.append(answer)
    answers = getattr(lm, kind)(open_ones) if open_ones else []
    for instance, answer in zip(open_ones, answers, strict=True):
        check_answer(kind, answer, instance)
        if journal is not None:
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

    def __init__(self, journal: Journal | None, by_kind: Mapping[str, Iterable[Any]], on_progress: OnProgress) -> None:
        self._journal, self._on_progress = journal, on_progress
        self._answered: set[str] = set()
        self._instances = {
            hash_question(kind, instance.args): instance
            for kind, instances in by_kind.items()
            for instance in instances
        }

    def add_partial(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        arguments = list(arguments)
        question = hash_question(kind, arguments)
        instance = self._instances.get(question)
        if instance is not None:
            check_answer(kind, answer, instance)
            self._answered.add(question)
            self._on_progress(len(self._answered), len(self._instances))
            if self._journal is not None:
                self._journal.add_partial(kind, arguments, answer)


def summarise_entries(built: BuiltSuite, scored: Sequence[ScoredTask]) -> tuple[EntryResult, ...]:
    """The results of all entries of the suite."""
    by_entry = defaultdict(list)
    for each in scored:
        by_entry[each.built.entry.name].append(each)
    return tuple(
        summarise(name, tasks, main_metric=tasks[0].built.main_metric, limit=tasks[0].built.entry.limit)
        for name, tasks in by_entry.items()
    )


def complete_execution(loaded: LoadedModel, built: BuiltSuite) -> Execution:
    """The execution with what the suite adds, its system prompt and chat template, and how prefixes fared so far."""
    is_here = built.suite.chat_template and loaded.execution.engine != "local-chat-completions"
    template = getattr(loaded.tokenizer, "chat_template", None) if is_here else None
    return replace(
        loaded.execution,
        reuses_prefix=getattr(loaded.lm, "reuse_reason", "an endpoint") is None,
        chat_template_sha256=None if template is None else hash_json(template),
        system_prompt=built.suite.system_prompt,
    )


def _describe_energy(energy: EnergyReport, tokens: Mapping[str, int], loaded: LoadedModel) -> dict[str, Any] | None:
    """None for an endpoint: the machine that answers is another one."""
    if loaded.request.endpoint is not None:
        return None
    num_tokens = tokens.get("computed", 0) + tokens.get("generated", 0)
    return replace(energy, tokens=num_tokens or None).to_dict()


def _count_tokens(lm: Any) -> dict[str, int]:
    names = {"prompt": "num_prompt_tokens", "computed": "num_computed_tokens", "generated": "num_generated_tokens"}
    return {name: getattr(lm, attribute) for name, attribute in names.items() if hasattr(lm, attribute)}
