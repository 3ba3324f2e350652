"""What would keep a suite from running, and what it can show, told before a model is loaded."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from .dataset_access import DatasetState, classify_error, eval_split, explain_other_revision, explain_state, hub_dataset
from .statistics import plan_detectable_difference
from .suites import Suite, SuiteEntry
from .task_files import TaskFile, find_task_files, hush_lm_eval
from .tasks import BuiltSuite, BuiltTask, build_suite, find_suite_files

_COMMIT = re.compile("[0-9a-f]{40}")
_PROBED_REQUESTS = 200
_DEFAULT_GENERATED_TOKENS = 256  # lm_eval's, where a task sets none


@dataclass(frozen=True)
class DatasetCheck:
    """Whether a dataset can be read.

    Attributes:
        path: The Hub dataset, the user's file, or the task whose documents are made here.
        pinned: The commit that the suite names; None where it names none.
        revision: The commit that would be read; None where that is not known.
        problem: The sentence for people where `state` keeps the suite from running.
    """

    path: str
    state: DatasetState
    entries: tuple[str, ...]
    pinned: str | None = None
    revision: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class EntryCheck:
    """What an entry costs and can show.

    Attributes:
        prompt_tokens: About so many, counted on a sample of the requests; None without a tokenizer.
        generated_tokens: At most so many.
        num_groups: Documents that belong together count as one group; None where each stands alone.
        detectable_difference: The smallest difference of accuracy between a model and its fine-tune that is found 4
            times in 5, each document standing alone. None for other metrics: bits per byte have no such plan.
        detectable_difference_of_suite: The same where all entries are tested together (Bonferroni; Holm does no worse).
    """

    name: str
    main_metric: str
    num_documents: int
    num_requests: int
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    num_groups: int | None = None
    detectable_difference: float | None = None
    detectable_difference_of_suite: float | None = None


@dataclass(frozen=True)
class Preflight:
    """All checks of a suite; `entries` is empty and `built` None where a dataset is in the way."""

    suite: str
    datasets: tuple[DatasetCheck, ...]
    entries: tuple[EntryCheck, ...] = ()
    tokens_per_s: float | None = None
    built: BuiltSuite | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each dataset that is in the way."""
        return tuple(check.problem for check in self.datasets if check.problem)

    @property
    def num_requests(self) -> int:
        """Of all entries."""
        return sum(entry.num_requests for entry in self.entries)

    @property
    def expected_s(self) -> float | None:
        """Seconds to read the prompts at `tokens_per_s`; None where the speed or the tokens are not known."""
        tokens = [entry.prompt_tokens for entry in self.entries]
        known = [count for count in tokens if count is not None]
        if not self.tokens_per_s or not known or len(known) < len(tokens):
            return None
        return sum(known) / self.tokens_per_s

    def raise_if_blocked(self) -> None:
        """Raises DatasetError with every problem, if there is one."""
        if self.problems:
            raise DatasetError(" ".join(self.problems))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "suite": self.suite,
            "datasets": [asdict(check) for check in self.datasets],
            "entries": [asdict(check) for check in self.entries],
            "num_requests": self.num_requests if self.entries else None,
            "tokens_per_s": self.tokens_per_s,
            "expected_s": self.expected_s,
            "problems": list(self.problems),
        }

    def to_lines(self) -> list[str]:
        """For people: a line for each dataset and entry, and what is not known."""
        lines = [_dataset_line(check) for check in self.datasets]
        lines += [_entry_line(check) for check in self.entries]
        if self.entries:
            expected = self.expected_s
            time = "not known before the model runs" if expected is None else f"about {expected:.0f} s for the prompts"
            lines.append(f"{self.num_requests} requests; expected time: {time}")
        return lines


