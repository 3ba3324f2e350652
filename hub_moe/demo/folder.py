"""The folder of a run: what lies where, and whether it may be used."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.folder import claim_folder, write_atomically


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
    def chosen_experts(self) -> Path:
        """Picture."""
        return self.path / "chosen_experts.png"

    @property
    def reference(self) -> Path:
        """Rows that the contributor fine-tunes on."""
        return self.path / "reference.jsonl"

    @property
    def tuning_settings(self) -> Path:
        """The contributor's run, as `hub-moe train` takes it."""
        return self.path / "tuning.toml"

    @property
    def tuning(self) -> Path:
        """The contributor's run folder, with the expert patch."""
        return self.path / "tuning"

    @property
    def evals(self) -> Path:
        """Records of the base and of the patch."""
        return self.path / "evals"

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.report.exists()

    def write_atomically(self, target: Path, write: Callable[[Path], object]) -> None:
        """Let `write` make a file or folder under a temporary name, then give it its own."""
        write_atomically(target, write)


def open_run_folder(path: Path, settings: dict[str, Any], *, fresh: bool) -> RunFolder:
    """The folder of a new run, or of an earlier one with the same settings; `fresh` removes an earlier one first.

    Raises:
        ConfigError: If the folder holds something else, or a run with other settings.
        CheckpointError: If it cannot be written.
    """
    folder = RunFolder(path)
    claim_folder(
        folder.settings,
        settings,
        read=json.loads,
        write=lambda settings: json.dumps(settings, indent=2, sort_keys=True),
        what="demo run",
        made=_made(folder) if fresh else None,
    )
    return folder


def _made(folder: RunFolder) -> list[Path]:
    """What a run writes beside its settings, the report first."""
    folders = [folder.model, folder.checkpoints, folder.tuning, folder.evals, folder.hub]
    pictures = [folder.loss_curve, folder.expert_load, folder.chosen_experts]
    return [folder.report, *folders, folder.num_threads, folder.reference, folder.tuning_settings, *pictures]
