"""What a run began with beyond its settings, and that one process has its folder at a time.

Rows, a choice file and the weights of the base may change under the names that the settings give them; a run that goes
on, or is read, shall be one run.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .run_folder import TrainingFolder


def check_inputs(folder: TrainingFolder, inputs: Mapping[str, Any]) -> None:
    """Record what the run begins with, or see that it is what it began with.

    Args:
        folder: Of the run.
        inputs: A thing's name for people, such as `rows`, to its JSON identity.

    Raises:
        ConfigError: If something is not what the run began with.
    """
    recorded = folder.read_json(folder.inputs) if folder.inputs.exists() else {}
    found = json.loads(json.dumps(inputs))
    for name in found.keys() & recorded.keys():
        if recorded[name] != found[name]:
            raise ConfigError(
                f"{folder.path} holds a run that began with other {name}; bring them back, name another folder, or "
                "start anew with --fresh."
            )
    if not folder.is_finished and not found.keys() <= recorded.keys():
        folder.write_json(folder.inputs, {**recorded, **found})


class FolderLock:
    """Held while a process trains in a folder, by a lock on the file of its settings; ends with the process."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, settings: Path) -> None:
        """Take it, if the file is there.

        Raises:
            ConfigError: If another process has it.
        """
        self.release()
        try:
            descriptor = os.open(settings, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"Another process trains in {settings.parent}; wait for its end, or name another folder."
            ) from None
        self._descriptor = descriptor

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
