"""The folder of a run: what lies where, and whether it may be used."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..training.checkpoints import explain_failed_writes


@dataclass(frozen=True)
class RunFolder:
    """`run.json` (settings) is written first, `report.json` last: where it is, the run is finished."""

    path: Path

    @property
    def settings(self) -> Path:
        """What the run was started with."""
        return self.path / "run.json"

    @property
    def report(self) -> Path:
        """The result."""
        return self.path / "report.json"

    @property
    def model(self) -> Path:
        """The trained model and its tokenizer."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """From which an interrupted run goes on."""
        return self.path / "checkpoints"

    @property
    def hub(self) -> Path:
        """Everything of the embedded Hub."""
        return self.path / "hub"

    @property
    def scratch(self) -> Path:
        """Only there while a run is."""
        return self.path / ".unfinished-exchange"

    @property
    def num_threads(self) -> Path:
        """With how many of torch's threads the run trains."""
        return self.path / "num_threads.txt"

    @property
    def loss_curve(self) -> Path:
        """Picture."""
        return self.path / "loss_curve.png"

    @property
    def expert_load(self) -> Path:
        """Picture."""
        return self.path / "expert_load.png"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.report.exists()

    def write_atomically(self, target: Path, write: Callable[[Path], object]) -> None:
        """Let `write` make a file or folder under a temporary name, then give it its own."""
        unfinished = target.with_name(f".unfinished-{target.name}")
        _remove(unfinished)
        write(unfinished)
        _remove(target)
        os.replace(unfinished, target)


def open_run_folder(path: Path, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The folder of a new run, or of an earlier one with the same settings; `fresh` removes an earlier one first.

    Raises:
        ConfigError: If the folder holds something else, or a run with other settings.
        CheckpointError: If it cannot be written.
    """
    folder = RunFolder(path)
    settings_text = json.dumps(settings, indent=2, sort_keys=True)
    with explain_failed_writes(path):
        path.mkdir(parents=True, exist_ok=True)
        is_run = folder.settings.exists()
        if not is_run and any(entry.name != f".unfinished-{folder.settings.name}" for entry in path.iterdir()):
            raise ConfigError(f"{path} holds files that are not of a demo run; name an empty or new folder.")
        if is_run and fresh:
            _remove_run(folder)
            is_run = False
        if is_run and folder.settings.read_text("utf-8") != settings_text:
            raise ConfigError(
                f"{path} holds a run with other settings ({_first_difference(folder.settings, settings)}); name "
                "another folder, or start anew with --fresh."
            )
        if not is_run:
            folder.write_atomically(folder.settings, lambda temporary: temporary.write_text(settings_text, "utf-8"))
    return folder


def _remove_run(folder: RunFolder) -> None:
    """Only what a run writes; `report.json` first and `run.json` last, so that no remainder looks like a run."""
    folders = [folder.model, folder.checkpoints, folder.hub]
    files = [folder.num_threads, folder.loss_curve, folder.expert_load]
    for path in [folder.report, *folders, *files, *folder.path.glob(".unfinished-*"), folder.settings]:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _first_difference(settings_file: Path, wanted: dict[str, Any]) -> str:
    found = _flatten(json.loads(settings_file.read_text("utf-8")))
    for name, value in _flatten(json.loads(json.dumps(wanted))).items():
        if found.get(name) != value:
            return f"{name} is {found.get(name)!r} there and {value!r} now"
    return "it has more of them"


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
