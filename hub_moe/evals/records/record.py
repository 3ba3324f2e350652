"""What one evaluation run was, in full: enough for a stranger to repeat it, and to notice where they cannot."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from ...errors import ConfigError, EvaluationError
from ...files.tables import read_table

FORMAT_VERSION = 1

ModelKind = Literal["checkpoint", "expert_patch", "adapter", "endpoint"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from and what exactly it was.

    Attributes:
        name: What people call it: the repo's id, or the last part of a folder's path.
        kind: What `files` hold. An `endpoint` has no files: what it serves is its operator's word.
        repo: Id of the Hub repo; None for a folder.
        revision: Commit sha in `repo`; None for a folder.
        requested_revision: What was asked for, such as `main` or `refs/pr/3`.
        files: sha256 by name of every file that makes the model what it is: weights, config, tokenizer, template.
        base: The model below an expert patch or adapter.
    """

    name: str
    kind: ModelKind
    repo: str | None = None
    revision: str | None = None
    requested_revision: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    base: "ModelSource | None" = None

    @property
    def sha256(self) -> str:
        """One hash over all files and those of the base: two models are the same if this is."""
        lines = [f"{name} {sha256}\n" for name, sha256 in sorted(self.files.items())]
        inner = [self.base.sha256] if self.base else []
        outer = [self.name] if self.kind == "endpoint" else []
        return hashlib.sha256("".join([self.kind, "\n", *lines, *inner, *outer]).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.name} at {self.revision[:12]}" if self.revision else self.name


@dataclass(frozen=True)
class Execution:
    """How the model was run. Another dtype, kernel or batch size rounds differently, and can flip an answer.

    Attributes:
        engine: "hub_moe", or the name that lm_eval has for it.
        attention: transformers' `_attn_implementation`; None where the model does not tell.
        experts: transformers' `_experts_implementation`; None where the model has none.
        batch_size: Sequences at once.
        device: As torch prints it, with the name of a GPU: `cuda:0 (NVIDIA H200)`.
        reuses_prefix: Whether shared beginnings of prompts were computed once.
        chat_template_sha256: Of the template that was applied; None where prompts are plain text.
    """

    engine: str
    dtype: str | None = None
    attention: str | None = None
    experts: str | None = None
    batch_size: int = 1
    max_length: int | None = None
    device: str | None = None
    num_threads: int | None = None
    reuses_prefix: bool = False
    chat_template_sha256: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True)
