"""A training run as a TOML file: every setting, its default and the values it may have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..data import DataSource
from ..errors import ConfigError
from ..files.tables import check_keys, read_table, read_toml, write_toml
from .method_config import FullMethod, Method, PretrainMethod, read_method


@dataclass(frozen=True)
class ModelConfig:
    """[model]: the base, or for `pretrain` the architecture.

    Args:
        name: Hub id or folder.
        revision: Branch, tag or commit of a Hub id.
        tokenizer: Hub id or folder of the tokenizer, where it is not with the model.
        dtype: In which trained weights are kept: small steps on bfloat16 are rounded away. "stored" leaves them as
            they are stored; what is written is in the stored one again.
        preset: For `pretrain`: a size of hub_moe, in place of `name`.
        overrides: For `pretrain`: fields of the config that differ.
        learn_vocab_size: For `pretrain`: learn a tokenizer of this size from the training text.
    """

    name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "stored"] = "float32"
    preset: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    learn_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.preset is None):
            raise ConfigError("[model] needs either name (a Hub id or folder) or, to pretrain, preset.")
        if self.revision is not None and self.name is None:
            raise ConfigError("[model] has a revision and no name that it belongs to.")
        if self.tokenizer is not None and self.learn_vocab_size is not None:
            raise ConfigError("[model] has both tokenizer and learn_vocab_size; keep one.")
        if self.learn_vocab_size is not None and self.learn_vocab_size < 258:
            raise ConfigError(f"[model] learn_vocab_size is {self.learn_vocab_size}; 256 bytes and 2 marks need 258.")


@dataclass(frozen=True)
class DataConfig:
    """[data]: the text, and how rows become what the model sees.

    Args:
        rows: Where the rows are and how they are read; its keys stand in [data] itself.
        max_length: Tokens of a row at most.
        packing: Whether short documents share a row; attention stays within each.
        chat_template: "plain" or a Jinja file, in place of the tokenizer's own; it is saved with the tokenizer.
        held_out: Share of the rows that is never trained on.
        allow_bad_rows: Share of the rows that may be left out because they do not fit.
        evaluation: Rows of an evaluation; what they share with the training rows is reported.
    """

    rows: DataSource = field(metadata={"flat": True})
    max_length: int = 512
    packing: bool = True
    chat_template: str | None = None
    held_out: float = 0.05
    allow_bad_rows: float = 0.0
    evaluation: DataSource | None = None

    def __post_init__(self) -> None:
        _check(self.max_length >= 2, "[data]", "max_length", self.max_length, "at least 2")
        _check(0 < self.held_out < 1, "[data]", "held_out", self.held_out, "a share between 0 and 1")
        _check(0 <= self.allow_bad_rows < 1, "[data]", "allow_bad_rows", self.allow_bad_rows, "a share below 1")


@dataclass(frozen=True)
class TrainingConfig:
    """[training]: how long, how fast.

    Args:
        learning_rate: Peak.
        steps: Optimizer steps; or
        epochs: Passes over the training rows.
        batch_size: Rows per optimizer step, over all processes.
        micro_batch_size: Rows that one process holds at a time; the rest is gradient accumulation. None is all, of
            packed rows as many as make 2048 tokens.
        warmup: Share of the steps in which the learning rate rises.
        evaluations: How often the held-out loss is taken while training; also before and after it.
        evaluation_rows: Held-out rows that it is taken on at most, evenly spread.
        checkpoints: How often a checkpoint is written.
        precision: Arithmetic: that of the weights, or bfloat16 (autocast) over weights as they are.
        fsdp_size: Processes among which weights, gradients and optimizer state are shared out (FSDP2), for the
            methods full and pretrain; they have to be started by torchrun. A multiple of it
            holds the model several times.
        ep_size: Processes among which the experts of a layer are shared out (expert parallelism); divides `fsdp_size`.
        num_threads: Of torch; None leaves torch's own number.
        energy: Meter the machine's energy (codecarbon).
        report_to: Trackers of transformers' Trainer: wandb, trackio, tensorboard.
    """

    learning_rate: float
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: Literal["weights", "bfloat16"] = "weights"
    evaluations: int = 10
    evaluation_rows: int = 500
    checkpoints: int = 4
    seed: int = 0
    fsdp_size: int = 1
    ep_size: int = 1
    num_threads: int | None = None
    energy: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            both = "has both steps and epochs" if self.steps is not None else "has neither steps nor epochs"
            raise ConfigError(f"[training] {both}; set one of them.")
        for key in (
            "learning_rate",
            "steps",
            "epochs",
            "batch_size",
            "micro_batch_size",
            "num_threads",
            "evaluation_rows",
            "fsdp_size",
            "ep_size",
        ):
            value = getattr(self, key)
            _check(value is None or 0 < value < math.inf, "[training]", key, value, "a number above 0")
        for key in ("weight_decay", "max_grad_norm", "evaluations", "checkpoints", "seed"):
            _check(0 <= getattr(self, key) < math.inf, "[training]", key, getattr(self, key), "a number from 0 on")
        _check(self.seed < 2**32, "[training]", "seed", self.seed, "a number below 2**32")
        _check((self.num_threads or 1) <= 4096, "[training]", "num_threads", self.num_threads, "at most 4096")
        _check(0 <= self.warmup < 1, "[training]", "warmup", self.warmup, "a share below 1")
        _check(0 < self.adam_beta2 < 1, "[training]", "adam_beta2", self.adam_beta2, "between 0 and 1")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"[training] batch_size is {self.batch_size} and micro_batch_size {self.micro_batch_size}; the first "
                "must be a multiple of the second."
            )
        if self.fsdp_size % self.ep_size:
            raise ConfigError(
                f"[training] ep_size is {self.ep_size} and fsdp_size {self.fsdp_size}; the second must be a multiple "
                "of the first."
            )

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the model only."""
        return self.fsdp_size > 1


