"""Training of one model with transformers' `Trainer`, alike for models with and without experts."""

import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from texts import Text
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hub_moe.data import BlockDataset
from hub_moe.training import BalancingCallback


@dataclass(frozen=True)
class RunPlan:
    """How to train. Equal plans on equal blocks give equal models on one machine.

    Args:
        steps: Optimizer steps.
        batch_size: Blocks per step.
        learning_rate: Peak; it rises over `warmup_share` of the steps and then falls to 0 in a straight line.
        balancing_speed: Step of the balancing bias; 0 leaves it as it is, None is for a model without experts.
        evaluations: How often the held-out loss is taken.
        seed: Of the weights and the order of the blocks.
        warmup_share: Share of the steps.
        weight_decay: Of AdamW, on matrices.
        adam_beta2: Of AdamW.
    """

    steps: int
    batch_size: int
    learning_rate: float
    balancing_speed: float | None
    evaluations: int
    seed: int
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    adam_beta2: float = 0.99


@dataclass(frozen=True)
class Course:
    """`(step, held-out loss)` pairs; layers with experts; load of windows of steps (windows, layers, experts)."""

    held_out: list[tuple[int, float]]
    layer_indices: list[int]
    load_history: list[list[list[int]]]


class _Progress(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        done = f"step {state.global_step}/{state.max_steps}"
        print(f"  {done}  held-out loss {metrics['eval_loss']:.4f}", file=sys.stderr, flush=True)


def train(model: PreTrainedModel, text: Text, plan: RunPlan) -> Course:
    """Train `model` in place, on the CPU, and tell how it went."""
    balancing = None
    if plan.balancing_speed is not None:
        balancing = BalancingCallback(speed=plan.balancing_speed, window_steps=max(1, plan.steps // 100))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_trainer_arguments(plan, folder),
            train_dataset=BlockDataset(text.train_blocks),
            eval_dataset=BlockDataset(text.held_out_blocks),
            data_collator=default_data_collator,
            processing_class=text.tokenizer,
            callbacks=[_Progress(), *([balancing] if balancing else [])],
        )
        for talkative in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(talkative)
        trainer.train()
    return Course(
        held_out=[(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row],
        layer_indices=balancing.layer_indices if balancing else [],
        load_history=balancing.history if balancing else [],
    )


def _trainer_arguments(plan: RunPlan, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
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
        eval_strategy="steps",
        eval_steps=plan.steps // plan.evaluations,
        save_strategy="no",
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
