"""Every request of a suite, built by lm_eval's own tasks and hashed, before and without any model."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ..errors import ConfigError, DatasetError
from .dataset_access import (
    LocalFiles,
    eval_split,
    explain_dataset_errors,
    explain_other_revision,
    find_local_files,
    hub_dataset,
    loaded_revision,
)
from .records.record import DatasetSource, TaskSource, hash_json
from .request_hashes import describe_config, hash_request, plain_json
from .suites import Suite, SuiteEntry
from .task_files import TaskFile, find_task_files, hush_lm_eval

_PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "bits_per_byte")


@dataclass(frozen=True)
class Document:
    """A document that is asked about: its place in the split, hash of its JSON, and what it belongs to."""

    index: int
    sha256: str
    group: str | None


@dataclass(frozen=True)
class TaskMetric:
    """One number of a task.

    Attributes:
        name: `metric`, or `metric,filter` where the filter is not "none".
        aggregation: lm_eval's name: mean, perplexity, bits_per_byte, weighted_perplexity, ... The last two are ratios.
    """

    name: str
    metric: str
    filter: str
    higher_is_better: bool
    aggregation: str

    @property
    def is_ratio(self) -> bool:
        """Whether documents give a numerator and a size rather than a score."""
        return self.aggregation in ("bits_per_byte", "weighted_perplexity")


@dataclass
class BuiltTask:
    """A task of lm_eval with its requests."""

    entry: SuiteEntry
    task: Any
    source: TaskSource
    documents: tuple[Document, ...]
    metrics: tuple[TaskMetric, ...]

    @property
    def name(self) -> str:
        """lm_eval's name of the task."""
        return self.source.name

    @property
    def instances(self) -> list[Any]:
        """lm_eval's requests, in order of documents."""
        return list(self.task.instances)

    def instances_by_document(self) -> list[list[Any]]:
        """The requests of each document, in the order of `documents`."""
        found: dict[int, list[Any]] = {document.index: [] for document in self.documents}
        for instance in self.task.instances:
            found[instance.doc_id].append(instance)
        return [sorted(instances, key=lambda instance: instance.idx) for instances in found.values()]

    @property
    def main_metric(self) -> str:
        """The suite's, else the first that the task has of acc_norm, acc, exact_match and bits per byte."""
        if self.entry.main_metric:
            return self.entry.main_metric
        ranked = sorted(
            self.metrics, key=lambda each: [*_PREFERRED_METRICS, each.metric].index(each.metric)
        )  # sorted is stable: the first filter of a task wins
        return ranked[0].name


@dataclass
class BuiltSuite:
    """A suite with all its requests."""

    suite: Suite
    tasks: tuple[BuiltTask, ...]

    @property
    def requests(self) -> list[Any]:
        """Every request, in the order of tasks and documents."""
        return [instance for task in self.tasks for instance in task.instances]

    def tasks_of(self, entry: str) -> tuple[BuiltTask, ...]:
        """The tasks of one entry, by its name."""
        return tuple(task for task in self.tasks if task.entry.name == entry)