class DatasetSource:
    """The rows that were asked about. `rows_sha256` is over the documents in order, as the task saw them."""

    path: str
    split: str
    num_rows: int
    rows_sha256: str
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class TaskSource:
    """One task of lm_eval as it was run.

    Attributes:
        version: The task's own, from its `metadata`.
        file_sha256: Of its YAML and every file that this includes; None where lm_eval does not tell.
        config_sha256: Of the whole resolved configuration: templates, filters, metrics, generation settings, few-shot.
        prompts_sha256: Over the hashes of every request in order, choices and generation settings among them.
        num_documents: After the limit.
    """

    name: str
    output_type: str
    dataset: DatasetSource
    config_sha256: str
    prompts_sha256: str
    num_documents: int
    version: str | None = None
    file_sha256: str | None = None
    num_fewshot: int = 0
    fewshot_seed: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One number with its uncertainty.

    Attributes:
        name: lm_eval's name for it, with the filter where it is not "none": `exact_match,flexible-extract`.
        standard_error: None where this number of documents cannot tell, as with one.
        num_clusters: Groups of documents where the suite names a group column; else the number of documents.
    """

    name: str
    value: float
    higher_is_better: bool
    num_documents: int
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    num_clusters: int | None = None


@dataclass(frozen=True)
class EntryResult:
    """One line of a suite: a task, or several that count as one, such as the subjects of MMLU.

    Attributes:
        name: Of the entry in the suite.
        main_metric: The one that stands for the entry in tables and comparisons.
        limit: Documents per task, where the suite or the user set a limit.
        num_unparsable: Answers in which the task found nothing to score. They count as wrong in the metrics, and are
            shown beside them.
        num_truncated: Documents whose prompt was too long for the model and lost its beginning.
    """

    name: str
    tasks: tuple[TaskSource, ...]
    metrics: tuple[Metric, ...]
    main_metric: str
    limit: int | None = None
    num_unparsable: int = 0
    num_truncated: int = 0

    @property
    def main(self) -> Metric:
        """The metric that stands for the entry."""
        return next(metric for metric in self.metrics if metric.name == self.main_metric)


@dataclass(frozen=True)
class SuiteSource:
    """The suite's name, its declaration with the user's changes, and the sha256 of that.

    Raises:
        EvaluationError: If the declaration has another hash.
    """

    name: str
    sha256: str
    declaration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.declaration and _hash_read(self.declaration) != self.sha256:
            raise EvaluationError(f"The declaration of the suite {self.name} does not have the sha256 {self.sha256}.")


@dataclass(frozen=True)
class SampleFile:
    """The table of every answer beside the record.

    Raises:
        ConfigError: If `name` would lead out of the record's folder.
    """

    name: str
    sha256: str
    num_rows: int

    def __post_init__(self) -> None:
        is_plain = self.name.isprintable() and set(self.name).isdisjoint("/\\:")
        if not self.name or self.name.startswith(".") or not is_plain:
            raise ConfigError(f"{self.name!r} is no name of a table of samples beside a record.")


@dataclass(frozen=True)
class NoiseFloor:
    """What rounding alone does to the answers of this model on a probe set.

    Attributes:
        num_documents: Of the probe set.
        variations: For each other way of running ("batch size 1", "experts eager"): `flips`, the number of documents
            with another answer, and `max_difference`, the largest difference of a log-likelihood in nats.
    """

    num_documents: int
    variations: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Record:
    """The evidence of one run; `id` is the sha256 of everything else.

    Attributes:
        created: UTC, ISO 8601 with seconds.
        command: The words of the command that makes it again.
        seeds: By what they seed: `fewshot`, `torch`, ...
        versions: Of Python and every package that takes part.
        tokens: `prompt` as the tasks need them, `computed` as the model really ran, `generated`.
        energy: As `hub_moe.energy` describes it; None where nothing was metered.
        resumed: Whether answers of an earlier, interrupted run of the same key went in.
    """

    suite: SuiteSource
    model: ModelSource
    execution: Execution
    entries: tuple[EntryResult, ...]
    samples: SampleFile
    created: str
    command: tuple[str, ...]
    seeds: Mapping[str, int]
    versions: Mapping[str, str]
    wall_s: float
    tokens: Mapping[str, int]
    energy: Mapping[str, Any] | None = None
    noise_floor: NoiseFloor | None = None
    resumed: bool = False
    format_version: int = FORMAT_VERSION

    @cached_property
    def id(self) -> str:
        """sha256 over the canonical JSON of all fields."""
        return hash_json(self._plain())

    def entry(self, name: str) -> EntryResult:
        """The result of one entry of the suite.

        Raises:
            EvaluationError: If there is none of this name.
        """
        for each in self.entries:
            if each.name == name:
                return each
        raise EvaluationError(f"The record has no entry {name!r}; it has {', '.join(e.name for e in self.entries)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, `id` first."""
        return {"id": self.id, **self._plain()}

    def _plain(self) -> dict[str, Any]:
        """What reading it back gives, so that a 3 where a number is meant has the hash of a 3.0."""
        return asdict(read_table(type(self), asdict(self), where="The record"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "The record") -> Self:
        """A record from its JSON.

        Raises:
            ConfigError: If a field is missing, unknown or of another type, or the format is of a later version.
            EvaluationError: If the content does not have the hash that `id` claims: it was edited; or if it holds what
                no record can, such as NaN.
        """
        fields = dict(data)
        claimed = fields.pop("id", None)
        if fields.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"{where} is of format version {fields.get('format_version')!r}; this hub_moe reads {FORMAT_VERSION}."
            )
        try:
            record: Self = read_table(cls, fields, where=where)
            found = _hash_read(record._plain())
        except RecursionError as error:
            raise EvaluationError(f"{where} is nested too deep to be a record.") from error
        if claimed != found:
            raise EvaluationError(f"{where} was edited: its content has the hash {found}, but its id is {claimed}.")
        return record


def canonical_json(data: Any) -> str:
    """JSON in one way only: sorted keys, no spaces, no NaN."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(data: Any) -> str:
    """sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def _hash_read(data: Any) -> str:
    """The same of what was read from a stranger's file: numbers that are not finite, broken text."""
    try:
        return hash_json(data)
    except ValueError as error:
        raise EvaluationError(f"A record holds finite numbers and whole characters only: {error}.") from error
