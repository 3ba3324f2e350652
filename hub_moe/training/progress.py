"""What a person sees while a model trains."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .balancing import BalancingCallback

_PLAIN_LINES = 10


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """A bar on stderr with loss, tokens per second and load imbalance; ten plain lines where stderr is no terminal.

    The loss is a moving average. Needs `logging_steps=1`. After training, `tokens_per_s` is the speed of this session,
    evaluation left out.
    """

    def __init__(self, balancing: BalancingCallback, *, tokens_per_step: int) -> None:
        self.tokens_per_s = 0.0
        self._balancing = balancing
        self._tokens_per_step = tokens_per_step
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._step_started_s = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock; what lies between steps (evaluation, saving) is not training speed."""
        self._step_started_s = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._step_started_s
        self._steps += 1
        self.tokens_per_s = self._steps * self._tokens_per_step / self._seconds

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the newest figures."""
        if "loss" not in logs or self._task is None:
            return
        self._loss = logs["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * logs["loss"]
        figures = (
            f"loss {self._loss:.3f}  {self.tokens_per_s:,.0f} tokens/s  imbalance {self._balancing.imbalance():.2f}"
        )
        self._bar.update(self._task, completed=state.global_step, figures=figures)
        is_due = state.global_step % max(1, state.max_steps // _PLAIN_LINES) == 0
        if is_due and not self._console.is_terminal:
            self._console.print(f"step {state.global_step}/{state.max_steps}  {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state of the bar standing."""
        self._bar.stop()
