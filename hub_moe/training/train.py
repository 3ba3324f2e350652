"""Train a causal language model on blocks of tokens with transformers' `Trainer`."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from ..data import BlockDataset
from .balancing import BalancingCallback
from .checkpoints import CompleteCheckpoints, StopOnInterrupt, explain_failed_writes, find_checkpoint, scratch_folder
from .progress import TrainingProgress


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. Equal plans on equal blocks give equal models on one machine.

    Args:
        steps: Optimizer steps.
        batch_size: Blocks per step.
        learning_rate: Peak; it rises over `warmup_share` of the steps and then falls to 0 in a straight line.
        warmup_share: Share of the steps.
        weight_decay: Of AdamW, on matrices.
        adam_beta2: Of AdamW.
        balancing_speed: Step of the balancing bias.
        evaluations: How often the held-out loss is taken.
        checkpoints: How often a checkpoint is written.
        seed: Order of the blocks.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    adam_beta2: float = 0.99
    balancing_speed: float = 0.001
    evaluations: int = 10
    checkpoints: int = 4
    seed: int = 0


@dataclass(frozen=True)
class TrainingRecord:
    """What a checkpoint knows of the training that led to it.

    Args:
        step: Optimizer steps done.
        losses: Training loss of each step, nats per token.
        held_out: `(step, loss)` pairs, nats per token.
        layer_indices: Decoder layers with experts.
        load_history: Load of windows of steps, as nested lists (windows, layers, experts).
    """

    step: int
    losses: list[float]
    held_out: list[tuple[int, float]]
    layer_indices: list[int]
    load_history: list[list[list[int]]]


@dataclass(frozen=True)
class TrainingSession:
    """How one call of `train_causal_lm` went; `tokens_per_s` leaves evaluation and saving out."""

    checkpoint: Path
    first_step: int
    is_interrupted: bool
    tokens_per_s: float | None


def train_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    train_blocks: Tensor,
    held_out_blocks: Tensor,
    plan: TrainingPlan,
    folder: Path,
) -> TrainingSession:
    """Train `model` on the CPU, or go on from the newest checkpoint in `folder`; the last checkpoint holds the result.

    Ctrl-C ends the training after the current step, with a checkpoint from which the next call goes on as if nothing
    had happened. `model` is only a starting point: read the trained one from the checkpoint.

    Raises:
        CheckpointError: If a checkpoint cannot be written.
    """
    found = find_checkpoint(folder)
    first_step = read_record(found).step if found else 0
    if found and first_step >= plan.steps:
        return TrainingSession(found, first_step=first_step, is_interrupted=False, tokens_per_s=None)
    balancing = BalancingCallback(speed=plan.balancing_speed, window_steps=max(1, plan.steps // 100))
    progress = TrainingProgress(balancing, tokens_per_step=plan.batch_size * train_blocks.shape[1])
    with StopOnInterrupt() as stop:
        trainer = Trainer(
            model=model,
            args=_trainer_arguments(plan, folder),
            train_dataset=BlockDataset(train_blocks),
            eval_dataset=BlockDataset(held_out_blocks),
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=[balancing, CompleteCheckpoints(folder), progress, stop],
        )
        for talkative in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(talkative)
        with explain_failed_writes(folder):
            trainer.train(resume_from_checkpoint=str(found) if found else None)
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None
    is_interrupted = stop.is_interrupted and read_record(checkpoint).step < plan.steps
    return TrainingSession(checkpoint, first_step, is_interrupted, progress.tokens_per_s)


def read_record(checkpoint: Path) -> TrainingRecord:
    """The record of the training that led to a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    balancing = state["stateful_callbacks"][BalancingCallback.__name__]["attributes"]
    return TrainingRecord(
        step=state["global_step"],
        losses=[entry["loss"] for entry in state["log_history"] if "loss" in entry],
        held_out=[(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry],
        layer_indices=balancing["layer_indices"],
        load_history=balancing["history"],
    )


def _trainer_arguments(plan: TrainingPlan, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(scratch_folder(folder)),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=32,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(plan.warmup_share * plan.steps),
        weight_decay=plan.weight_decay,
        adam_beta2=plan.adam_beta2,
        optim="adamw_torch_fused",
        seed=plan.seed,
        logging_steps=1,  # so that the loss of every step is in the checkpoint
        eval_strategy="steps",
        eval_steps=max(1, plan.steps // plan.evaluations),
        save_strategy="steps",
        save_steps=max(1, plan.steps // plan.checkpoints),
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
