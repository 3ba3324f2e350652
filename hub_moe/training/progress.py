"""What a person sees while a model trains."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics import RunMetrics

_PLAIN_LINES = 10
_DECAY = 0.95


class TrainingProgress(TrainerCallback):  # type: ignore[misc]
    """A bar on stderr: loss, speed, imbalance, dead experts and the time that is left; ten plain lines off a terminal.

    The mean loss is a moving average over logging steps, of which the newest weigh most. Only the first process shows
    it. `metrics` has to come before it among the trainer's callbacks, as `RunMetrics.add_to` sees to.
    """

    def __init__(self, metrics: RunMetrics) -> None:
        self._metrics = metrics
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
        self._loss = MovingAverage()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Show the newest figures."""
        if "loss" not in logs or self._task is None:
            return
        figures = describe_figures(self._metrics.latest, mean_loss=self._loss.add(logs["loss"]))
        self._bar.update(self._task, figures=figures)
        if (
            state.global_step % max(1, state.max_steps // _PLAIN_LINES) < state.logging_steps
            and not self._console.is_terminal
        ):
            self._console.print(f"step {state.global_step}/{state.max_steps}  {figures}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last state of the bar standing."""
        self._bar.stop()


class MovingAverage:
    """A mean in which each value weighs a little less than the next; of few values it is almost their plain mean."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """The mean with this value, the newest."""
        self._sum = _DECAY * self._sum + value
        self._weight = _DECAY * self._weight + 1
        return self._sum / self._weight


def describe_figures(row: dict[str, Any], *, mean_loss: float) -> str:
    """A row of `metrics.jsonl` in one short line."""
    dead = sum(row["dead_experts"].values())
    parts = [
        f"mean loss {mean_loss:.3f}",
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"imbalance {row['imbalance_worst']:.2f}",
    ]
    return "  ".join([*parts, f"{dead} dead expert{'' if dead == 1 else 's'}"] if dead else parts)
