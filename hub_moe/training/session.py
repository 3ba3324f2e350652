"""One session of training: from the newest checkpoint, or the start, to the end or an interruption."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import TrainerState

from ..data import PreparedData
from ..energy import EnergyReport
from ..errors import ConfigError
from .balancing import BalancingCallback
from .checkpoints import CompleteCheckpoints, StopOnInterrupt, explain_failed_writes, find_checkpoint, scratch_folder
from .methods import Prepared
from .metrics import RunMetrics
from .processes import count
from .progress import TrainingProgress
from .run_config import DataConfig, RunConfig, TrainingConfig
from .run_folder import TrainingFolder
from .trainer import MoeTrainer

_LONGEST_PACKED = 2048  # tokens


@dataclass(frozen=True)
class Session:
    """How a session went.

    Args:
        first_step: Steps that earlier sessions had done.
        step: Steps done now.
        is_interrupted: Whether Ctrl-C ended it before the last step.
        held_out: `(step, loss)` pairs of the whole run, nats per token; the first is before training.
        losses: Training loss of each step of the whole run.
        tokens: Tokens trained on in the whole run, padding excluded.
        tokens_per_s: In this session.
        energy: Of the whole run, if it was metered.
        load: Where experts were balanced: for "first tenth" and "last tenth" the load by layer.
    """

    first_step: int
    step: int
    is_interrupted: bool
    held_out: list[tuple[int, float]]
    losses: list[float]
    tokens: int
    tokens_per_s: float
    energy: EnergyReport | None
    load: dict[str, dict[int, list[int]]]


def count_steps(training: TrainingConfig, num_rows: int) -> int:
    """Optimizer steps: as set, or as many as the epochs need, rounded up."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, -int(-training.epochs * num_rows // training.batch_size))


def split_batch(config: RunConfig, num_processes: int) -> tuple[int, int]:
    """Rows that a process holds at a time, and how often it does before an optimizer step.

    Raises:
        ConfigError: If the batch cannot be shared out evenly.
    """
    training = config.training
    share = training.batch_size // num_processes or 1
    micro = training.micro_batch_size or (fit_rows(config.data, share) if config.data.packing else share)
    accumulation, rest = divmod(training.batch_size, micro * num_processes)
    if rest or not accumulation:
        raise ConfigError(
            f"[training] batch_size is {training.batch_size}, which {num_processes} processes with {micro} rows at a "
            "time cannot share evenly; change batch_size or micro_batch_size."
        )
    return micro, accumulation


def fit_rows(data: DataConfig, share: int) -> int:
    """How many packed rows to lay end to end: the most that divides `share` and keeps the whole short.

    Documents in it are told apart by a mask whose cost grows with the square of its length.
    """
    return max(
        rows
        for rows in range(1, share + 1)
        if share % rows == 0 and (rows == 1 or rows * data.max_length <= _LONGEST_PACKED)
    )


def spread_rows(rows: Dataset[Any], most: int) -> Dataset[Any]:
    """At most so many of the rows, evenly spread."""
    size = len(rows)  # type: ignore[arg-type]
    return rows if size <= most else Subset(rows, [row * size // most for row in range(most)])


def train(prepared: Prepared, config: RunConfig, data: PreparedData, folder: TrainingFolder) -> Session:
    """Train until the last step, from the newest checkpoint if there is one.

    Ctrl-C ends it after the current step, with a checkpoint.

    Raises:
        DivergenceError: If a loss, gradient or weight is not finite; the last checkpoint is one from before.
        CheckpointError: If a checkpoint cannot be written, or is of another run.
    """
    steps = count_steps(config.training, len(data.train))
    found = find_checkpoint(folder.checkpoints)
    balancing = BalancingCallback(speed=prepared.balancing_speed, stop_at=config.balancing.stop_at)
    metrics = RunMetrics(folder.metrics, with_energy=config.training.energy)
    with StopOnInterrupt() as stop:
        trainer = MoeTrainer(
            partial=prepared.is_partial,
            biases=prepared.biases,
            model=prepared.model,
            args=_arguments(config, folder, steps=steps),
            train_dataset=data.train,
            eval_dataset=spread_rows(data.held_out, config.training.evaluation_rows),
            data_collator=data.collator(),
            callbacks=[
                *([balancing] if prepared.balancing_speed else []),
                CompleteCheckpoints(folder.checkpoints),
                TrainingProgress(metrics),
                stop,
            ],
        )
        if trainer.is_fsdp_enabled:
            raise ConfigError(
                "hub-moe train shards models by [training] fsdp_size; start it without accelerate's FSDP."
            )
        metrics.add_to(trainer)
        for talkative in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(talkative)
        first_step = _step_of(found)
        try:
            with explain_failed_writes(folder.path):
                trainer.train(resume_from_checkpoint=str(found) if found else None)
        finally:
            metrics.close()
            balancing.close()
    history = trainer.state.log_history
    return Session(
        first_step=first_step,
        step=trainer.state.global_step,
        is_interrupted=stop.is_interrupted and trainer.state.global_step < steps,
        held_out=[(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        losses=[entry["loss"] for entry in history if "loss" in entry],
        tokens=metrics.tokens,
        tokens_per_s=metrics.session_tokens_per_s,
        energy=metrics.energy,
        load=_load_by_phase(balancing),
    )


def _step_of(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    return int(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step)


def _arguments(config: RunConfig, folder: TrainingFolder, *, steps: int) -> TrainingArguments:
    training = config.training
    micro, accumulation = split_batch(config, count())
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(scratch_folder(folder.checkpoints)),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=_SCHEDULES[training.schedule],
        warmup_steps=round(training.warmup * steps),
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        **{_CHECKPOINTING: training.gradient_checkpointing},
        bf16=training.precision == "bfloat16",
        seed=training.seed,
        logging_steps=1,  # so that the loss of every step is in the checkpoint
        logging_nan_inf_filter=False,
        eval_strategy="steps" if training.evaluations else "no",
        eval_steps=max(1, steps // training.evaluations) if training.evaluations else None,
        save_strategy="steps" if training.checkpoints else "no",
        save_steps=max(1, steps // training.checkpoints) if training.checkpoints else 500,
        remove_unused_columns=False,
        dataloader_pin_memory=has_gpu,
        disable_tqdm=True,
        report_to=find_trackers(training),
        use_cpu=not has_gpu,
        save_only_model=training.is_sharded,  # else Trainer refuses; MoeTrainer saves the rest
    )


# transformers 5.23 renamed it
_IS_RENAMED = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if _IS_RENAMED else "gradient_checkpointing"
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def find_trackers(training: TrainingConfig) -> list[str]:
    """The trackers to report to.

    Raises:
        ConfigError: If one is not installed.
    """
    installed = get_available_reporting_integrations()
    for tracker in training.report_to:
        if tracker not in installed:
            have = ", ".join(installed) or "none"
            raise ConfigError(f"[training] report_to names {tracker!r}, which is not installed; installed are: {have}.")
    return list(training.report_to)


def _load_by_phase(balancing: BalancingCallback) -> dict[str, dict[int, list[int]]]:
    history = balancing.history
    if not history:
        return {}
    tenth = max(1, len(history) // 10)
    phases = {"first tenth": history[:tenth], "last tenth": history[-tenth:]}
    return {
        phase: {
            layer: torch.tensor([window[place] for window in windows]).sum(0).tolist()
            for place, layer in enumerate(balancing.layer_indices)
        }
        for phase, windows in phases.items()
    }
