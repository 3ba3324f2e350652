"""transformers' `Trainer` for Mixture-of-Experts models: exact resume, exact held-out loss, no step on broken numbers.

Shape letters: B batch, L sequence.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from ..errors import CheckpointError, DivergenceError
from .balancing import AuxLossOnce
from .non_finite import describe_divergence, find_non_finite
from .sharding import is_sharded, load_like, load_optimizer, save_optimizer

TRAINED_WEIGHTS = "trained.safetensors"
OPTIMIZER = "optimizer"  # folder of a sharded model's, in which each process writes its part


class RowOrder(Sampler[int]):
    """`num_draws` row numbers: every row once in random order, then all again in another order, and so on.

    The order depends on the seed alone. A run has one such order, as long as its steps need, whose epochs run into each
    other: a step never has fewer rows than the others, and any number of processes takes the same rows in a step.
    """

    def __init__(self, num_rows: int, *, num_draws: int, seed: int) -> None:
        self._num_rows = num_rows
        self._num_draws = num_draws
        self._seed = seed

    def __len__(self) -> int:
        return self._num_draws

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        left = self._num_draws
        while left > 0:
            order = torch.randperm(self._num_rows, generator=generator)[:left].tolist()
            yield from order
            left -= len(order)


class MoeTrainer(AuxLossOnce):
    """`Trainer` whose checkpoints hold what is trained, and load it whole or not at all.

    Where everything is trained, a checkpoint is a model that `from_pretrained` loads; else it holds the trained weights
    and the balancing biases under their names in memory. Rows come in the order of `RowOrder`. Held-out loss is the
    mean over tokens, whatever the batches.

    Args:
        partial: Whether the frozen weights stay out of checkpoints.
        biases: Names of balancing biases that are moved while training.
        **kwargs: As `Trainer` takes them; `max_steps` of the arguments must be set.
    """

    control: TrainerControl

    def __init__(self, *, partial: bool, biases: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.partial = partial
        self.biases = tuple(biases)
        self.add_callback(_EvaluateAtBothEnds(self))
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows_per_step = (
            self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return RowOrder(len(dataset), num_draws=self.args.max_steps * rows_per_step, seed=self.args.seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer`; keeps loss and batch until the step that they belong to is known to be finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        self._batches.append(inputs)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once before each optimizer step, after the gradients were clipped.

        Raises:
            DivergenceError: If a loss or the gradient of the step is not finite; the weights are those before it.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        numbers = [*self._losses, *([torch.as_tensor(grad_norm)] if grad_norm is not None else [])]
        device = self._losses[0].device
        if not torch.isfinite(torch.stack([number.detach().float().to(device) for number in numbers])).all():
            self._stop_diverged()
        self._losses.clear()
        self._batches.clear()
        return grad_norm

    def _stop_diverged(self) -> None:
        losses = torch.stack(self._losses).float().cpu()
        what = "The loss" if not torch.isfinite(losses).all() else "The gradient"
        batches = [self._prepare_inputs(batch) for batch in self._batches]
        where = describe_divergence(self._plain_model, batches)
        raise DivergenceError(
            f"{what} of step {self.state.global_step + 1} is not finite: {where}; lower the learning rate or look at "
            "the rows of this step."
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the predicted tokens of the held-out rows, nats per token, over all processes."""
        loss, tokens = self._sum_losses(self.eval_dataset if eval_dataset is None else eval_dataset)
        if not math.isfinite(loss):
            self._stop_evaluation()
        metrics = {f"{metric_key_prefix}_loss": loss / max(tokens, 1), f"{metric_key_prefix}_tokens": tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _stop_evaluation(self) -> None:
        dataset: Any = self.eval_dataset
        where = describe_divergence(self._plain_model, [self._prepare_inputs(self.data_collator([dataset[0]]))])
        if self.state.global_step == 0:
            raise DivergenceError(f"The held-out loss before training is not finite: {where}; the base is broken.")
        raise DivergenceError(
            f"The held-out loss after step {self.state.global_step} is not finite: {where}; lower the learning rate."
        )

    def _sum_losses(self, dataset: Any) -> tuple[float, int]:
        """The summed loss and the number of predicted tokens; each process takes every world-size-th row.

        No DataLoader is used: it would draw from the random numbers of the training.
        """
        model: Any = self._plain_model
        was_training = model.training
        model.eval()
        size, world_size = self.args.per_device_eval_batch_size, self.args.world_size
        mine = range(self.args.process_index, len(dataset), world_size)
        most = -(-len(dataset) // world_size)  # rows of the process that has most: all run equally many forwards
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, most, size):
            rows = [dataset[row] for row in mine[start : start + size]]
            batch = self.data_collator(rows or [dataset[0]])
            with torch.no_grad(), self.accelerator.autocast():
                loss = model(**self._prepare_inputs(batch)).loss
            tokens = int((batch["labels"][..., 1:] != -100).sum()) if rows else 0
            if tokens:
                sums += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
        model.train(was_training)
        if world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()
        return sums[0].item(), int(sums[1].item())

    @property
    def _plain_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As `Trainer`, and only of finite weights, so that the last checkpoint is a good one.

        Raises:
            DivergenceError: If a trained weight is not finite.
        """
        broken = find_non_finite(trained_weights(self._plain_model, self.biases))
        if broken is not None:
            raise DivergenceError(
                f"After step {self.state.global_step} the weight {broken} is not finite; no checkpoint was written "
                "over the last good one; lower the learning rate."
            )
        super()._save_checkpoint(model, trial)
        if is_sharded(self.model):
            self._save_what_trainer_leaves_out(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        self.accelerator.wait_for_everyone()  # before the folder moves

    def _save_what_trainer_leaves_out(self, folder: Path) -> None:
        """`Trainer` does not resume sharded models, and saves the weights alone."""
        save_optimizer(self.model, self.optimizer, folder / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._save_rng_state(str(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self.optimizer, Path(checkpoint) / OPTIMIZER)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        if not self.partial:
            super()._save(folder, state_dict=state_dict)
        elif self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            weights = trained_weights(self._plain_model, self.biases)
            tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
            save_file(tensors, Path(folder) / TRAINED_WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer would load per-expert names into a model with stacks, match none of them, and only warn."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self.partial:
            file = Path(resume_from_checkpoint) / TRAINED_WEIGHTS
            targets = trained_weights(self._plain_model, self.biases)
            load_trained_weights(targets, load_file(file), source=resume_from_checkpoint)
        else:
            load_whole_model(self.model, resume_from_checkpoint)


class _EvaluateAtBothEnds(TrainerCallback):  # type: ignore[misc]
    """Held-out loss before the first and after the last step, whatever lies between."""

    def __init__(self, trainer: MoeTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step and self._trainer.eval_dataset is not None:
            self._trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and self._trainer.eval_dataset is not None:
            control.should_evaluate = True


def trained_weights(model: nn.Module, biases: Sequence[str] = ()) -> dict[str, Tensor]:
    """What training changes, by name in memory: parameters with gradients, and the balancing `biases`.

    Names of biases are those of the model that adapters may be wrapped around.
    """
    weights: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if any(name == bias or name.endswith(f".{bias}") for bias in biases):
            weights[name] = tensor
    return weights


def load_trained_weights(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `weights` into `targets`, by name.

    Raises:
        CheckpointError: If a name, shape or dtype differs; then nothing was copied.
    """
    for name in sorted(targets.keys() ^ weights.keys()):
        where = "is not in" if name in targets else "is not trained here but in"
        raise CheckpointError(f"{name} {where} the checkpoint {source}; it is of another run.")
    for name, target in targets.items():
        if weights[name].shape != target.shape or weights[name].dtype != target.dtype:
            raise CheckpointError(
                f"{name} has another shape or dtype in the checkpoint {source}; it is of another run."
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def load_whole_model(model: Any, folder: str) -> None:
    """Copy a saved model into `model`, bit for bit.

    Raises:
        CheckpointError: If a tensor is missing from the checkpoint, or has another shape.
    """
    assert isinstance(model, PreTrainedModel)
    loaded, info = load_like(model, folder)
    faults = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if faults:
        raise CheckpointError(f"{faults[0]} is missing from the checkpoint {folder}, or has another shape there.")
    model.load_state_dict(loaded.state_dict(), strict=True)
