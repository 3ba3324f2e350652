"""Checkpoints that are either complete or not there, and training that stops at Ctrl-C and goes on later.

Trainer writes a checkpoint file by file into its folder. Here that folder is a scratch one, and a finished checkpoint
moves out of it by one rename.
"""

import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, HubMoeError
from .processes import in_any

_UNFINISHED = "unfinished"
_NAME = re.compile(r"checkpoint-(\d+)")


def scratch_folder(folder: Path) -> Path:
    """Where `Trainer` may write checkpoints that belong into `folder`: its `output_dir`."""
    return folder / _UNFINISHED


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    return found[max(found)] if found else None


@contextmanager
def explain_failed_writes(folder: Path) -> Iterator[None]:
    """Turn what a full disk or a missing right makes Python, torch and safetensors raise into one sentence.

    Raises:
        CheckpointError: In place of those errors; others pass.
    """
    try:
        yield
    except HubMoeError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer, named by its class or its source file
        is_of_writer = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
        if isinstance(error, RuntimeError) and not is_of_writer:
            raise
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"Cannot write to {folder}: {reason}; choose a folder with room that you may write to."
        ) from error


class CompleteCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Moves each checkpoint that `Trainer` finished from the scratch folder into `folder`; only the newest is kept.

    Of several processes the first one does it; the others have to be done with writing by then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what a run that was killed while saving left behind."""
        if state.is_world_process_zero:
            shutil.rmtree(scratch_folder(self.folder), ignore_errors=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The rename is the moment at which the checkpoint exists."""
        if not state.is_world_process_zero:
            return
        older = find_checkpoint(self.folder)
        name = f"checkpoint-{state.global_step}"
        if older is not None and older.name == name:
            shutil.rmtree(older)
            older = None
        os.replace(scratch_folder(self.folder) / name, self.folder / name)
        if older is not None:
            shutil.rmtree(older)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing is left in the scratch folder."""
        if state.is_world_process_zero:
            shutil.rmtree(scratch_folder(self.folder), ignore_errors=True)


class StopOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """While entered, Ctrl-C (SIGINT) ends training after the current step, with a checkpoint; a second one at once.

    Of several processes all end after the same step; torchrun passes Ctrl-C on, and kills them after 30 s.
    Enter it around `Trainer.train`. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.is_interrupted = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask Trainer to save and stop."""
        self.is_interrupted = in_any(self.is_interrupted)
        if self.is_interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        self._restore()

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