def build_suite(
    suite: Suite,
    *,
    tokenizer: Any = None,
    data_dir: Path | None = None,
    run_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> BuiltSuite:
    """Load the datasets of `suite` and build every request, just as `lm_eval.simple_evaluate` would.

    Args:
        tokenizer: Writes the chat template, where the suite wants one; a tokenizer or an LM of lm_eval.
        data_dir: A folder with files in place of Hub datasets, as `find_local_files` describes.
        run_code: Allow tasks that run the code that a model writes, and the fetching of their metric.
        say: Hears what is being read, and revisions that the suite does not pin.

    Raises:
        ConfigError: If a task is not there, needs what is not allowed, or the tokenizer lacks a chat template.
        DatasetError: If a dataset is gated, script-only, missing, unreachable, empty, or not in `data_dir`.
        MissingExtraError: If lm_eval is not installed.
    """
    files = [(entry, file) for entry in suite.entries for file in find_task_files(suite, entry)]
    for _, file in files:
        file.check(run_code=run_code)
    local = find_suite_files(suite, files, data_dir=data_dir)
    chat = _chat_function(suite, tokenizer)
    built: list[BuiltTask] = []
    for entry in suite.entries:
        own = [file for each, file in files if each is entry]
        say(f"Reading {entry.name}" + (f", {len(own)} tasks" if len(own) > 1 else ""))
        tasks = [_build_task(suite, entry, file, local=local.get(file.name), chat=chat) for file in own]
        for revision in dict.fromkeys(_tell_revision(entry, task.source.dataset) for task in tasks):
            if revision:
                say(revision)
        built += tasks
    return BuiltSuite(suite, tuple(built))


def find_suite_files(
    suite: Suite, files: Sequence[tuple[SuiteEntry, TaskFile]], *, data_dir: Path | None
) -> dict[str, LocalFiles]:
    """The user's files by task; tasks that have none there are read from the Hub, or make their documents themselves.

    Raises:
        DatasetError: If `data_dir` is no folder or has nothing for any task that reads documents, or a task needs it
            and has nothing there.
    """
    if data_dir is not None and not data_dir.is_dir():
        raise DatasetError(f"The data folder {data_dir} does not exist.")
    found = {} if data_dir is None else {file.name: find_local_files(data_dir, file.settings) for _, file in files}
    local = {name: each for name, each in found.items() if each is not None}
    lacking = [file for entry, file in files if entry.needs_data_dir and file.name not in local]
    reading = [file for _, file in files if not file.settings.get("custom_dataset")]
    if lacking or (data_dir is not None and reading and not local):
        unread = lacking or reading
        wanted = sorted({str(file.settings.get("dataset_path")).rpartition("/")[2] for file in unread})
        raise DatasetError(
            f"The suite {suite.name} reads its documents from a data folder with {' or '.join(wanted)}/ in it; "
            + (f"{data_dir} has none." if data_dir else "give one by --data-dir.")
        )
    return local


def _build_task(
    suite: Suite, entry: SuiteEntry, file: TaskFile, *, local: LocalFiles | None, chat: Callable[..., str] | None
) -> BuiltTask:
    num_fewshot = _choose_num_fewshot(file.settings, entry)
    config = _configure(file, entry, local=local, num_fewshot=num_fewshot)
    with hush_lm_eval(), _seeded():
        task = _load_task(file, config)
        task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=suite.fewshot_seed)
        with _explain_fewshot(file, num_fewshot):
            task.build_all_requests(
                limit=entry.limit,
                system_instruction=suite.system_prompt,
                apply_chat_template=chat is not None,
                fewshot_as_multiturn=suite.fewshot_as_multiturn,
                chat_template=chat,
            )
        rows = [hash_json(plain_json(row)) for row in task.task_docs]
    source = _describe_task(suite, file, task, rows=rows, local=local)
    metrics = _find_metrics(task)
    _check_main_metric(entry, file, metrics)
    return BuiltTask(entry, task, source, _find_documents(entry, task), metrics)


def _configure(file: TaskFile, entry: SuiteEntry, *, local: LocalFiles | None, num_fewshot: int) -> dict[str, Any]:
    """The task's settings, with its documents at the pinned revision or in the user's files."""
    config = deepcopy({key: value for key, value in file.read().items() if key not in ("group", "tag", "task_list")})
    kwargs = dict(config.get("dataset_kwargs") or {})
    if local is not None:
        config |= {"dataset_path": local.builder, "dataset_name": None}
        kwargs = {"data_files": dict(local.paths)} | ({"sample_by": "document"} if local.builder == "text" else {})
        config |= _drop_lacking_splits(file, config, local, num_fewshot=num_fewshot)
    elif (path := hub_dataset(config)) in entry.datasets:
        kwargs["revision"] = entry.datasets[str(path)]
    config["dataset_kwargs"] = kwargs or None
    return config


def _drop_lacking_splits(
    file: TaskFile, config: Mapping[str, Any], local: LocalFiles, *, num_fewshot: int
) -> dict[str, None]:
    lacking = [
        key
        for key in ("training_split", "validation_split", "fewshot_split")
        if config.get(key) and config[key] not in local.paths
    ]
    has_own_examples = "samples" in (config.get("fewshot_config") or {})
    is_drawn_from = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    if num_fewshot and not has_own_examples and is_drawn_from and is_drawn_from not in local.paths:
        raise DatasetError(
            f"{file.name} takes its {num_fewshot} examples from the split {is_drawn_from!r}, which lies not beside "
            f"{next(iter(local.names.values()))}: add {is_drawn_from}.jsonl, or ask without examples (num_fewshot 0)."
        )
    return dict.fromkeys(lacking)


def _choose_num_fewshot(settings: Mapping[str, Any], entry: SuiteEntry) -> int:
    own = settings.get("num_fewshot")
    if settings.get("output_type") == "loglikelihood_rolling" or own == 0:
        return 0
    return int((own or 0) if entry.num_fewshot is None else entry.num_fewshot)