def check_suite(
    suite: Suite,
    *,
    tokenizer: Any = None,
    data_dir: Path | None = None,
    tokens_per_s: float | None = None,
    run_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Preflight:
    """Look at every dataset, then build every request where nothing is in the way; loads no model.

    The result's `built` is the suite as `build_suite` gives it. `raise_if_blocked` stops where a dataset cannot be
    read.

    Raises:
        ConfigError: If a task is not there, needs what is not allowed, or the tokenizer lacks a chat template.
        DatasetError: If `data_dir` lacks a file, or a dataset that could be reached cannot be read after all.
        MissingExtraError: If lm_eval is not installed.
    """
    files = [(entry, file) for entry in suite.entries for file in find_task_files(suite, entry)]
    for _, file in files:
        file.check(run_code=run_code)
    datasets = _check_datasets(suite, files, data_dir)
    if any(check.problem for check in datasets):
        return Preflight(suite.name, datasets, tokens_per_s=tokens_per_s)
    built = build_suite(suite, tokenizer=tokenizer, data_dir=data_dir, run_code=run_code, say=say)
    entries = tuple(_check_entry(built, entry, tokenizer) for entry in suite.entries)
    return Preflight(suite.name, datasets, entries, tokens_per_s, built)


def _check_datasets(
    suite: Suite, files: Sequence[tuple[SuiteEntry, TaskFile]], data_dir: Path | None
) -> tuple[DatasetCheck, ...]:
    local = find_suite_files(suite, files, data_dir=data_dir)
    checks: dict[str, DatasetCheck] = {}
    for entry, file in files:
        path = hub_dataset(file.settings)
        if file.name in local:
            check = DatasetCheck(local[file.name].names[eval_split(file.settings)], "local files", (entry.name,))
        elif path is None:
            check = DatasetCheck(str(file.settings.get("dataset_path") or file.name), "made here", (entry.name,))
        elif path in checks:  # one look at a dataset, whatever the number of its configurations
            check = checks[path]
        else:
            check = _probe(path, file.settings.get("dataset_name"), entry.datasets.get(path), entry.name)
        names = dict.fromkeys([*(checks[check.path].entries if check.path in checks else ()), entry.name])
        checks[check.path] = _with_entries(check, tuple(names))
    return tuple(checks.values())


def _with_entries(check: DatasetCheck, entries: tuple[str, ...]) -> DatasetCheck:
    return DatasetCheck(**{**asdict(check), "entries": entries})


def _probe(path: str, name: str | None, pinned: str | None, entry: str) -> DatasetCheck:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        with hush_lm_eval():
            builder = load_dataset_builder(path, name=name, revision=pinned)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        kind = classify_error(error)
        if kind is None:
            raise
        return DatasetCheck(path, kind, (entry,), pinned, problem=explain_state(kind, path, error))
    is_cached = type(builder).__module__.startswith("datasets.packaged_modules.cache")
    revision = builder.hash if builder.hash and _COMMIT.fullmatch(builder.hash) else None
    other = explain_other_revision(path, revision=revision, pinned=pinned)
    state: DatasetState = "unreachable" if other else "cached" if is_cached else "reachable"
    return DatasetCheck(path, state, (entry,), pinned, revision, problem=other)


def _check_entry(built: BuiltSuite, entry: SuiteEntry, tokenizer: Any) -> EntryCheck:
    tasks = built.tasks_of(entry.name)
    documents = [document for task in tasks for document in task.documents]
    groups = {document.group for document in documents}
    main = tasks[0].main_metric
    is_accuracy = all(metric.aggregation == "mean" for task in tasks for metric in task.metrics if metric.name == main)
    return EntryCheck(
        entry.name,
        main,
        num_documents=len(documents),
        num_requests=sum(len(task.instances) for task in tasks),
        prompt_tokens=_count_tokens(tasks, tokenizer),
        generated_tokens=sum(_count_generated(task) for task in tasks),
        num_groups=None if groups == {None} else len(groups),
        detectable_difference=_plan(len(documents), 1) if is_accuracy else None,
        detectable_difference_of_suite=_plan(len(documents), len(built.suite.entries)) if is_accuracy else None,
    )


def _plan(num_documents: int, num_tests: int) -> float | None:
    return None if num_documents < 2 else plan_detectable_difference(num_documents, alpha=0.05 / num_tests)


def _count_tokens(tasks: Sequence[BuiltTask], tokenizer: Any) -> int | None:
    """Of all prompts, from a sample of each task; None where no tokenizer is at hand, as with an endpoint."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(tokenizer):
        return None
    return sum(_count_task_tokens(task, tokenizer) for task in tasks)


def _count_task_tokens(task: BuiltTask, tokenizer: Any) -> int:
    instances = task.instances
    probed = instances[:: max(1, len(instances) // _PROBED_REQUESTS)]
    texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in probed]
    counted = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    return round(counted * len(instances) / len(probed))


def _count_generated(task: BuiltTask) -> int:
    if task.source.output_type != "generate_until":
        return 0
    return len(task.instances) * int(task.source.generation.get("max_gen_toks", _DEFAULT_GENERATED_TOKENS))


def _dataset_line(check: DatasetCheck) -> str:
    if check.problem:
        return check.problem
    if check.state in ("made here", "local files"):
        return f"{check.path}: {check.state}"
    pin = "pinned" if check.pinned else "not pinned by this suite"
    return f"{check.path}: {check.state}, {pin}, {check.revision or check.pinned or 'commit not known'}"


def _entry_line(check: EntryCheck) -> str:
    line = f"{check.name}: {check.num_documents} documents, {check.num_requests} requests"
    if check.prompt_tokens is not None:
        line += f", about {check.prompt_tokens} tokens"
    if check.generated_tokens:
        line += f", at most {check.generated_tokens} generated"
    if check.detectable_difference is None:
        return f"{line}; the smallest difference it can show in {check.main_metric} is not known before a run"
    if check.detectable_difference >= 1:
        return f"{line}; too few documents to count on showing any difference in {check.main_metric}"
    return f"{line}; can show a difference of {100 * check.detectable_difference:.1f} points in {check.main_metric}"