@dataclass(frozen=True)
class BalancingConfig:
    """[balancing]: loss-free balancing (arXiv:2408.15664) of routers that have a balancing bias.

    Args:
        speed: Step of the bias, 0 leaves it alone; None is 0.001 for `pretrain` where the router has a bias, else 0.
        stop_at: Share of the steps after which the bias stays.
    """

    speed: float | None = None
    stop_at: float = 1.0

    def __post_init__(self) -> None:
        _check(self.speed is None or self.speed >= 0, "[balancing]", "speed", self.speed, "0 or more")
        _check(0 <= self.stop_at <= 1, "[balancing]", "stop_at", self.stop_at, "a share from 0 to 1")


@dataclass(frozen=True)
class OutputConfig:
    """[output]: the run folder."""

    folder: str

    def __post_init__(self) -> None:
        if not self.folder.strip():
            raise ConfigError("[output] folder is empty; name a new folder.")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Equal configs on equal data, machines and versions give equal results."""

    model: ModelConfig
    data: DataConfig
    method: Method
    training: TrainingConfig
    output: OutputConfig
    balancing: BalancingConfig = field(default_factory=BalancingConfig)

    def __post_init__(self) -> None:
        _check_architecture(self.model, is_pretraining=isinstance(self.method, PretrainMethod))
        if self.training.is_sharded and not isinstance(self.method, FullMethod | PretrainMethod):
            raise ConfigError(
                f"[training] fsdp_size is {self.training.fsdp_size}, which only the methods full and pretrain can use; "
                f"leave it out: {self.method.NAME} trains in several processes that each hold the whole base."
            )

    def to_dict(self) -> dict[str, Any]:
        """The tables of the TOML file, every default in place."""
        tables = {table: asdict(getattr(self, table)) for table in _TABLES if table != "method"}
        tables["method"] = {"name": self.method.NAME, **asdict(self.method)}
        tables["data"] = {**tables["data"].pop("rows"), **tables["data"]}
        return {table: tables[table] for table in _TABLES}

    def to_toml(self) -> str:
        """A file that `read_run_config` reads back as an equal config."""
        return write_toml(self.to_dict())

    def with_revisions(self, *, model: str | None, data: str | None) -> "RunConfig":
        """With the revisions that names of branches and tags stood for."""
        rows = self.data.rows if data is None else replace(self.data.rows, revision=data)
        revision = self.model.revision if model is None else model
        return replace(self, model=replace(self.model, revision=revision), data=replace(self.data, rows=rows))


_TABLES = ("model", "data", "method", "training", "balancing", "output")


def read_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a TOML file describes; `overrides` are of the form `training.steps=10`.

    Raises:
        ConfigError: If a key is unknown, missing, of a wrong type, out of range, or contradicts another.
    """
    return parse_run_config(read_toml(Path(path), overrides))


def parse_run_config(tables: Mapping[str, Any]) -> RunConfig:
    """The run that TOML tables describe.

    Raises:
        ConfigError: As `read_run_config`.
    """
    check_keys(tables, known=_TABLES, where="The file")
    for table in _TABLES:
        if table not in tables and table != "balancing":
            raise ConfigError(f"The file lacks the table [{table}].")
    return RunConfig(
        model=read_table(ModelConfig, tables["model"], where="[model]"),
        data=read_table(DataConfig, tables["data"], where="[data]"),
        method=read_method(tables["method"]),
        training=read_table(TrainingConfig, tables["training"], where="[training]"),
        balancing=read_table(BalancingConfig, tables.get("balancing", {}), where="[balancing]"),
        output=read_table(OutputConfig, tables["output"], where="[output]"),
    )


def _check_architecture(model: ModelConfig, *, is_pretraining: bool) -> None:
    if not is_pretraining:
        given = [key for key in ("preset", "overrides", "learn_vocab_size") if getattr(model, key)]
        if given:
            raise ConfigError(f"[model] has the key {given[0]}, which is for the method pretrain only.")
    elif model.tokenizer is None and model.learn_vocab_size is None and model.name is None:
        raise ConfigError("[model] with a preset needs tokenizer, or learn_vocab_size to learn one.")


def _check(holds: bool, table: str, key: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{table} {key} is {value}; expected {expected}.")