def _load_task(file: TaskFile, config: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    path = str(config.get("dataset_path") or file.name)
    with explain_dataset_errors(path):
        try:
            loaded = TaskManager(include_defaults=False).load([config])
        except (IndexError, StopIteration) as error:  # lm_eval tries the task's templates on the first document
            raise DatasetError(f"{file.name} has no documents in the split {eval_split(config)!r}.") from error
        except KeyError as error:
            raise DatasetError(f"{path} has no split or column {error} that {file.name} asks for.") from error
    task = loaded["tasks"][file.name]
    pinned = (config["dataset_kwargs"] or {}).get("revision")
    other = explain_other_revision(path, revision=loaded_revision(task.dataset, eval_split(config)), pinned=pinned)
    if other:
        raise DatasetError(other)
    return task


def _describe_task(
    suite: Suite, file: TaskFile, task: Any, *, rows: Sequence[str], local: LocalFiles | None
) -> TaskSource:
    num_fewshot = int(task.config.num_fewshot)
    return TaskSource(
        name=file.name,
        output_type=str(task.OUTPUT_TYPE),
        dataset=_describe_dataset(file, task, rows=rows, local=local),
        config_sha256=hash_json(describe_config(task)),
        prompts_sha256=hash_json([hash_request(instance) for instance in task.instances]),
        num_documents=len({instance.doc_id for instance in task.instances}),
        version=str(task.VERSION),
        file_sha256=file.sha256,
        num_fewshot=num_fewshot,
        fewshot_seed=suite.fewshot_seed if num_fewshot else None,
        generation=plain_json(task.config.generation_kwargs or {}),
    )


def _describe_dataset(file: TaskFile, task: Any, *, rows: Sequence[str], local: LocalFiles | None) -> DatasetSource:
    split = eval_split(file.settings)
    source = DatasetSource(
        path=local.names[split] if local else str(file.settings.get("dataset_path") or file.name),
        split=split,
        num_rows=len(rows),
        rows_sha256=hash_json(list(rows)),
    )
    if local:
        return source
    name = file.settings.get("dataset_name")
    revision = loaded_revision(task.dataset, split)
    return replace(source, name=None if name is None else str(name), revision=revision)


def _find_documents(entry: SuiteEntry, task: Any) -> tuple[Document, ...]:
    rows = {instance.doc_id: instance.doc for instance in task.instances}
    if entry.group_column and entry.group_column not in next(iter(rows.values())):
        raise ConfigError(
            f"{entry.name} has no column {entry.group_column!r} to group documents by; "
            f"{task.config.task} has {', '.join(next(iter(rows.values())))}."
        )
    return tuple(
        Document(index, hash_json(plain_json(row)), _group_of(entry, task, row)) for index, row in rows.items()
    )


def _group_of(entry: SuiteEntry, task: Any, row: Mapping[str, Any]) -> str | None:
    if entry.group_column:
        return str(row[entry.group_column])
    return str(task.config.task) if [task.config.task] != list(entry.tasks) else None


def _find_metrics(task: Any) -> tuple[TaskMetric, ...]:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    aggregations, higher = task.aggregation(), task.higher_is_better()
    return tuple(
        TaskMetric(
            name=metric if pipeline.name == "none" else f"{metric},{pipeline.name}",
            metric=metric,
            filter=pipeline.name,
            higher_is_better=bool(higher.get(metric, True)),
            aggregation=names.get(aggregation, getattr(aggregation, "__name__", "custom")),
        )
        for pipeline in task._filters
        for metric, aggregation in aggregations.items()
    )


def _check_main_metric(entry: SuiteEntry, file: TaskFile, metrics: Sequence[TaskMetric]) -> None:
    known = [metric.name for metric in metrics]
    if entry.main_metric and entry.main_metric not in known and not entry.runs_code:
        raise ConfigError(
            f"{file.name} has no metric {entry.main_metric!r} for {entry.name}; it has {', '.join(known)}."
        )


def _chat_function(suite: Suite, tokenizer: Any) -> Callable[..., str] | None:
    """lm_eval's own way to write a chat, for a plain tokenizer as for a model."""
    if not suite.chat_template:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"The suite {suite.name} writes prompts with a chat template and needs the model's tokenizer."
        )
    from lm_eval.api.model import LM

    if isinstance(tokenizer, LM):
        return cast(Callable[..., str], tokenizer.apply_chat_template)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"The suite {suite.name} writes prompts with a chat template, and this tokenizer has none; use a suite "
            "without, or a tokenizer with one."
        )
    from lm_eval.models.huggingface import HFLM

    return partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=tokenizer, chat_template_args={}))


@contextmanager
def _seeded() -> Iterator[None]:
    """The generators that lm_eval seeds before it loads tasks, seeded alike inside and as before outside."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _explain_fewshot(file: TaskFile, num_fewshot: int) -> Iterator[None]:
    try:
        yield
    except (AssertionError, ValueError) as error:
        if "no documents available for sampling" in str(error) or "fewshot samples" in str(error):
            raise DatasetError(f"{file.name} has too few examples to put {num_fewshot} into a prompt.") from error
        if "Sample larger than population" in str(error):
            raise DatasetError(f"{file.name} has too few examples to put {num_fewshot} into a prompt.") from error
        raise


def _tell_revision(entry: SuiteEntry, dataset: DatasetSource) -> str | None:
    if not dataset.revision or dataset.path in entry.datasets:
        return None
    return f"{dataset.path} is not pinned by this suite; resolved at run time to {dataset.revision}"
